"""The operator of cross-rank batch normalisation, forward and backward; its module is in norm.py.

It is registered with torch as a custom operator, so that torch.compile sees no graph break. Every
layer sends one message in each direction, whose size does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scaletrain import dist

# mean, biased variance, values per statistic
Stats = tuple[Tensor, Tensor, Tensor]


def layout(rows: int, n_views: int, group: int) -> tuple[int, int, int]:
    """Rows [V * b] that share a statistic on this rank, and which of how many cross-rank slots they
    belong to.

    Ranks of one slot add up their sums; 0 slots: every statistic is complete on its rank and
    nothing is sent.
    """
    rows, rest = divmod(rows, n_views)
    whole = rows * dist.world()

    if rest:
        raise ValueError(
            f"{rows * n_views + rest} rows are not {n_views} views of equally many samples"
        )
    if group in (0, whole):
        return rows, 0, 1 if dist.world() > 1 else 0
    if rows % group == 0:
        return group, 0, 0
    if group % rows == 0 and whole % group == 0:
        return rows, dist.rank() // (group // rows), whole // group

    raise ValueError(
        f"model.norm_group={group} does not fit {rows} samples per rank in a global batch of "
        f"{whole}: it must divide the one "
        "or be a multiple of it that divides the other; 0 normalises over the whole batch"
    )


def _reduce(sums: Tensor, slot: int, slots: int) -> Tensor:
    """Sums [n] over the ranks of this rank's slot, in one collective."""
    if not slots:
        return sums

    table = sums.new_zeros(slots, sums.numel())
    table[slot] = sums
    return dist.sum_nograd(table)[slot]


def _local_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of one piece in float32, or float64 for float64 input."""
    if x.is_cuda:
        mean, invstd = torch.batch_norm_stats(x, eps)
        return mean, invstd**-2 - eps

    # The ignored running statistics only make a bfloat16 input return float32.
    zero = torch.zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    mean, var = torch.batch_norm_update_stats(x, zero, zero, 0.0)
    return mean, var


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    if x.is_cuda:
        return torch.batch_norm_elemt(x, weight, bias, mean, (var + eps).rsqrt(), eps)
    return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@torch.library.custom_op("scaletrain::batch_norm", mutates_args=())
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n_views: int,
    group: int,
    eps: float,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [V * b, C, *spatial] -> y like x, mean [S, C], biased variance [S, C], values per statistic
    (0-d float64).

    The statistics are those of x, or those that are given.
    """
    rows, slot, slots = layout(x.shape[0], n_views, group)
    pieces = x.split(rows)

    if mean is None or var is None or count is None:
        mean, var, count = _stats(pieces, slot, slots, eps)
    else:
        # an operator's output is never its input
        mean, var, count = mean.clone(), var.clone(), count.clone()

    y = _join(
        [_affine(p, weight, bias, m, v, eps) for p, m, v in zip(pieces, mean, var, strict=True)]
    )
    return y, mean, var, count


def _stats(pieces: Sequence[Tensor], slot: int, slots: int, eps: float) -> Stats:
    local = [_local_stats(piece, eps) for piece in pieces]
    mean, var = torch.stack([m for m, _ in local]), torch.stack([v for _, v in local])
    count = torch.full(
        (1,), pieces[0].numel() // pieces[0].shape[1], dtype=torch.float64, device=mean.device
    )

    if slots:
        # In float64, E[x^2] - E[x]^2 loses nothing that float32 had, and the message does not grow
        # with the ranks.
        m, v = mean.double(), var.double()
        sums = _reduce(
            torch.cat([(m * count).flatten(), ((v + m * m) * count).flatten(), count]), slot, slots
        )
        count = sums[-1:].clone()
        m, square = (sums[:-1] / count).view(2, *mean.shape)
        mean, var = m.to(mean.dtype), (square - m * m).clamp_min(0).to(var.dtype)

    return mean, var, count.squeeze(0)


@torch.library.custom_op("scaletrain::batch_norm_backward", mutates_args=())
def _batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    n_views: int,
    group: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, scale and shift (the latter two of this rank's samples: engines average
    over ranks).
    """
    rows, slot, slots = layout(x.shape[0], n_views, group)
    invstd = (var + eps).rsqrt()
    parts = list(zip(dy.split(rows), x.split(rows), mean, var, invstd, strict=True))

    # complete on this rank: torch's own kernel does it in one call
    if not slots and not x.is_cuda:
        native = torch.ops.aten.native_batch_norm_backward
        done = [
            native(g, p, weight, None, None, m, i, True, eps, [True, True, True])
            for g, p, m, _, i in parts
        ]

        return (
            _join([d[0] for d in done]),
            torch.stack([d[1] for d in done]).sum(0),
            torch.stack([d[2] for d in done]).sum(0),
        )

    local = torch.stack(
        [torch.stack(_backward_sums(g, p, m, v, i, eps)) for g, p, m, v, i in parts]
    )  # [S, 2, C]
    total = _reduce(local.double().flatten(), slot, slots).view_as(local) / count
    dx = [
        _backward_input(g, p, weight, m, v, i, t[0], t[1], eps)
        for (g, p, m, v, i), t in zip(parts, total.to(mean.dtype), strict=True)
    ]
    dw, db = local.sum(0).flip(0)

    return _join(dx), dw.clone(), db.clone()


def _backward_sums(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, invstd: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Sum of dy and of dy * normalised x over one piece, [C] each."""
    if x.is_cuda:
        sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
            dy, x, mean, invstd, None, True, False, False
        )
        return sum_dy, sum_dy_xmu * invstd

    native = torch.ops.aten.native_batch_norm_backward
    _, dw, db = native(dy, x, None, mean, var, mean, invstd, False, eps, [False, True, True])
    return db, dw


def _backward_input(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    invstd: Tensor,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
    eps: float,
) -> Tensor:
    """scale * invstd * (dy - mean(dy) - xhat * mean(dy * xhat)), the means over the whole group."""
    if x.is_cuda:
        # the sums are divided by the count already
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(
            dy, x, mean, invstd, weight, mean_dy, mean_dy_xhat / invstd, one
        )

    native = torch.ops.aten.native_batch_norm_backward
    dx: Tensor = native(dy, x, weight, mean, var, mean, invstd, False, eps, [True, False, False])[0]
    scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    return dx.add_(
        _affine(x, -scale * invstd * mean_dy_xhat, -scale * invstd * mean_dy, mean, var, eps)
    )


@batch_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n_views: int,
    group: int,
    eps: float,
    *given: Tensor | None,
) -> tuple[Tensor, ...]:
    rows, _, _ = layout(x.shape[0], n_views, group)
    stat = x.new_empty(
        x.shape[0] // rows, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return torch.empty_like(x), stat, torch.empty_like(stat), x.new_empty((), dtype=torch.float64)


@_batch_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(mean[0]), torch.empty_like(mean[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *layout = inputs
    ctx.layout = layout[:3]
    ctx.biased = bias is not None
    ctx.save_for_backward(x, weight, *output[1:])


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mean, var, count = ctx.saved_tensors
    dy = dy.contiguous(
        memory_format=torch.channels_last if _channels_last(x) else torch.contiguous_format
    )
    dx, dw, db = _batch_norm_backward(dy, x, weight, mean, var, count, *ctx.layout)
    scale, shift = (
        dw.to(weight.dtype) if weight is not None else None,
        db.to(mean.dtype) if ctx.biased else None,
    )

    return dx, scale, shift, *(None,) * 6


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


torch.library.register_autograd("scaletrain::batch_norm", _backward, setup_context=_save)
