"""DirectPred and DirectCopy: loss, gradient, correlation and the predictor that is set from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kit import plain_losses as plain
from kit.tiny import CLOCK, agrees, commit, encode, make, make_batch, repeated
from torch import Tensor

from scaletrain.core import Batch, Clock

OPTIONS: dict[str, Any] = {"hidden": 6, "dim": 3}


def projections(model: Any, batch: Batch) -> list[list[Tensor]]:
    return [plain.head(model.projector, view) for view in encode(model.backbone, batch.views)]


def plain_loss(model: Any, batch: Batch) -> Tensor:
    p = [[model.weight @ f for f in view] for view in projections(model, batch)]
    return plain.byol(
        p,
        [
            plain.head(model.target_projector, view)
            for view in encode(model.target_backbone, batch.views)
        ],
    )


def products(model: Any, batch: Batch) -> Tensor:
    """E[f f^T], neither centred nor normalised."""
    return plain.mean(
        torch.outer(f, f) for view in projections(model, batch) for f in view
    ).detach()


def step(model: Any, batch: Batch, number: int = 0) -> None:
    model(batch, CLOCK)
    commit(model)
    model.after_step(Clock(number, 10, 0, 10), lambda *_: None)


def largest(matrix: Tensor) -> float:
    v = torch.ones(len(matrix), dtype=torch.float64)
    for _ in range(2000):
        v = plain.unit(matrix @ v)
    return float(v @ matrix @ v)


@pytest.mark.parametrize("predictor", ["directpred", "directcopy"])
@pytest.mark.parametrize(
    ("rows", "dim", "rho"), [(2, 2, 0.3), (5, 3, 0.3), (6, 4, 0.9), (3, 1, 0.0)]
)
def test_three_steps(predictor: str, rows: int, dim: int, rho: float) -> None:
    model = make("directpred", rows, hidden=6, dim=dim, rho=rho, predictor=predictor, epsilon=0.05)
    moving = torch.zeros(dim, dim, dtype=torch.float64)
    for number in range(3):
        batch = make_batch(rows, seed=number)
        agrees(model, model(batch, CLOCK).losses["all"], plain_loss(model, batch))
        model.correlation.discard()
        step(model, batch, number)
        moving = (
            rho * moving + (1 - rho) * products(model, batch) if number else products(model, batch)
        )
        torch.testing.assert_close(model.correlation.matrix, moving, rtol=1e-12, atol=1e-14)
        root = model.weight - 0.05 * torch.eye(dim, dtype=torch.float64)
        if predictor == "directcopy":
            torch.testing.assert_close(root, moving, rtol=1e-12, atol=1e-14)
        else:  # the positive square root of F over its largest eigenvalue
            torch.testing.assert_close(root @ root * largest(moving), moving, rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(root, root.T, rtol=0, atol=1e-14)
            assert torch.linalg.eigvalsh(root).min() > -1e-12
    assert model.correlation.steps == 3


def test_the_predictor_is_set_every_few_steps() -> None:
    model, batch = make("directpred", 4, every=3, **OPTIONS), make_batch(4)
    weights = []
    for number in range(4):
        step(model, make_batch(4, seed=number), number)
        weights.append(model.weight.clone())
    assert not torch.equal(weights[0], torch.eye(3).double())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[2], weights[3])
    model(batch, CLOCK)
    assert model.weight.grad_fn is None


def test_equal_samples_use_one_dimension() -> None:
    """F has rank one: the other eigenvalues of the predictor are epsilon, and never less
    than 1e-4.
    """
    for epsilon, floor in ((0.01, 0.01), (0.0, 1e-4)):
        model = make("directpred", 4, epsilon=epsilon, **OPTIONS)
        step(model, repeated(make_batch(4)))
        values = torch.linalg.eigvalsh(model.weight).tolist()
        assert values == pytest.approx([floor, floor, 1 + epsilon], abs=1e-6)
        assert model(make_batch(4), CLOCK).scalars["correlation_rank"].item() == pytest.approx(1)


def test_two_micro_batches_count_as_one_batch() -> None:
    whole, parts = (make("directpred", 6, **OPTIONS) for _ in range(2))
    f = torch.randn(2, 6, 3, dtype=torch.float64)
    whole.correlation.stage(f)
    whole.correlation.commit()
    for part in f.split(3, 1):
        parts.correlation.stage(part)
    parts.correlation.commit(2)
    torch.testing.assert_close(
        whole.correlation.matrix, parts.correlation.matrix, rtol=1e-13, atol=0
    )
    assert parts.correlation.steps == 1


def test_the_loss_is_exact_although_heads_compute_in_bfloat16() -> None:
    model, batch = make("directpred", 6, **OPTIONS).float(), make_batch(6)
    batch = Batch(
        tuple(v.float() for v in batch.views), batch.index, batch.keys, batch.pixel_range.float()
    )
    found: dict[str, Tensor] = {}
    for name in ("projector", "target_projector"):
        hook = lambda _m, _i, out, name=name: found.update({name: out.detach()})  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch, CLOCK).losses["all"]
    assert loss.dtype == torch.float32
    z = {name: [list(v) for v in x.double().unflatten(0, (-1, 6))] for name, x in found.items()}
    assert loss.item() == pytest.approx(
        plain.byol(z["projector"], z["target_projector"]).item(), rel=2e-5
    )  # W_p = 1
