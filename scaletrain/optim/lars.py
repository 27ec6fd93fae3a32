"""LARS (You et al., 2017, arXiv 1708.03888) in the forms that self-supervised codes use, which are
not equivalent.

For each parameter p with gradient g, trust ratio r, decay wd, momentum m and learning rate lr:

    norm "sum"    r = eta |p| / |g + wd p|                   BYOL, SimCLR, Barlow Twins, VICReg
    norm "parts"  r = eta |p| / (|g| + wd |p| + 1e-8)        apex LARC (SwAV), SuNCEt, solo-learn
                  r = 1 where |p| or |g| (in "sum": |g + wd p|) is zero; "parts" then does not decay
                  either
    clip          r = min(r / lr, 1)                         solo-learn's clip_lr, LARC's clip
    outside       v = m v + r (g + wd p);       p = p - lr v      BYOL, LARC, Barlow Twins, VICReg
    inside        v = m v + lr r (g + wd p);    p = p - v         SimCLR, SuNCEt: differs where lr
                                                                  changes

A group with `adapt` False has r = 1. Two executions compute the same: fused kernels for float32 on
the CPU, where memory costs more than arithmetic, and foreach kernels elsewhere, where nothing waits
for the device. On a CPU that holds whole parameters each is updated right after its norm, while the
cache still holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from numpy import float64
from torch import Tensor
from torch.optim.optimizer import ParamsT

from scaletrain.runtime.jit import summed

# groups with their parameters that have a gradient
Live = list[tuple[dict[str, Any], list[Tensor]]]
# by which each decayed gradient is multiplied: numbers on a CPU, else 0-d tensors; None: not at all
Scales = list[Any] | None


class LARS(torch.optim.Optimizer):
    """Group keys: lr, momentum, weight_decay and adapt. State: `momentum_buffer` of each parameter,
    unless momentum is 0.

    Parameters must be float32 or float64 (ValueError): a bfloat16 weight does not move at these
    step sizes. A parameter without gradient is left alone, state included. Non-finite gradients
    spread into the parameters as in plain SGD. `trust` holds the ratios [n] of the last step's
    adapted parameters in group order, on their device.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        adapt: bool = True,
        eta: float = 1e-3,
        clip: bool = False,
        placement: Literal["outside", "inside"] = "outside",
        norm: Literal["sum", "parts"] = "sum",
        foreach: bool | None = None,
    ) -> None:
        """`foreach` forces (True) the execution that is otherwise (None) used for everything but
        float32 on the CPU.
        """
        for name, value in (
            ("lr", lr),
            ("momentum", momentum),
            ("weight_decay", weight_decay),
            ("eta", eta),
        ):
            if not value >= 0:
                raise ValueError(f"LARS: {name} is {value}, it must be at least 0")

        if placement not in ("outside", "inside") or norm not in ("sum", "parts"):
            raise ValueError(
                f"LARS: placement is outside or inside, norm is sum or parts; got {placement!r}, "
                f"{norm!r}"
            )

        self.eta, self.clip, self.placement, self.norm, self.foreach = (
            eta,
            clip,
            placement,
            norm,
            foreach,
        )
        self.trust = torch.empty(0)
        # sums over ranks, where they hold different parts of a parameter
        self.total: Callable[[Tensor], Tensor] | None = None

        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "adapt": adapt}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"LARS: a parameter of shape {tuple(p.shape)} is {p.dtype}; keep parameters in "
                    "float32 and use autocast"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        live = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        whole = (
            self.total is None
            and not self.foreach
            and all(p.is_cpu for _, params in live for p in params)
        )

        self.trust = self._advance_each(live) if whole else self._advance(live)
        return loss

    def _advance(self, live: Live) -> Tensor:
        """All norms in one place, then all updates -> the trust ratios of the adapted
        parameters.
        """
        adapted = [(p, group) for group, params in live if group["adapt"] for p in params]
        decays = [self._normed_decay(group) for _, group in adapted]
        norms = self.square_norms([p for p, _ in adapted], _grads([p for p, _ in adapted]), decays)

        if adapted and self.total is not None:
            norms = self.total(norms)

        norms = norms.sqrt()
        start, ratios = 0, [norms[0, :0]]
        for group, params in live:
            scales = None
            if group["adapt"]:
                trust, scale = self._ratios(group, norms[:, start : start + len(params)])
                ratios.append(trust)
                scales = scale.tolist() if scale.is_cpu else list(scale.unbind())
                start += len(params)

            self._update(group, params, scales)

        return torch.cat(ratios)

    def _advance_each(self, live: Live) -> Tensor:
        """As _advance, one parameter after the other."""
        ratios = []
        for group, params in live:
            if not group["adapt"]:
                self._update(group, params, None)
                continue

            decay = self._normed_decay(group)
            for p in params:
                size, grad = _squares(*_flat(p, *_grads([p])), decay)
                trust, scale = self._ratio(group, math.sqrt(size), math.sqrt(grad))
                ratios.append(trust)
                self._update(group, [p], [scale])

        return torch.tensor(ratios, dtype=torch.float64)

    def _normed_decay(self, group: dict[str, Any]) -> float:
        """The decay inside the gradient's norm."""
        return 0.0 if self.norm == "parts" else float(group["weight_decay"])

    def square_norms(
        self, params: list[Tensor], grads: list[Tensor], decays: list[float]
    ) -> Tensor:
        """[2, n]: |p|^2 and |g + decay p|^2 of all adapted parameters of a step, in one place.

        They are sums over elements: where the parameters are shards, `total` adds them up over
        ranks in a single all-reduce.
        """
        if not params:
            return torch.zeros(2, 0)
        if params[0].is_cpu and not self.foreach:
            return _square_norms_cpu(params, grads, decays)

        if any(decays):
            moved = list(torch._foreach_mul(params, decays))
            torch._foreach_add_(moved, grads)
            grads = moved

        return torch.stack([torch.stack(torch._foreach_norm(x)) for x in (params, grads)]).square()

    def _ratios(self, group: dict[str, Any], norms: Tensor) -> tuple[Tensor, Tensor]:
        """Norms [2, n] -> trust ratios [n] and what g + wd p is multiplied by [n]."""
        size, grad = norms
        parts = self.norm == "parts"
        trust = self.eta * size / (grad + group["weight_decay"] * size + 1e-8 if parts else grad)

        if self.clip:
            trust = (trust / group["lr"]).clamp(max=1.0)

        trust = torch.where((size == 0) | (grad == 0), 1.0, trust)
        # with g = 0 the decay is all there is: 0 drops it, as LARC does
        return trust, torch.where(grad == 0, 0.0, trust) if parts else trust

    def _ratio(self, group: dict[str, Any], size: float, grad: float) -> tuple[float, float]:
        """As _ratios, of one parameter: tensors of one element would cost more than its update."""
        parts, lr = self.norm == "parts", group["lr"]
        if size == 0 or grad == 0:
            return 1.0, 0.0 if parts and grad == 0 else 1.0

        trust = self.eta * size / (grad + group["weight_decay"] * size + 1e-8 if parts else grad)
        if self.clip:
            trust = min(trust / lr, 1.0) if lr else 1.0

        return trust, trust

    def _buffer(self, p: Tensor) -> Tensor:
        """The momentum of p, in p's memory layout even after a restore: the fused kernel reads raw
        memory.
        """
        state = self.state[p]
        old = state.get("momentum_buffer")

        if old is None:
            state["momentum_buffer"] = torch.zeros_like(p)
        elif not _same_layout(p, old):
            state["momentum_buffer"] = torch.empty_like(p).copy_(old)

        return state["momentum_buffer"]  # type: ignore[no-any-return]

    def _update(self, group: dict[str, Any], params: list[Tensor], scales: Scales) -> None:
        if params:
            buffers = [self._buffer(p) for p in params] if group["momentum"] else []
            fused = not self.foreach and all(
                p.is_cpu and p.dtype == torch.float32 and _dense(p) for p in params
            )
            (self._update_fused if fused else self._update_foreach)(
                group, params, _grads(params), buffers, scales
            )

    def _update_foreach(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor],
        scales: Scales,
    ) -> None:
        lr, inside = group["lr"], self.placement == "inside"
        moves = grads
        if group["weight_decay"]:
            moves = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))

        if scales is not None:
            moves = list(torch._foreach_mul(moves, scales))

        if not buffers:
            torch._foreach_add_(params, moves, alpha=-lr)
            return

        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, moves, alpha=lr if inside else 1)
        torch._foreach_add_(params, buffers, alpha=-1 if inside else -lr)

    def _update_fused(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor],
        scales: Scales,
    ) -> None:
        """One pass over memory by torch's SGD kernel, whose 1 - dampening is just a factor of the
        decayed gradient.
        """
        grads = [
            g if _same_layout(p, g) else torch.empty_like(p).copy_(g)
            for p, g in zip(params, grads, strict=True)
        ]
        lr, momentum = group["lr"], group["momentum"]

        for i, one in enumerate([1.0] if scales is None else scales):
            rows = slice(None) if scales is None else slice(i, i + 1)
            factor, rate = (lr * one, 1.0) if self.placement == "inside" else (one, lr)
            if not buffers:
                factor, rate = 1.0, factor * rate

            torch._fused_sgd_(
                params[rows],
                grads[rows],
                buffers[rows],
                weight_decay=group["weight_decay"],
                momentum=momentum,
                lr=rate,
                dampening=1.0 - factor,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )


def _grads(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _same_layout(x: Tensor, y: Tensor) -> bool:
    """The same element at the same place in memory. Strides alone do not tell: those of dimensions
    of size 1 are free.
    """
    if x.is_contiguous():
        return y.is_contiguous()

    return x.stride() == y.stride() or (
        x.ndim == 4 and all(z.is_contiguous(memory_format=torch.channels_last) for z in (x, y))
    )


def _square_norms_cpu(params: list[Tensor], grads: list[Tensor], decays: list[float]) -> Tensor:
    """As LARS.square_norms, float64 [2, n]. torch's own float32 norm of 2 million elements is wrong
    by 3e-5 on a CPU.
    """
    pairs = [
        _squares(*_flat(p, g), decay) for p, g, decay in zip(params, grads, decays, strict=True)
    ]

    return torch.tensor(list(zip(*pairs, strict=True)), dtype=torch.float64)


def _flat(p: Tensor, g: Tensor) -> tuple[Any, Any]:
    """Both flat, in one element order, without a copy if memory allows."""
    dense = _dense(p) and _same_layout(p, g)
    a, b = (x.as_strided((x.numel(),), (1,)) if dense else x.reshape(-1) for x in (p, g))
    return a.detach().numpy(), b.detach().numpy()


@summed
def _squares(p: Any, g: Any, decay: float) -> tuple[float, float]:
    """|p|^2 and |g + decay p|^2 in float64, in one pass over memory.

    Nothing depends on where the two lie: DDP's buckets put a gradient elsewhere after a resume,
    which must not change a bit.
    """
    size = grad = 0.0

    for i in range(p.size):
        a, b = float64(p[i]), float64(g[i])
        size += a * a
        grad += (b + decay * a) ** 2

    return size, grad
