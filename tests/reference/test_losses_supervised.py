"""The objectives that see every label, against plain transcriptions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from kit import plain_losses as plain
from kit.tiny import CLOCK, LARGE, MULTI, agrees, encode, make, make_batch, repeated
from torch import Tensor

from scaletrain.core import Batch
from scaletrain.ops.classification import cross_entropy
from scaletrain.ops.contrastive import nt_xent


def labelled(batch: Batch, labels: list[int]) -> Batch:
    return dataclasses.replace(batch, labels=torch.tensor(labels))


def total(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum()


# --- supervised -----------------------------------------------------------------------------------


def plain_supervised(model: Any, batch: Batch) -> Tensor:
    assert batch.labels is not None
    losses = []
    for view in encode(model.backbone, batch.views):
        for h, label in zip(view, batch.labels.tolist(), strict=True):
            logits = [
                (w * h).sum() + b
                for w, b in zip(model.classifier.weight, model.classifier.bias, strict=True)
            ]
            losses.append(-plain.log_softmax(logits)[label])
    return total(losses) / len(losses)


@pytest.mark.parametrize("views", [((4, 1),), LARGE, MULTI])
@pytest.mark.parametrize("labels", [[0, 1], [4, 4, 0, 2, 1, 1], [3, 3, 3]])
def test_supervised(views: tuple[tuple[int, int], ...], labels: list[int]) -> None:
    model, batch = (
        make("supervised", len(labels), views, classes=5),
        labelled(make_batch(len(labels), views), labels),
    )
    out = model(batch, CLOCK)
    agrees(model, out.losses["all"], plain_supervised(model, batch))
    answers = [
        model.classifier(torch.stack(view)).argmax(1) == batch.labels
        for view in encode(model.backbone, batch.views)
    ]
    assert out.scalars["accuracy"].item() == pytest.approx(
        torch.stack(answers).double().mean().item()
    )


def test_supervised_of_zero_weights_is_the_logarithm_of_the_classes() -> None:
    model = make("supervised", 3, classes=7)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    assert model(labelled(make_batch(3), [6, 0, 1]), CLOCK).losses["all"].item() == pytest.approx(
        math.log(7)
    )


# --- supervised contrastive -----------------------------------------------------------------------


def plain_supcon(model: Any, batch: Batch) -> Tensor:
    """Equation 2 over the multiviewed batch I, times temperature / base_temperature."""
    assert batch.labels is not None
    z = [
        row
        for view in encode(model.backbone, batch.views)
        for row in plain.head(model.projector, view)
    ]
    y = batch.labels.tolist() * 2
    t = model.config.temperature
    losses = []
    for i in range(len(z)):
        near = {a: torch.exp(plain.cos(z[i], z[a]) / t) for a in range(len(z)) if a != i}  # A(i)
        positives = [p for p in near if y[p] == y[i]]  # P(i)
        losses.append(
            -total([torch.log(near[p] / total(list(near.values()))) for p in positives])
            / len(positives)
        )
    return total(losses) / len(losses) * t / model.config.base_temperature


@pytest.mark.parametrize(("temperature", "base"), [(0.1, 0.07), (0.5, 0.5), (1.0, 0.07)])
@pytest.mark.parametrize("labels", [[0, 1], [0, 0], [4, 4, 0, 2, 4, 0, 9], [3, 3, 3]])
def test_supcon(labels: list[int], temperature: float, base: float) -> None:
    model = make(
        "supcon", len(labels), hidden=6, dim=4, temperature=temperature, base_temperature=base
    )
    batch = labelled(make_batch(len(labels)), labels)
    agrees(model, model(batch, CLOCK).losses["all"], plain_supcon(model, batch))


def test_supcon_of_equal_embeddings_is_the_logarithm_of_the_others() -> None:
    model = make("supcon", 4, hidden=6, dim=4, base_temperature=0.1)
    batch = labelled(repeated(make_batch(4)), [0, 1, 1, 2])
    assert model(batch, CLOCK).losses["all"].item() == pytest.approx(math.log(7))


def test_supcon_with_a_class_for_every_sample_is_half_of_simclr() -> None:
    """SimCLR's code adds its two directions up."""
    z = torch.randn(2, 5, 4, dtype=torch.float64)
    model = make("supcon", 5, temperature=0.2, base_temperature=0.2)
    rows = [list(view) for view in z]
    assert 2 * model._loss(z, torch.arange(5))[0].item() == pytest.approx(
        plain.nt_xent(rows[0], rows[1], 0.2).item()
    )


def test_supcon_says_how_alike_a_class_is() -> None:
    z = torch.tensor([[[1.0, 0], [1, 0], [0, 1]], [[1, 0], [1, 0], [0, 1]]])
    _, scalars = make("supcon", 3)._loss(z, torch.tensor([0, 0, 1]))
    shown = {name: value.item() for name, value in scalars.items()}
    assert shown == pytest.approx(
        {"positive_similarity": 1.0, "negative_similarity": 0.0, "positives": (3 * 4 + 1 * 2) / 6}
    )


@pytest.mark.parametrize("loss", [make("supcon", 6)._loss, cross_entropy])
def test_half_precision_input_is_reduced_in_float32(loss: Any) -> None:
    z, labels = torch.randn(2, 6, 4).bfloat16(), torch.tensor([0, 1, 2, 0, 1, 2])
    found, exact = loss(z, labels)[0], loss(z.double(), labels)[0]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)


# --- SimCLR without some of its false negatives ---------------------------------------------------


def plain_fewer_negatives(
    a: list[Tensor], b: list[Tensor], y: list[int], temperature: float
) -> Tensor:
    """As SimCLR's eq. 1; samples of the anchor's own class are left out where it is known."""

    def direction(x: list[Tensor], other: list[Tensor]) -> Tensor:
        losses = []
        for i in range(len(x)):
            negatives = [j for j in range(len(x)) if j != i and not (y[j] == y[i] >= 0)]
            near = torch.exp(plain.cos(x[i], other[i]) / temperature)
            far = [
                torch.exp(plain.cos(x[i], rows[j]) / temperature)
                for rows in (x, other)
                for j in negatives
            ]
            losses.append(-torch.log(near / total([near, *far])))
        return total(losses) / len(losses)

    return direction(a, b) + direction(b, a)


@pytest.mark.parametrize("labels", [[0, 0], [0, 1, 0, 2, 1, 0], [-1, -1, 3, 3], [4, 4, 4]])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_known_labels_remove_false_negatives(labels: list[int], temperature: float) -> None:
    z = torch.randn(2, len(labels), 4, dtype=torch.float64, requires_grad=True)
    fast = nt_xent(z[0], z[1], temperature, torch.tensor(labels))
    slow = plain_fewer_negatives(list(z[0]), list(z[1]), labels, temperature)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-11, abs=1e-13)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, z)[0] for x in (fast, slow)), rtol=1e-8, atol=1e-11
    )


def test_the_share_of_known_labels_is_kept_and_the_same_in_every_epoch() -> None:
    model = make("simclr", 5, known_labels=0.3)
    assert model.classes == 0
    batch = dataclasses.replace(
        make_batch(5), index=torch.arange(4000), labels=torch.arange(4000) % 7
    )
    known = model._known(batch)
    assert abs((known >= 0).double().mean().item() - 0.3) < 0.03
    assert torch.equal(known[known >= 0], batch.labels[known >= 0])
    again = model._known(dataclasses.replace(batch, keys=batch.keys + 1))
    assert torch.equal(known, again)
    assert torch.equal(make("simclr", 5, known_labels=1.0)._known(batch), batch.labels)
    assert make("simclr", 5).classes is None
