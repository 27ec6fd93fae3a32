"""LARS against slow float64 transcriptions, one for each author's code, written from the papers'
update rules.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scaletrain.optim.lars import LARS

ETA, DECAY = 0.02, 1e-2  # large, so that every term shows
RATES = (0.0, 0.2, 0.4, 0.8, 0.7, 0.5, 0.3, 0.1, 0.05)
SHAPES = ((6, 4, 3, 3), (5, 7), (8, 3, 1, 1), (4, 4), (9,), (3, 5), (3,))
ZERO, VECTOR, LATE, LAST = (
    3,
    4,
    5,
    6,
)  # starts at zero; excluded; without gradient at times; in a group of its own


def norm(x: Tensor) -> float:
    return math.sqrt(sum(float(v) ** 2 for v in x.flatten()))


def byol(
    p: Tensor, g: Tensor, v: Tensor, lr: float, m: float, wd: float, adapt: bool
) -> tuple[Tensor, Tensor]:
    g = g + wd * p
    r = ETA * norm(p) / norm(g) if adapt and norm(p) > 0 and norm(g) > 0 else 1.0
    v = m * v + r * g
    return p - lr * v, v


def simclr(
    p: Tensor, g: Tensor, v: Tensor, lr: float, m: float, wd: float, adapt: bool
) -> tuple[Tensor, Tensor]:
    g = g + wd * p
    r = ETA * norm(p) / norm(g) if adapt and norm(p) > 0 and norm(g) > 0 else 1.0
    v = m * v + (lr * r) * g
    return p - v, v


def larc(
    p: Tensor, g: Tensor, v: Tensor, lr: float, m: float, wd: float, adapt: bool
) -> tuple[Tensor, Tensor]:
    if not adapt:
        g = g + wd * p
    elif norm(p) != 0 and norm(g) != 0:
        g = (g + wd * p) * (ETA * norm(p) / (norm(g) + wd * norm(p) + 1e-8))
    v = m * v + g
    return p - lr * v, v


def suncet(
    p: Tensor, g: Tensor, v: Tensor, lr: float, m: float, wd: float, adapt: bool
) -> tuple[Tensor, Tensor]:
    if not adapt:
        g = g + wd * p
    elif norm(p) != 0 and norm(g) != 0:
        g = (g + wd * p) * (ETA * norm(p) / (norm(g) + wd * norm(p) + 1e-8))
    v = m * v + lr * g
    return p - v, v


def solo(
    p: Tensor, g: Tensor, v: Tensor, lr: float, m: float, wd: float, adapt: bool
) -> tuple[Tensor, Tensor]:
    if not adapt:
        g = g + wd * p
    elif norm(p) != 0 and norm(g) != 0:
        local = ETA * norm(p) / (norm(g) + wd * norm(p) + 1e-8)
        g = (g + wd * p) * (min(local / lr, 1.0) if lr else 1.0)
    v = m * v + g
    return p - lr * v, v


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "byol": (byol, {}),
    "simclr": (simclr, {"placement": "inside"}),
    "larc": (larc, {"norm": "parts"}),
    "suncet": (suncet, {"norm": "parts", "placement": "inside"}),
    "solo": (solo, {"norm": "parts", "clip": True}),
}


def start(dtype: torch.dtype) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=gen, dtype=torch.float64).float() for shape in SHAPES]
    params[ZERO].zero_()
    return [p.to(dtype) for p in params]


def gradients(step: int) -> list[Tensor | None]:
    """float64; a zero gradient at step 4, none at all for one parameter at steps 0, 1 and 5."""
    gen = torch.Generator().manual_seed(100 + step)
    grads: list[Tensor | None] = [
        torch.randn(shape, generator=gen, dtype=torch.float64).float().double() for shape in SHAPES
    ]
    if step == 4:
        grads[1] = torch.zeros(SHAPES[1], dtype=torch.float64)
    if step in (0, 1, 5):
        grads[LATE] = None
    return grads


def options(i: int) -> tuple[float, float, bool]:
    """momentum, weight decay and adaptation of parameter i: three groups."""
    return {VECTOR: (0.9, 0.0, False), 1: (0.0, DECAY, True), LAST: (0.5, DECAY, False)}.get(
        i, (0.9, DECAY, True)
    )


def expected(rule: Any, steps: int = len(RATES)) -> list[Tensor]:
    params = start(torch.float64)
    buffers = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        for i, g in enumerate(gradients(step)):
            if g is not None:
                m, wd, adapt = options(i)
                params[i], buffers[i] = rule(params[i], g, buffers[i], RATES[step], m, wd, adapt)
    return params


def groups(params: list[Tensor]) -> list[dict[str, Any]]:
    order: dict[tuple[float, float, bool], list[Tensor]] = {}
    for i, p in enumerate(params):
        order.setdefault(options(i), []).append(p)
    return [
        {"params": ps, "momentum": m, "weight_decay": wd, "adapt": adapt}
        for (m, wd, adapt), ps in order.items()
    ]


def run(optimizer: LARS, params: list[Tensor], steps: range) -> None:
    for step in steps:
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = None if g is None else torch.empty_like(p).copy_(g)
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.step()


def error(params: list[Tensor], wanted: list[Tensor]) -> float:
    return max(
        float((p.double() - w).norm() / w.norm()) for p, w in zip(params, wanted, strict=True)
    )


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_equals_transcription(variant: str, foreach: bool | None) -> None:
    rule, keywords = VARIANTS[variant]
    params = start(torch.float64)
    run(LARS(groups(params), 0.0, eta=ETA, foreach=foreach, **keywords), params, range(len(RATES)))
    assert error(params, expected(rule)) < 1e-13


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_equals_transcription(variant: str, layout: str) -> None:
    """The fused kernel reads raw memory, so parameters and gradients come in equal and in different
    layouts.
    """
    rule, keywords = VARIANTS[variant]
    params = start(torch.float32)
    if layout != "contiguous":
        params = [p.to(memory_format=torch.channels_last) if p.ndim == 4 else p for p in params]
    optimizer = LARS(groups(params), 0.0, eta=ETA, **keywords)
    for step in range(len(RATES)):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = (
                None
                if g is None
                else g.float()
                if layout == "mixed"
                else torch.empty_like(p).copy_(g)
            )
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.step()
    assert error(params, expected(rule)) < 2e-6


def test_variants_differ() -> None:
    """Else the comparisons above would prove nothing about the choice."""
    results = [expected(rule) for rule, _ in VARIANTS.values()]
    for i, a in enumerate(results):
        assert all(error(a, b) > 1e-4 for b in results[:i])


@pytest.mark.parametrize(
    ("dtype", "foreach"), [(torch.float32, None), (torch.float32, True), (torch.float64, None)]
)
def test_resume_is_bit_exact(dtype: torch.dtype, foreach: bool | None) -> None:
    whole = start(dtype)
    run(LARS(groups(whole), 0.0, foreach=foreach), whole, range(8))
    first = start(dtype)
    before = LARS(groups(first), 0.0, foreach=foreach)
    run(before, first, range(4))
    second = [p.clone() for p in first]
    after = LARS(groups(second), 0.0, foreach=foreach)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    run(after, second, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_restored_buffer_in_another_layout() -> None:
    """A checkpoint holds contiguous momentum; the parameter may be channels_last."""
    results = []
    for contiguous in (False, True):
        p = start(torch.float32)[0].to(memory_format=torch.channels_last)
        optimizer = LARS([p], 0.1)
        for step in range(4):
            grad = gradients(step)[0]
            assert grad is not None
            p.grad = torch.empty_like(p).copy_(grad)
            if contiguous and step:
                optimizer.state[p]["momentum_buffer"] = optimizer.state[p][
                    "momentum_buffer"
                ].contiguous()
            optimizer.step()
        results.append(p)
    assert torch.equal(*results)


@pytest.mark.parametrize("foreach", [None, True])
def test_trust_is_of_the_last_step(foreach: bool | None) -> None:
    params = start(torch.float32)
    optimizer = LARS(groups(params), 0.1, eta=ETA, foreach=foreach)
    assert optimizer.trust.numel() == 0
    wanted = []
    for i, p in enumerate(params):
        grad = gradients(2)[i]
        assert grad is not None
        wanted.append(ETA * norm(p) / norm(grad + DECAY * p.double()) if i != ZERO else 1.0)
    wanted = [wanted[i] for i in (0, 2, ZERO, LATE, 1)]  # the group of parameter 1 comes second
    run(optimizer, params, range(2, 3))
    torch.testing.assert_close(
        optimizer.trust.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_gradients_are_only_read() -> None:
    for foreach in (None, True):
        for dtype in (torch.float32, torch.float64):
            params = start(dtype)
            run(LARS(groups(params), 0.0, foreach=foreach), params, range(2, 3))
            for p, g in zip(params, gradients(2), strict=True):
                assert p.grad is not None
                assert g is not None
                assert torch.equal(p.grad, g.to(dtype))


def test_norms_of_large_parameters() -> None:
    gen = torch.Generator().manual_seed(3)
    p, g = (torch.rand(700_001, generator=gen) for _ in range(2))
    optimizer = LARS([p], 0.1)
    got = optimizer.square_norms([p, p], [g, g], [0.5, 0.0])
    pd, gd = p.double(), g.double()
    wanted = torch.stack(
        [torch.stack([pd.dot(pd)] * 2), torch.stack([(gd + 0.5 * pd).square().sum(), gd.dot(gd)])]
    )
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=0)


def test_norms_do_not_depend_on_alignment() -> None:
    """A gradient inside a DDP bucket starts anywhere; resume must not change a bit."""
    gen = torch.Generator().manual_seed(4)
    p, g = (torch.randn(100_003, generator=gen) for _ in range(2))
    optimizer = LARS([p], 0.1)
    wanted = optimizer.square_norms([p], [g], [0.1])
    for offset in range(1, 17):
        moved = torch.empty(len(g) + 16)[offset : offset + len(g)].copy_(g)
        assert torch.equal(optimizer.square_norms([p], [moved], [0.1]), wanted)


def test_norm_of_a_sum_that_cancels() -> None:
    gen = torch.Generator().manual_seed(5)
    p = torch.randn(1000, generator=gen)
    g = -0.25 * p
    optimizer = LARS([p], 0.1)
    assert optimizer.square_norms([p], [g], [0.25])[1].item() == 0
    g[0] += 1e-3
    got = optimizer.square_norms([p], [g], [0.25])[1].sqrt().item()
    assert got == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("foreach", [None, True])
def test_non_finite_gradient_is_not_hidden(value: float, foreach: bool | None) -> None:
    a, b = torch.ones(3, 3), torch.ones(3, 3)
    a.grad, b.grad = torch.full((3, 3), value), torch.ones(3, 3)
    LARS([a, b], 0.1, foreach=foreach).step()
    assert not a.isfinite().any()
    assert b.isfinite().all()


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_moves_without_gradient_and_decay(variant: str, foreach: bool | None) -> None:
    """Norms of zero in the denominator."""
    p, q = torch.ones(3, 3), torch.zeros(3, 3)
    p.grad, q.grad = torch.zeros(3, 3), torch.zeros(3, 3)
    optimizer = LARS([p, q], 0.1, foreach=foreach, **VARIANTS[variant][1])
    optimizer.step()
    assert p.eq(1).all()
    assert q.eq(0).all()
    assert optimizer.trust.tolist() == [1, 1]


def test_momentum_zero_keeps_no_state_and_closure_is_called() -> None:
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = LARS([p], 0.1, momentum=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert (p < 1).all()
    assert not optimizer.state


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"bfloat16; keep parameters in float32"):
        LARS([torch.ones(2, dtype=torch.bfloat16)], 0.1)
    with pytest.raises(ValueError, match="momentum is -1"):
        LARS([torch.ones(2)], 0.1, momentum=-1)
    with pytest.raises(ValueError, match="placement is outside or inside"):
        LARS([torch.ones(2)], 0.1, placement="within")  # type: ignore[arg-type]
