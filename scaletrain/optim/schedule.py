"""The learning rate of a step: linear warm-up, then half a cosine, stairs or a constant, as a pure
function of the step.

The cosine's form is that of BYOL's, SimCLR's and Barlow Twins' code. With w warm-up steps of T in
all, `base` the scaled rate:

    step < w         start + (base - start) * step / w
    w <= step <= T   end + (base - end) * (1 + cos(pi * (step - w) / (T - w))) / 2

Step 0 has `start` (0 by default), step w - 1 is below base, step w is exactly base, once.

The optimizer takes steps 0 .. T - 1, so the last one is a little above `end`, which the curve
reaches at step T. Stairs (MoCo v1) multiply base by gamma from the first step of each epoch in
`milestones` on. differs: SwAV's np.linspace gives base twice, on the last warm-up step and the
first cosine step; the authors compute in float32; SimCLR and BYOL count w from N * epochs / B, here
it is round(epochs * steps per epoch) with the last batch dropped.
"""

from __future__ import annotations

import math

from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import OptimConfig


def base_lr(optim: OptimConfig, batch: int) -> float:
    """The rate for a global batch: lr * b (linear), lr * sqrt(b) (sqrt) or lr (none), with b =
    batch / lr_batch.

    SimCLR's `0.075 * sqrt(batch)` is lr 0.075 with lr_batch 1, or lr 1.2 with lr_batch 256.
    """
    ratio = batch / optim.lr_reference_batch

    return optim.lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[optim.lr_scaling]


def lr(optim: OptimConfig, batch: int, step: int, steps_per_epoch: int, total: int) -> float:
    """The rate of optimizer step `step` (from 0) of `total`; from `total` on it stays at its final
    value.

    Raises ConfigError if the warm-up is longer than the run, or if there are milestones without
    stairs or the reverse.
    """
    if bool(optim.milestones) != (optim.schedule == "steps"):
        raise ConfigError(
            f"optim.schedule={optim.schedule} and optim.milestones={list(optim.milestones)} do not "
            "belong together; milestones "
            "are epochs of optim.schedule=steps, e.g. optim.milestones=[120,160]; any other "
            "schedule has optim.milestones=[]"
        )

    base = base_lr(optim, batch)
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    if warmup > total:
        raise ConfigError(
            f"optim.warmup_epochs={optim.warmup_epochs:g} means {warmup} steps of warm-up, but the "
            f"run has only {total}; "
            f"set optim.warmup_epochs to at most {total / steps_per_epoch:.4g}, or train longer"
        )

    if step < warmup:
        start = optim.warmup_start * base
        return start + (base - start) * step / warmup

    if optim.schedule == "steps":
        return base * optim.gamma ** sum(
            step >= round(epoch * steps_per_epoch) for epoch in optim.milestones
        )
    if optim.schedule == "constant" or warmup == total:
        return base

    end = optim.min_lr_ratio * base
    progress = min(1.0, (step - warmup) / (total - warmup))
    return end + (base - end) * (1 + math.cos(math.pi * progress)) / 2
