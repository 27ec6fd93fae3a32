"""How many classes a batch contains, compared with uniform sampling, for globally shuffled and for
class-sorted shards.

    python -m benchmarks.mixing

The data set has the size of ImageNet: 1,281 shards of 1,000 samples, 1,000 classes; batches of
4,096. Target: with shuffled shards a batch has 95 % of the distinct classes of uniform sampling.
KL: mean divergence of the classes of a batch from those of the data set, in nats.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from benchmarks.rows import HEAD, Row
from scaletrain.data.sampling.plan import Ints, Plan

SHARDS, PER_SHARD, CLASSES, BATCH, LIMIT = 1281, 1000, 1000, 4096, 0.95
SAMPLES = SHARDS * PER_SHARD


def scores(batches: list[Ints], classes: Ints) -> tuple[float, float]:
    """Means over batches of the number of distinct classes and of the KL divergence of the classes
    from those of all samples.
    """
    counts = np.stack([np.bincount(classes[batch], minlength=CLASSES) for batch in batches])
    share: NDArray[np.float64] = counts / counts.sum(1, keepdims=True)
    base = np.bincount(classes, minlength=CLASSES) / len(classes)

    return float((counts > 0).sum(1).mean()), float(
        np.where(counts, share * np.log(np.maximum(share, 1e-12) / base), 0).sum(1).mean()
    )


def some(plan: Plan, batches: int) -> list[Ints]:
    """Batches spread evenly over two epochs."""
    steps = np.linspace(0, plan.steps_per_epoch - 1, -(-batches // 2)).astype(int).tolist()
    return [plan.batch(epoch, step) for epoch in (0, 1) for step in steps]


def rows(number: int = 40) -> Iterator[Row]:
    draw = np.random.default_rng(0)
    ordered = np.arange(SAMPLES) * CLASSES // SAMPLES
    shuffled = draw.permutation(ordered)
    uniform = scores([draw.choice(SAMPLES, BATCH, replace=False) for _ in range(number)], ordered)

    for lanes, window in ((64, 1), (64, 4), (64, 16), (256, 4)):
        plan = Plan(np.full(SHARDS, PER_SHARD), seed=0, batch=BATCH, lanes=lanes, window=window)
        batches, in_use = some(plan, number), plan.in_use()[1]
        for name, classes in (("shuffled", shuffled), ("class-sorted", ordered)):
            distinct, divergence = scores(batches, classes)
            share, least = distinct / uniform[0], LIMIT if name == "shuffled" else 0.0
            yield Row(
                f"classes per batch, {name} shards, {lanes} lanes, window {window}",
                f"{distinct:.1f}, KL {divergence:.3f}, {in_use:,} shards in use",
                "uniform sampling",
                f"{uniform[0]:.1f}, KL {uniform[1]:.3f}",
                f"{share:.1%}",
                f"{least:.0%}" if least else "-",
                share >= least,
            )


if __name__ == "__main__":
    print(HEAD, *rows(), sep="\n")
