"""Weighted mixtures of data sets, and epochs of a chosen length: like a plan, a pure function of
(seed, epoch, step).

Each source is read in passes, each of which has its own order and is complete before the next one
begins. How many draws of a source precede a global step has a closed form, so (epoch, step) is the
whole state of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from scaletrain.data.errors import DataError
from scaletrain.data.sampling.plan import (
    Batches,
    Draws,
    EverySample,
    Ints,
    Order,
    divisor,
    keyed,
)
from scaletrain.runtime.tables import plural


class MixtureSource(NamedTuple):
    """A data set of a mixture."""

    # for messages
    name: str
    # [S] samples of each shard in canonical order
    counts: Ints
    # share of all draws, relative to the other sources
    weight: float


class Mixture(Batches):
    """Batches from several sources, or from one with an epoch of its own length.

    Samples are numbered source after source. `epoch_samples`: draws of an epoch; 0: as many as
    there are samples. The rows of a batch are ordered by lane, with the sources mixed within a
    lane, so every rank reads from all sources and from its own part of their shards. Raises
    DataError for sizes that do not fit together.
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
                    f"every batch={batch}; lower its weight or batch"
                )

    def weights(self) -> list[float]:
        """Each source's share of all draws; they add up to 1."""
        left, result = Fraction(1), []
        for share in self._shares:
            result.append(float(left * share))
            left -= left * share

        return result

    def drawn(self, draws: int) -> list[int]:
        """How many of the run's first `draws` draws come from each source; each count differs from
        its exact share by a few at most.
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
        # the pass through the source, and the position in it
        turn, place = np.divmod(place, sizes[source])

        lane, at = self._turns(source, place)
        rows = np.lexsort((keyed(self.seed, "row", before, np.arange(self.size)), lane))[lo:hi]
        source, turn, lane, at = source[rows], turn[rows], lane[rows], at[rows]
        samples = np.empty_like(at)

        for number, order in enumerate(self.orders):
            # there are two passes where one ends within the batch
            for n in np.unique(turn[source == number]):
                chosen = (source == number) & (turn == n)
                samples[chosen] = self._first[number] + order.at(int(n), lane[chosen], at[chosen])

        return Draws(samples, turn - (np.array(opening) // sizes)[source])

    def every(self) -> EverySample:
        counts = np.concatenate([source.counts for source in self.sources])
        first = self.orders[0]
        order = Order(counts, seed=self.seed, lanes=first.lanes, window=first.window)
        return EverySample(order, self.size)

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
    """Each source's share of what the sources before it leave. With these, counts never decrease,
    which rounding each count separately would not guarantee.
    """
    return [weight / sum(weights[number:]) for number, weight in enumerate(weights)]
