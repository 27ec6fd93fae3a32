"""Class-balanced batches of labelled samples."""

from __future__ import annotations

import numpy as np

from scaletrain import rng
from scaletrain.data.errors import DataError
from scaletrain.data.sampling.plan import Batches, Draws, Ints, bijection, keyed


class Balanced(Batches):
    """Batches of `classes` classes with `per_class` samples each; adjacent rows are of different
    classes.

    `index`, `labels` [N]: the numbers of the labelled samples and their classes.
    """

    whole = False

    def __init__(
        self,
        index: Ints,
        labels: Ints,
        *,
        seed: int,
        classes: int,
        per_class: int,
        steps_per_epoch: int,
    ) -> None:
        super().__init__(seed=seed, size=classes * per_class)
        order = np.argsort(labels, kind="stable")
        _, self.starts, self.counts = np.unique(
            labels[order], return_index=True, return_counts=True
        )
        self.index, self.classes, self.per_class = index[order], classes, per_class
        self.samples, self.steps_per_epoch = len(index), steps_per_epoch

        if classes > len(self.counts):
            raise DataError(
                f"data.support.classes={classes}, but the labelled samples are of "
                f"{len(self.counts)}; lower it"
            )

    def draws(self, epoch: int, step: int, lo: int = 0, hi: int | None = None) -> Draws:
        self._inside(step)
        row = np.arange(lo, self.size if hi is None else hi, dtype=np.int64)
        turn = (epoch * self.steps_per_epoch + step) * self.classes + row % self.classes
        rounds, place = np.divmod(turn, len(self.counts))
        chosen = np.empty_like(place)

        # there are two rounds where one ends within the batch
        for n in np.unique(rounds):
            order = rng.permutation(len(self.counts), self.seed, "support classes", int(n)).numpy()
            chosen[rounds == n] = order[place[rounds == n]]

        passes, at = np.divmod(rounds * self.per_class + row // self.classes, self.counts[chosen])
        at = bijection(at, self.counts[chosen], keyed(self.seed, "support samples", chosen, passes))
        return Draws(self.index[self.starts[chosen] + at], passes)

    def part(self, rank: int, world: int) -> tuple[int, int]:
        if self.size % world:
            raise DataError(
                f"{world} processes do not divide the {self.size} labelled samples of a step; "
                "change data.support.classes or data.support.per_class"
            )

        return rank * self.size // world, (rank + 1) * self.size // world

    def in_use(self) -> tuple[int, int]:
        # upper bounds, since each labelled sample may be in a shard of its own
        return self.size, self.samples

    def mixing(self, shard_bytes: float = 0.0) -> str:
        return self._about()

    def _about(self) -> str:
        return (
            f"{self.size:,} of {self.samples:,} labelled samples, {self.classes} of "
            f"{len(self.counts):,} classes"
        )
