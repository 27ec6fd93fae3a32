"""Planted bugs: each is a mistake that real libraries have shipped. The parity suite must turn red under every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from scaletrain import dist
from scaletrain.engines import base, ddp
from scaletrain.nn import norm
from scaletrain.optim.lars import LARS


def lost_gather_gradient() -> Any:
    """Negatives of other ranks carry no gradient."""
    return mock.patch.object(dist, "gather", dist.gather_nograd)


def allreduce_without_autograd() -> Any:
    """A sum over ranks in the forward pass whose backward stays local."""

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return dist.sum_nograd(x)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    return mock.patch.object(dist, "psum", Straight.apply)


def local_norm() -> Any:
    """Trust ratios from the part of each tensor that a rank would hold under sharding."""
    whole = LARS.square_norms

    def part(self: LARS, params: Any, grads: Any, decays: Any) -> torch.Tensor:
        def own(x: torch.Tensor) -> torch.Tensor:
            return x[dist.rank() * len(x) // dist.world() : (dist.rank() + 1) * len(x) // dist.world()]

        return whole(self, [own(p) for p in params], [own(g) for g in grads], decays)

    return mock.patch.object(LARS, "square_norms", part)


def local_batch_norm() -> Any:
    """Statistics of the rank's own samples."""
    layout = norm._layout
    return mock.patch.object(norm, "_layout", lambda rows, views, group: (layout(rows, views, group)[0], 0, 0))


def ema_before_step() -> Any:
    """The target follows the online network of before the step."""

    def early(self: base.Engine, clock: Any, gradient: Any, lr: float, base_lr: float) -> None:
        self.move_targets(clock)
        with mock.patch.object(self, "move_targets"):
            apply(self, clock, gradient, lr, base_lr)

    apply = base.Engine._apply
    return mock.patch.object(base.Engine, "_apply", early)


def last_micro_batch_not_summed() -> Any:
    """Gradients are summed over ranks within the first micro-batch, and those of the last stay each rank's own."""
    right = ddp.Engine.synchronised
    return mock.patch.object(ddp.Engine, "synchronised", lambda self, *, last: right(self, last=not last))


def statistics_per_micro_batch() -> Any:
    """Running statistics move with every micro-batch, though which samples it holds depends on the ranks."""
    right = norm.BatchNorm.commit
    return mock.patch.object(norm.BatchNorm, "commit", lambda self, parts: right(self))


BUGS: dict[str, Callable[[], Any]] = {
    f.__name__: f
    for f in (
        lost_gather_gradient,
        allreduce_without_autograd,
        local_norm,
        local_batch_norm,
        ema_before_step,
        last_micro_batch_not_summed,
        statistics_per_micro_batch,
    )
}
