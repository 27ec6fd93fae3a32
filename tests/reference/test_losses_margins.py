"""The margin baselines against plain transcriptions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kit import plain_losses as plain
from kit.tiny import CLOCK, agrees, encode, make, make_batch, repeated, shared
from torch import Tensor

from scaletrain.core import Batch


def distance(a: Tensor, b: Tensor, squared: bool) -> Tensor:
    gap = plain.unit(a) - plain.unit(b)
    return (gap * gap).sum() if squared else (gap * gap).sum().sqrt()


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values)


def embeddings(model: Any, batch: Batch) -> list[tuple[int, Tensor]]:
    """(sample, embedding) of every view."""
    return [
        (n, x)
        for view in shared(model.projector, encode(model.backbone, batch.views))
        for n, x in enumerate(view)
    ]


def plain_margin(model: Any, batch: Batch) -> Tensor:
    """Means of the two cases over all ordered pairs of different views."""
    z, power = embeddings(model, batch), 2 if model.config.squared else 1
    pairs = [
        (n == m, distance(a, b, False))
        for i, (n, a) in enumerate(z)
        for j, (m, b) in enumerate(z)
        if i != j
    ]
    alike, different = [d for same, d in pairs if same], [d for same, d in pairs if not same]
    return mean([d**power for d in alike]) + mean(
        [relu(model.config.margin - d) ** power for d in different]
    )


def plain_triplet(model: Any, batch: Batch) -> Tensor:
    z, losses = embeddings(model, batch), []
    for i, (n, a) in enumerate(z):
        near = next(
            distance(a, p, model.config.squared) for j, (m, p) in enumerate(z) if m == n and j != i
        )
        hinges = [
            relu(near - distance(a, x, model.config.squared) + model.config.margin)
            for m, x in z
            if m != n
        ]
        losses.append(
            mean(hinges) if model.config.negatives == "all" else torch.stack(hinges).max()
        )
    return mean(losses)


@pytest.mark.parametrize(("rows", "margin"), [(2, 1.0), (5, 0.3), (7, 1.9), (4, 0.01)])
@pytest.mark.parametrize("squared", [True, False])
def test_margin(rows: int, margin: float, squared: bool) -> None:
    model, batch = (
        make("margin", rows, hidden=6, dim=4, margin=margin, squared=squared),
        make_batch(rows),
    )
    agrees(model, model(batch, CLOCK).losses["all"], plain_margin(model, batch))


@pytest.mark.parametrize(("rows", "margin"), [(2, 0.2), (5, 1.0), (7, 3.0)])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("negatives", ["all", "hardest"])
def test_triplet(rows: int, margin: float, squared: bool, negatives: str) -> None:
    options = {"hidden": 6, "dim": 4, "margin": margin, "squared": squared, "negatives": negatives}
    model, batch = make("triplet", rows, **options), make_batch(rows)
    agrees(model, model(batch, CLOCK).losses["all"], plain_triplet(model, batch))


@pytest.mark.parametrize("squared", [True, False])
def test_equal_embeddings_cost_the_margin_and_move_nothing(squared: bool) -> None:
    batch = repeated(make_batch(3))
    for name, cost in (("margin", 0.5**2 if squared else 0.5), ("triplet", 0.5)):
        model = make(name, 3, hidden=6, dim=4, margin=0.5, squared=squared)
        loss = model(batch, CLOCK).losses["all"]
        assert loss.item() == pytest.approx(cost, abs=1e-5)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert all(g.isfinite().all() and g.abs().max() < 1e-6 for g in gradients)


def test_signals() -> None:
    """Two samples at a right angle whose views agree: distance 0 within, square root of 2
    between.
    """
    z = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [0, 1]]], dtype=torch.float64)
    _, margin = make("margin", 2, margin=1.5)._loss(z)
    assert {k: v.item() for k, v in margin.items()} == pytest.approx(
        {"positive_distance": 0, "negative_distance": 2**0.5, "active_negatives": 1}, abs=1e-5
    )
    _, triplet = make("triplet", 2, margin=0.2)._loss(z)
    assert {k: v.item() for k, v in triplet.items()} == pytest.approx(
        {
            "positive_distance": 0,
            "negative_distance": 2,
            "nearest_negative_distance": 2,
            "active_triplets": 0,
        },
        abs=1e-5,
    )


@pytest.mark.parametrize("name", ["margin", "triplet"])
def test_half_precision_input_is_reduced_in_float32(name: str) -> None:
    z = torch.randn(2, 6, 4).bfloat16()
    model = make(name, 6, margin=1.0)
    found, exact = model._loss(z)[0], model._loss(z.double())[0]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)
