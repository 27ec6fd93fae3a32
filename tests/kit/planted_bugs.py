"""Planted bugs: each is a mistake that real libraries have shipped. The parity suite must turn red
under every one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from scaletrain import dist
from scaletrain.engines import base, ddp, fairscale
from scaletrain.nn import bank, batch_norm, norm
from scaletrain.ops import kmeans, sinkhorn
from scaletrain.optim import lars


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
    whole = lars._flat

    def part(p: torch.Tensor, g: torch.Tensor) -> Any:
        def own(x: torch.Tensor) -> torch.Tensor:
            return x[
                dist.rank() * len(x) // dist.world() : (dist.rank() + 1) * len(x) // dist.world()
            ]

        return whole(own(p), own(g))

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(lars, "_flat", part))
    for engine in (base.Engine, fairscale.Engine):  # where it is not summed up over ranks either
        stack.enter_context(mock.patch.object(engine, "total", lambda self, x: x))
    return stack


def local_batch_norm() -> Any:
    """Statistics of the rank's own samples."""
    layout = batch_norm.layout
    return mock.patch.object(
        batch_norm, "layout", lambda rows, views, group: (layout(rows, views, group)[0], 0, 0)
    )


def ema_before_step() -> Any:
    """The target follows the online network of before the step."""

    def early(self: base.Engine, clock: Any, gradient: Any, lr: float, base_lr: float) -> None:
        self.move_targets()
        with mock.patch.object(self, "move_targets"):
            apply(self, clock, gradient, lr, base_lr)

    apply = base.Engine._apply
    return mock.patch.object(base.Engine, "_apply", early)


def last_micro_batch_not_summed() -> Any:
    """Gradients are summed over ranks within the first micro-batch, and those of the last stay each
    rank's own.
    """
    right = ddp.Engine.synchronised
    return mock.patch.object(
        ddp.Engine, "synchronised", lambda self, *, last: right(self, last=not last)
    )


def statistics_per_micro_batch() -> Any:
    """Running statistics move with every micro-batch, though which samples it holds depends on the
    ranks.
    """
    right = norm.BatchNorm.commit
    return mock.patch.object(norm.BatchNorm, "commit", lambda self, parts: right(self))


def queue_per_micro_batch() -> Any:
    """Keys enter the queue micro-batch by micro-batch, so that their order depends on the ranks."""
    right = bank.Queue.commit
    return mock.patch.object(bank.Queue, "commit", lambda self, parts: right(self))


def keys_shuffled_within_a_rank() -> Any:
    """ShuffleBN that sends nothing: the groups hold the rank's own samples again."""

    def local(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        own = order[order // len(x) == dist.rank()]
        return x[own - dist.rank() * len(x)]

    return mock.patch.object(dist, "permute_nograd", local)


def _alone(where: Any, name: str, collective: str) -> Any:
    """A function whose collective hands back what it is given."""
    right = getattr(where, name)

    def local(*args: Any) -> Any:
        with mock.patch.object(dist, collective, lambda x: x):
            return right(*args)

    return mock.patch.object(where, name, local)


def codes_balanced_within_a_rank() -> Any:
    """Sinkhorn-Knopp gives every prototype the same mass of the rank's own samples."""
    return _alone(sinkhorn, "_log_mass", "sum_nograd")


def clusters_of_own_samples() -> Any:
    """K-means moves its centroids to the means of the rank's own samples."""
    return _alone(kmeans, "group_sums", "sum_nograd")


def memory_of_own_samples() -> Any:
    """A sample's row is written only where the rank that saw it owns it."""
    return _alone(bank.Bank, "_write", "gather_nograd")


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
        queue_per_micro_batch,
        keys_shuffled_within_a_rank,
        codes_balanced_within_a_rank,
        clusters_of_own_samples,
        memory_of_own_samples,
    )
}
