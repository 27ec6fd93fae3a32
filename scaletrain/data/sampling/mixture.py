"""Weighted mixtures of data sets and epochs of a chosen length, as exact as a plan: a pure function
of (seed, epoch, step).

Every source is walked through pass after pass, each in its own order and whole before the next
begins; how many draws of a source come before a global step is a closed form of the step. The state
of a run stays (epoch, step).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from scaletrain.data.errors import DataError
from scaletrain.data.sampling.plan import Batches, Draws, Ints, Order, divisor, keyed
from scaletrain.runtime.tables import plural


class MixtureSource(NamedTuple):
    # for texts
    name: str
    counts: Ints  # [S] samples of each shard in canonical order
    # share of all draws, relative to the other sources
    weight: float


class Mixture(Batches):
    """Batches from several sources, or from one with an epoch of its own length.

    Samples are numbered source after source. `epoch_samples`: draws of an epoch; 0: as many as
    there are samples. Rows of a batch lie by lane, sources mixed within a lane, so every rank reads
    all sources and its own part of their shards. Raises DataError for numbers that do not fit
    together.
    """

    whole = False

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        *,
        seed: int,
        batch: int,
        lanes: int,
        window: int,
        epoch_samples: int = 0,
    ) -> None:
        super().__init__(seed=seed, size=batch)
        self.sources = tuple(sources)
        self.orders = [
            Order(
                source.counts, seed=int(keyed(seed, "source", number)), lanes=lanes, window=window
            )
            for number, source in enumerate(sources)
        ]
        sizes = [order.samples for order in self.orders]

        self.samples = sum(sizes)
        self._first = np.cumsum([0, *sizes])
        self._shares = _shares([Fraction(str(source.weight)) for source in sources])
        self.steps_per_epoch = (epoch_samples or self.samples) // batch
        if batch % lanes:
            raise DataError(
                f"data.lanes={lanes} does not divide batch={batch}; set data.lanes to a divisor "
                f"such as {divisor(batch, lanes)}"
            )
        if not self.steps_per_epoch:
            raise DataError(
                f"an epoch of {epoch_samples or self.samples} samples is less than batch={batch}; "
                "lower batch"
            )

        for source, size, weight in zip(sources, sizes, self.weights(), strict=True):
            if size < batch * weight:
                raise DataError(
                    f"{source.name} has {size} samples, fewer than its {batch * weight:.0f} of "
                    f"every batch={batch}; "
                    "lower its weight or batch"
                )

    def weights(self) -> list[float]:
        """Each source's share of all draws; they add up to 1."""
        left, result = Fraction(1), []
        for share in self._shares:
            result.append(float(left * share))
            left -= left * share

        return result

    def drawn(self, draws: int) -> list[int]:
        """How many of the run's first `draws` draws come from each source: never more than a few
        from its exact share.
        """
        result = []

        for share in self._shares:
            result.append(draws * share.numerator // share.denominator)
            draws -= result[-1]

        return result

    def draws(self, epoch: int, step: int, lo: int = 0, hi: int | None = None) -> Draws:
        self._inside(step)
        before = (epoch * self.steps_per_epoch + step) * self.size
        begin, end, opening = map(
            self.drawn, (before, before + self.size, epoch * self.steps_per_epoch * self.size)
        )
        source = np.repeat(np.arange(len(begin)), np.subtract(end, begin))
        place = np.concatenate([np.arange(a, b) for a, b in zip(begin, end, strict=True)])
        sizes = np.diff(self._first)
        # the pass through the source, and the place in it
        turn, place = np.divmod(place, sizes[source])

        lane, at = self._turns(source, place)
        rows = np.lexsort((keyed(self.seed, "row", before, np.arange(self.size)), lane))[lo:hi]
        source, turn, lane, at = source[rows], turn[rows], lane[rows], at[rows]
        samples = np.empty_like(at)

        for number, order in enumerate(self.orders):
            # two where a pass ends within the batch
            for n in np.unique(turn[source == number]):
                chosen = (source == number) & (turn == n)
                samples[chosen] = self._first[number] + order.at(int(n), lane[chosen], at[chosen])

        return Draws(samples, turn - (np.array(opening) // sizes)[source])

    def in_use(self) -> tuple[int, int]:
        samples = self.batch(0, 0)
        source = np.searchsorted(self._first, samples, "right") - 1
        distinct = [
            len(np.unique(order.shards(samples[source == number] - self._first[number])))
            for number, order in enumerate(self.orders)
        ]

        return sum(distinct), sum(order.in_use(0) for order in self.orders)

    def _turns(self, source: Ints, place: Ints) -> tuple[Ints, Ints]:
        lane, at = np.empty_like(place), np.empty_like(place)
        for number, order in enumerate(self.orders):
            chosen = source == number
            lane[chosen], at[chosen] = order.turn(place[chosen])
        return lane, at

    def _about(self) -> str:
        parts = [
            f"{source.name} ({order.samples:,} samples in {plural(len(order.counts), 'shard')}, "
            f"{weight:.4g} of the draws)"
            for source, order, weight in zip(self.sources, self.orders, self.weights(), strict=True)
        ]
        draws, lanes = self.steps_per_epoch * self.size, self.orders[0].lanes

        return f"an epoch of {draws:,} draws over {plural(lanes, 'lane')} from {', '.join(parts)}"


def _shares(weights: Sequence[Fraction]) -> list[Fraction]:
    """Each source's share of what the sources before it leave. So counts never fall: rounding each
    count alone could.
    """
    return [weight / sum(weights[number:]) for number, weight in enumerate(weights)]
