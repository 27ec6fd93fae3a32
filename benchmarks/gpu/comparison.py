"""Trains the tests' miniature methods on a device and compares the states of two runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TypeVar

import torch
from kit import small  # type: ignore[import-not-found]
from torch import Tensor

from scaletrain.config.schema import Config
from scaletrain.core import Batch, Clock
from scaletrain.train.build import build

# optimizer steps of the run that the clock tells of
TOTAL = 20

# "losses" and the tensors of an engine's state by name, float64 on the CPU
State = dict[str, Tensor]
T = TypeVar("T")


def on_device(value: T, device: torch.device) -> T:
    """A Batch, or whatever one consists of, with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)  # type: ignore[return-value]
    if isinstance(value, tuple):
        return type(value)(on_device(item, device) for item in value)
    if isinstance(value, Batch):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(
            value, **{name: on_device(item, device) for name, item in fields.items()}
        )

    return value


def batch(config: Config, step: int, device: torch.device) -> Batch:
    """This rank's slice of the made-up batch of a step."""
    made: Batch = small.batch(config, step)
    return on_device(made, device)


def clock(step: int) -> Clock:
    return Clock(step, TOTAL, step // small.STEPS_PER_EPOCH, small.STEPS_PER_EPOCH)


def trained(config: Config, device: torch.device, steps: int) -> State:
    """Losses and state after so many steps, the start of an epoch (clustering) included."""
    engine = build(config, small.SAMPLES, small.STEPS_PER_EPOCH, device)
    losses = []

    def epoch() -> Iterator[Batch]:
        return (batch(config, 100 + i, device) for i in range(8))

    for step in range(steps):
        if step % small.STEPS_PER_EPOCH == 0:
            engine.method.on_epoch(
                clock(step),
                lambda embed, every=True, training=False: engine.features(
                    epoch(), embed, training=training
                ),
                engine.write,
            )
        rate = config.optim.lr
        losses.append(engine.step(batch(config, step, device), clock(step), rate, rate).loss)

    state = {name: piece.data.detach().cpu().double() for name, piece in engine.state().items()}
    return {"losses": torch.tensor(losses, dtype=torch.float64), **state}


def distance(a: State, b: State) -> float:
    """Norm of the difference of two states relative to that of the second; infinite if they do not
    have the same numbers, or some are not finite.
    """
    one, other = (torch.cat([x[name].flatten() for name in sorted(x)]) for x in (a, b))
    if one.shape != other.shape or not one.isfinite().all():
        return math.inf
    return float((one - other).norm() / other.norm())


def changed_by_skipped_step(config: Config, device: torch.device) -> set[str]:
    """Names of the tensors that differ after a step whose loss is not finite, which must leave no
    trace.

    Both states are of one run: two GPU runs of the same steps differ by rounding, since backward
    kernels add in any order.
    """
    engine = build(config, small.SAMPLES, small.STEPS_PER_EPOCH, device)
    rate = config.optim.lr
    engine.step(batch(config, 0, device), clock(0), rate, rate)
    before = {name: piece.data.clone() for name, piece in engine.state().items()}

    poisoned = batch(config, 1, device)
    poisoned.views[0][0, 0].fill_(math.nan)
    if not engine.step(poisoned, clock(1), rate, rate).skipped:
        return set(before)

    after = engine.state()
    return {name for name in before if not torch.equal(after[name].data, before[name])}
