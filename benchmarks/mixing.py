"""How many classes a batch holds, beside uniform sampling: shards written with the global shuffle,
and class-sorted ones.

    python -m benchmarks.mixing

A stand-in for ImageNet: 1,281 shards of 1,000 samples, 1,000 classes, batch 4,096. Limit: shuffled
shards reach 95 % of uniform sampling's distinct classes. KL: mean divergence of a batch's classes
from the collection's, in nats.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from benchmarks.rows import HEAD, Row
from scaletrain.data.sampling.plan import Ints, Plan

SHARDS, PER_SHARD, CLASSES, BATCH, LIMIT = 1281, 1000, 1000, 4096, 0.95
SAMPLES = SHARDS * PER_SHARD


def judged(batches: list[Ints], classes: Ints) -> tuple[float, float]:
    """Mean over batches of their distinct classes, and of the KL divergence of their classes from
    all samples'.
    """
    counts = np.stack([np.bincount(classes[batch], minlength=CLASSES) for batch in batches])
    share: NDArray[np.float64] = counts / counts.sum(1, keepdims=True)
    base = np.bincount(classes, minlength=CLASSES) / len(classes)

    return float((counts > 0).sum(1).mean()), float(
        np.where(counts, share * np.log(np.maximum(share, 1e-12) / base), 0).sum(1).mean()
    )


def some(plan: Plan, batches: int) -> list[Ints]:
    """Batches evenly over two epochs."""
    steps = np.linspace(0, plan.steps_per_epoch - 1, -(-batches // 2)).astype(int).tolist()
    return [plan.batch(epoch, step) for epoch in (0, 1) for step in steps]


def rows(number: int = 40) -> Iterator[Row]:
    draw = np.random.default_rng(0)
    ordered = np.arange(SAMPLES) * CLASSES // SAMPLES
    shuffled = draw.permutation(ordered)
    uniform = judged([draw.choice(SAMPLES, BATCH, replace=False) for _ in range(number)], ordered)

    for lanes, window in ((64, 1), (64, 4), (64, 16), (256, 4)):
        plan = Plan(np.full(SHARDS, PER_SHARD), seed=0, batch=BATCH, lanes=lanes, window=window)
        batches, held = some(plan, number), plan.in_use()[1]
        for name, classes in (("shuffled", shuffled), ("class-sorted", ordered)):
            distinct, divergence = judged(batches, classes)
            share, least = distinct / uniform[0], LIMIT if name == "shuffled" else 0.0
            yield Row(
                f"classes per batch, {name} shards, {lanes} lanes, window {window}",
                f"{distinct:.1f}, KL {divergence:.3f}, {held:,} shards in use",
                "uniform sampling",
                f"{uniform[0]:.1f}, KL {uniform[1]:.3f}",
                f"{share:.1%}",
                f"{least:.0%}" if least else "-",
                share >= least,
            )


if __name__ == "__main__":
    print(HEAD, *rows(), sep="\n")
