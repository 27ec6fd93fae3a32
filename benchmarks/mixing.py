"""How many classes a batch holds, beside uniform sampling: shards written with the global shuffle, and class-sorted ones.

    python benchmarks/mixing.py

A stand-in for ImageNet: 1,281 shards of 1,000 samples, 1,000 classes, batch 4,096. Limit: shuffled shards reach 95 % of
uniform sampling's distinct classes. KL: mean divergence of a batch's classes from the collection's, in nats.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from numpy.typing import NDArray

from scaletrain.data.plan import Ints, Plan

SHARDS, PER_SHARD, CLASSES, BATCH, LIMIT = 1281, 1000, 1000, 4096, 0.95
SAMPLES = SHARDS * PER_SHARD


def judged(batches: list[Ints], classes: Ints) -> tuple[float, float]:
    """Mean over batches of their distinct classes, and of the KL divergence of their classes from all samples'."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, default=40)
    number = parser.parse_args().batches
    draw = np.random.default_rng(0)
    ordered = np.arange(SAMPLES) * CLASSES // SAMPLES
    shuffled = draw.permutation(ordered)
    uniform = judged([draw.choice(SAMPLES, BATCH, replace=False) for _ in range(number)], ordered)
    print(f"{'':44} classes of uniform     KL   shards in use")
    print(f"{'uniform sampling':44} {uniform[0]:7.1f}  100.0 %  {uniform[1]:.3f}")
    least = 1.0
    for lanes in (64, 256):
        for window in (1, 4, 16, 64):
            plan = Plan(np.full(SHARDS, PER_SHARD), seed=0, batch=BATCH, lanes=lanes, window=window)
            batches, held = some(plan, number), plan.in_use()[1]
            for name, classes in (("shuffled", shuffled), ("class-sorted", ordered)):
                distinct, divergence = judged(batches, classes)
                label = f"{name} shards, {lanes} lanes, window {window}"
                print(f"{label:44} {distinct:7.1f} {distinct / uniform[0]:7.1%}  {divergence:.3f}   {held:,}")
                if name == "shuffled":
                    least = min(least, distinct / uniform[0])
    verdict = "met" if least >= LIMIT else "MISSED"
    print(f"shuffled shards: at least {least:.1%} of uniform sampling's classes, limit {LIMIT:.0%}: {verdict}")
    return int(least < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
