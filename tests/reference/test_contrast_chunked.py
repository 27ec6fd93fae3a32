"""The contrastive loss in blocks of rows against a dense float64 transcription: value, gradient,
size, ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kit import ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaletrain import dist
from scaletrain.ops import contrastive
from scaletrain.ops.contrastive import info_nce, nt_xent

B, D = 24, 6


def dense(
    rows: Tensor,
    candidates: Tensor,
    positive: Tensor,
    temperature: float,
    excluded: Tensor | None = None,
) -> Tensor:
    """The formula with all similarities at once: mean of -log(e^s+ / sum e^s)."""
    s = rows @ candidates.T / temperature
    if excluded is not None:
        s = s.masked_fill(F.one_hot(excluded, len(candidates)).bool(), float("-inf"))
    return (s.logsumexp(1) - s.gather(1, positive[:, None])[:, 0]).mean()


def dense_nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    rows = F.normalize(torch.cat([a, b]), dim=1)
    place = torch.arange(len(rows))
    return 2 * dense(rows, rows, place.roll(len(a)), temperature, place)


def inputs(
    n: int, candidates: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n)
    rows, others = (
        torch.randn(k, D, generator=draw, dtype=torch.float64).to(dtype) for k in (n, candidates)
    )
    positive = torch.randperm(candidates, generator=draw)[:n]
    return rows.requires_grad_(), others.requires_grad_(), positive, (positive + 1) % candidates


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    a = torch.randn(B, D, generator=draw, dtype=torch.float64)
    b = a + 0.7 * torch.randn(B, D, generator=draw, dtype=torch.float64)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def agree(
    loss: Tensor, wanted: Tensor, found: list[Tensor], exact: list[Tensor], tolerance: float
) -> None:
    """Value relative to itself, gradients relative to their norm."""
    assert abs(loss.item() - wanted.item()) <= tolerance * abs(wanted.item())
    for x, y in zip(
        torch.autograd.grad(loss, found), torch.autograd.grad(wanted, exact), strict=True
    ):
        assert (x.double() - y).norm() <= tolerance * y.norm()


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "BLOCK", 1)  # so that a block has 16 rows


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
@pytest.mark.parametrize("rows", [5, 16, 37])
@pytest.mark.parametrize("exclude", [False, True])
def test_value_and_gradient(
    dtype: torch.dtype, tolerance: float, temperature: float, rows: int, exclude: bool
) -> None:
    x, y, positive, other = inputs(rows, 40, dtype)
    exact, excluded = doubled(x, y), other if exclude else None
    loss = info_nce(x, y, positive, temperature, excluded)
    agree(
        loss, dense(exact[0], exact[1], positive, temperature, excluded), [x, y], exact, tolerance
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_nt_xent(dtype: torch.dtype, tolerance: float) -> None:
    a, b = pair(dtype)
    exact = doubled(a, b)
    agree(nt_xent(a, b, 0.1), dense_nt_xent(exact[0], exact[1], 0.1), [a, b], exact, tolerance)


def test_gradcheck() -> None:
    x, y, positive, excluded = inputs(19, 21)
    assert torch.autograd.gradcheck(lambda x, y: info_nce(x, y, positive, 0.4, excluded), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.4), pair())


def test_a_small_loss_keeps_its_digits() -> None:
    """Where all rows are told apart, log(1 + small) in float32 would be 0."""
    x = 30 * torch.eye(D)
    loss = info_nce(x, torch.eye(D), torch.arange(D), 1.0)
    assert loss.item() == pytest.approx(math.log1p(5 * math.exp(-30)), rel=1e-5, abs=0)


def test_parts_without_gradient() -> None:
    x, y, positive, _ = inputs(20, 20)
    wanted = torch.autograd.grad(info_nce(x, y, positive, 0.2), x)[0]
    assert torch.equal(torch.autograd.grad(info_nce(x, y.detach(), positive, 0.2), x)[0], wanted)
    with torch.no_grad():
        assert info_nce(x, y, positive, 0.2).grad_fn is None
    loss = info_nce(x, y, positive, 0.2)
    for _ in range(2):  # what forward found is not used up
        assert torch.equal(
            torch.autograd.grad(loss, x, torch.tensor(3.0).double(), retain_graph=True)[0],
            3 * wanted,
        )


def test_bfloat16_rows_are_reduced_in_float32() -> None:
    a, b = pair(torch.bfloat16)
    exact = doubled(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(a, b, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dense_nt_xent(exact[0], exact[1], 0.1).item(), rel=1e-5)
    loss.backward()
    dense_nt_xent(exact[0], exact[1], 0.1).backward()
    for x, y in zip((a, b), exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert (x.grad - y.grad).norm() < 3e-3 * y.grad.norm()  # rounded to bfloat16 once


class Largest(TorchDispatchMode):
    """The largest tensor that any operation inside returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))]
        )
        return out


@pytest.mark.parametrize("block", [1, 1 << 12])
def test_no_quadratic_tensor_exists(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "BLOCK", block)
    n = 256
    a, b = (torch.randn(n, 4, requires_grad=True) for _ in range(2))
    with Largest() as largest:
        nt_xent(a, b, 0.1).backward()
    assert largest.numel == 16 * 2 * n  # 16 rows of similarities at the least, of 512 x 512
    with Largest() as largest:
        dense_nt_xent(a, b, 0.1)
    assert largest.numel == (2 * n) ** 2


def on_rank() -> dict[str, Tensor]:
    """This rank's rows of a global batch: what the engine would average over ranks, and the
    gradient of its own rows.
    """
    a, b = (dist.mine(x.detach()).clone().requires_grad_() for x in pair())
    loss = nt_xent(a, b, 0.1)
    da, db = torch.autograd.grad(loss, (a, b))
    return {"loss": loss.detach(), "a": da, "b": db}


def test_ranks_do_not_matter(tmp_path: Path) -> None:
    """Two ranks are compared in the parity suite."""
    found, a_b = ranks.run(4, on_rank, tmp_path), pair()
    wanted = dense_nt_xent(*a_b, 0.1)
    assert torch.stack([r["loss"] for r in found]).mean().item() == pytest.approx(
        wanted.item(), rel=1e-12
    )
    for name, exact in zip("ab", torch.autograd.grad(wanted, a_b), strict=True):
        mean = torch.cat([r[name] for r in found]) / 4  # engines average over ranks
        assert (mean - exact).norm() <= 1e-12 * exact.norm()


def test_one_gather_forward_and_one_reduce_scatter_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            calls.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            calls.append("backward")
            return grad

    gather: Callable[[Tensor], Tensor] = Seen.apply
    monkeypatch.setattr(dist, "gather", gather)
    nt_xent(*pair(), 0.1).backward()
    assert calls == ["forward", "backward"]
