"""LARS (You et al., 2017, arXiv 1708.03888) in the forms that self-supervised codes use, which are not equivalent.

For each parameter p with gradient g, trust ratio r, decay wd, momentum m and learning rate lr:

    norm "sum"    r = eta |p| / |g + wd p|                   BYOL, SimCLR, Barlow Twins, VICReg
    norm "parts"  r = eta |p| / (|g| + wd |p| + 1e-8)        apex LARC (SwAV), SuNCEt, solo-learn, EffSSL
                  r = 1 where |p| or |g| (in "sum": |g + wd p|) is zero; "parts" then does not decay either
    clip          r = min(r / lr, 1)                         solo-learn's clip_lr, LARC's clip
    outside       v = m v + r (g + wd p);       p = p - lr v      BYOL, LARC, Barlow Twins, VICReg
    inside        v = m v + lr r (g + wd p);    p = p - v         SimCLR, SuNCEt: another result whenever lr changes

A group with `adapt` False has r = 1. Two executions compute the same: fused kernels for float32 on the CPU, where
temporaries cost more than arithmetic, and foreach kernels elsewhere, where nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

_CHUNK = 1 << 18  # elements of one float32 dot product: exact to about 1e-6


class LARS(torch.optim.Optimizer):
    """Group keys: lr, momentum, weight_decay and adapt. State: `momentum_buffer` of each parameter, unless momentum is 0.

    Parameters must be float32 or float64 (ValueError): a bfloat16 weight does not move at these step sizes. A parameter
    without gradient is left alone, state included. Non-finite gradients spread into the parameters as in plain SGD.
    `trust` holds the ratios [n] of the last step's adapted parameters in group order, on their device.
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
        """`foreach` forces (True) the execution that is otherwise (None) used for everything but float32 on the CPU."""
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("eta", eta)):
            if not value >= 0:
                raise ValueError(f"LARS: {name} is {value}, it must be at least 0")
        if placement not in ("outside", "inside") or norm not in ("sum", "parts"):
            raise ValueError(f"LARS: placement is outside or inside, norm is sum or parts; got {placement!r}, {norm!r}")
        self.eta, self.clip, self.placement, self.norm, self.foreach = eta, clip, placement, norm, foreach
        self.trust = torch.empty(0)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "adapt": adapt})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"LARS: a parameter of shape {tuple(p.shape)} is {p.dtype}; keep parameters in float32 and use autocast"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        live = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        adapted = [(p, group) for group, params in live if group["adapt"] for p in params]
        decays = [0.0 if self.norm == "parts" else float(group["weight_decay"]) for _, group in adapted]
        norms = self.square_norms([p for p, _ in adapted], _grads([p for p, _ in adapted]), decays).sqrt()
        start, ratios = 0, [norms[0, :0]]
        for group, params in live:
            scale = None
            if group["adapt"]:
                trust, scale = self._ratios(group, norms[:, start : start + len(params)])
                ratios.append(trust)
                start += len(params)
            if params:
                buffers = [self._buffer(p) for p in params] if group["momentum"] else []
                fused = not self.foreach and all(p.is_cpu and p.dtype == torch.float32 and _dense(p) for p in params)
                (self._update_fused if fused else self._update_foreach)(group, params, _grads(params), buffers, scale)
        self.trust = torch.cat(ratios)
        return loss

    def square_norms(self, params: list[Tensor], grads: list[Tensor], decays: list[float]) -> Tensor:
        """[2, n]: |p|^2 and |g + decay p|^2 of all adapted parameters of a step, in one place.

        They are sums over elements: an optimizer over shards adds them up across ranks with a single all-reduce.
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

    def _buffer(self, p: Tensor) -> Tensor:
        """The momentum of p, in p's memory layout even after a restore: the fused kernel reads raw memory."""
        state = self.state[p]
        old = state.get("momentum_buffer")
        if old is None:
            state["momentum_buffer"] = torch.zeros_like(p)
        elif not _same_layout(p, old):
            state["momentum_buffer"] = torch.empty_like(p).copy_(old)
        return state["momentum_buffer"]  # type: ignore[no-any-return]

    def _update_foreach(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], scale: Tensor | None
    ) -> None:
        lr, inside = group["lr"], self.placement == "inside"
        moves = grads
        if group["weight_decay"]:
            moves = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        if scale is not None:
            moves = list(torch._foreach_mul(moves, list(scale.unbind())))
        if not buffers:
            torch._foreach_add_(params, moves, alpha=-lr)
            return
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, moves, alpha=lr if inside else 1)
        torch._foreach_add_(params, buffers, alpha=-1 if inside else -lr)

    def _update_fused(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], scale: Tensor | None
    ) -> None:
        """One pass over memory by torch's SGD kernel, whose 1 - dampening is just a factor of the decayed gradient."""
        grads = [g if _same_layout(p, g) else torch.empty_like(p).copy_(g) for p, g in zip(params, grads, strict=True)]
        lr, momentum = group["lr"], group["momentum"]
        for i, one in enumerate([1.0] if scale is None else scale.tolist()):
            rows = slice(None) if scale is None else slice(i, i + 1)
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
    """The same element at the same place in memory. Strides alone do not tell: those of dimensions of size 1 are free."""
    if x.is_contiguous():
        return y.is_contiguous()
    return x.stride() == y.stride() or (x.ndim == 4 and all(z.is_contiguous(memory_format=torch.channels_last) for z in (x, y)))


def _square_norms_cpu(params: list[Tensor], grads: list[Tensor], decays: list[float]) -> Tensor:
    """As LARS.square_norms, float64 [2, n]. torch's own float32 norm of 2 million elements is wrong by 3e-5 on a CPU."""
    squares = torch.zeros(2, len(params), dtype=torch.float64)
    for i, (p, g, decay) in enumerate(zip(params, grads, decays, strict=True)):
        pp = gg = pg = 0.0
        for a, b in zip(*_chunks(p, g), strict=True):
            pp += torch.dot(a, a).item()
            gg += torch.dot(b, b).item()
            pg += torch.dot(a, b).item() if decay else 0.0
        moved = gg + decay * (2 * pg + decay * pp)
        if moved < 0.1 * gg:  # the terms cancel: form the sum itself
            moved = torch.add(g, p, alpha=decay).double().square().sum().item()
        squares[0, i], squares[1, i] = pp, moved
    return squares


def _chunks(p: Tensor, g: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Both flat, in one element order and on cache lines, without a copy if memory allows.

    BLAS rounds by alignment, and DDP's buckets put a gradient elsewhere after a resume: a copy keeps that exact.
    """
    dense = _dense(p) and _same_layout(p, g)
    flat = [x.as_strided((x.numel(),), (1,)) if dense else x.reshape(-1) for x in (p, g)]
    a, b = (torch.split(x.clone() if x.data_ptr() % 64 else x, _CHUNK) for x in flat)
    return a, b
