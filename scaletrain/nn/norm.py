"""Batch normalisation over groups of the *global* batch: the same function of it on any number of
devices.

`group = 0` is cross-rank batch norm over the whole batch; `group = G` normalises every G
consecutive samples of the global batch by themselves (G = 32 is the per-GPU norm of MoCo's eight
GPUs). All views of one size go through in one forward [V * B, C, ...]; statistics are per view, [V,
C], in one collective per layer and direction. Unequal slices per rank are exact for `group = 0`.
The operator itself is in batch_norm.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain import dist, rng
from scaletrain.core import DeferredState
from scaletrain.nn.batch_norm import Stats, batch_norm

# share of a step's statistics in the running ones
MOMENTUM = 0.1

_views, _rows = 1, 1

# the first run of what backward runs again leaves its statistics here
_noted: list[Stats] | None = None
# and the second takes them
_given: Iterator[Stats] | None = None


@contextmanager
def views(count: int, rows: int = 1) -> Iterator[None]:
    """A context in which the leading axis of every input consists of `count` views of equally many
    samples, each with statistics of its own.

    `rows`: consecutive rows that are one sample, so that groups are counted in samples.
    """
    global _views, _rows

    before = _views, _rows
    _views, _rows = count, rows
    try:
        yield
    finally:
        _views, _rows = before


def per_view(module: nn.Module, x: Tensor) -> Tensor:
    """[V, B, ...] -> [V, B, D] in one forward, as if each view were forwarded alone (BYOL, SimSiam,
    VICReg, ReLICv2).
    """
    with views(len(x)):
        out: Tensor = module(x.flatten(0, 1))

    return out.view(*x.shape[:2], *out.shape[1:])


def pooled(module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """[V, B, ...] -> [V, B, D] with statistics shared by all views (SimCLR, SwAV).

    call: the function to be called in place of the module, which is a part of it.
    """
    call = call or module

    if not any(isinstance(m, BatchNorm) and m.group for m in module.modules()):
        out: Tensor = call(x.flatten(0, 1))
        return out.view(*x.shape[:2], *out.shape[1:])

    # A group is G samples with all their views: neighbours only where the sample is the slow axis.
    with views(1, rows=len(x)):
        out = call(x.transpose(0, 1).flatten(0, 1))

    return out.view(x.shape[1], len(x), *out.shape[1:]).transpose(0, 1)


def replayed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for the first run of a forward and for its runs in backward (`context_fn` of
    torch.utils.checkpoint).

    The later ones take the statistics of the first: the same numbers, and nothing is sent or staged
    a second time.
    """
    stats: list[Stats] = []

    return _Run(stats, None, _views, _rows), _Run(None, stats, _views, _rows)


class _Run:
    """A context that may be entered again, since each of several backward passes over one graph
    runs the forward pass once more.
    """

    def __init__(
        self, noted: list[Stats] | None, given: list[Stats] | None, n_views: int, rows: int
    ) -> None:
        self.noted, self.given, self.views, self.rows = noted, given, n_views, rows

    def __enter__(self) -> None:
        global _noted, _given, _views, _rows
        self.before = _noted, _given, _views, _rows
        _noted, _given = self.noted, None if self.given is None else iter(self.given)
        _views, _rows = self.views, self.rows

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _noted, _given, _views, _rows
        _noted, _given, _views, _rows = self.before


@torch.no_grad()
def shuffled(module: nn.Module, x: Tensor, *key: int | str) -> Tensor:
    """per_view without gradient, on the global batch in an order that depends on the key; the
    result is in the original order.

    The groups of batch norm then hold other samples than in the other network: MoCo's ShuffleBN
    (section 3.3), which keeps statistics from telling a query which keys belong to its group.
    """
    order = rng.permutation(x.shape[1] * dist.world(), "shuffle", *key)
    y = per_view(module, dist.permute_nograd(x.transpose(0, 1), order).transpose(0, 1))

    return dist.permute_nograd(y.transpose(0, 1), order.argsort()).transpose(0, 1)


class BatchNorm(DeferredState):
    """Batch norm of [V * B, C, *spatial] with torchvision's parameter names; running statistics are
    staged.

    A step with V views moves the running statistics V times, in closed form. eps 1e-5, momentum .1
    as the papers' .9 decay, by default.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        features: int,
        *,
        scale: bool = True,
        shift: bool = True,
        group: int = 0,
        eps: float = 1e-5,
        momentum: float = MOMENTUM,
    ) -> None:
        super().__init__()
        self.group, self.eps, self.momentum = group, eps, momentum
        self.weight = nn.Parameter(torch.ones(features)) if scale else None
        self.bias = nn.Parameter(torch.zeros(features)) if shift else None
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

        # (mean, var, samples per statistic, views)
        self.staged: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )

        y: Tensor
        given = (None, None, None) if _given is None else next(_given)
        y, mean, var, count = batch_norm(
            x, self.weight, self.bias, _views, self.group * _rows, self.eps, *given
        )

        if _given is None:
            stats = mean.detach(), var.detach(), count
            self.staged.append((*stats, _views))
            if _noted is not None:
                _noted.append(stats)

        return y

    @torch.no_grad()
    def commit(self, parts: int = 1) -> None:
        calls = len(self.staged) // parts
        for call in range(calls):
            same = self.staged[call::calls]
            count, n_views = same[0][2:]
            # Groups of one view are averaged, as are those of other micro-batches and ranks: which
            # holds which, is chance.
            groups = [
                torch.stack([mean, var]).unflatten(1, (n_views, -1)) for mean, var, *_ in same
            ]  # [2, V, G, C] each
            stats = torch.cat(groups, 2).mean(2)
            # unbiased
            stats[1] *= (count / (count - 1).clamp_min(1)).to(stats)

            if self.group and dist.world() > 1:
                stats = dist.sum_nograd(stats) / dist.world()

            decay = (1 - self.momentum) ** torch.arange(
                n_views - 1, -1, -1, device=stats.device, dtype=stats.dtype
            )
            new = self.momentum * (stats * decay[:, None]).sum(1)
            keep = (1 - self.momentum) ** n_views
            self.running_mean.mul_(keep).add_(new[0])
            self.running_var.mul_(keep).add_(new[1])
            self.num_batches_tracked.add_(n_views)

        self.staged.clear()

    def discard(self) -> None:
        self.staged.clear()
