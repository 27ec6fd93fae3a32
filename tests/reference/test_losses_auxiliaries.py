"""The auxiliaries' losses and gradients against plain transcriptions, through the forward of a
method that has them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from kit import plain_losses as plain
from kit import small
from kit.tiny import CLOCK, MULTI, agrees, encode, make, make_batch, repeated, shared
from torch import Tensor

from scaletrain import rng
from scaletrain.auxiliaries import base as auxiliaries
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import component_config
from scaletrain.core import Batch, RunInfo
from scaletrain.ops.turns import turned

HEADS: dict[str, dict[str, Any]] = {
    "byol": {"hidden": 4, "dim": 3},
    "simclr": {"dim": 4},
    "swav": {"hidden": 4, "dim": 3},
}


def attached(
    method: str,
    rows: int,
    name: str,
    crops: tuple[tuple[int, int], ...] = ((4, 2),),
    **options: Any,
) -> Any:
    model = make(method, rows, crops, **HEADS[method])
    leaf = component_config("auxiliaries", name)(name=name, **options)
    return auxiliaries.attach(model, [leaf], RunInfo(40, rows, 10, crops)).double()


# --- rotation -------------------------------------------------------------------------------------


def plainly_turned(image: Tensor, turns: int) -> Tensor:
    """Anticlockwise, pixel by pixel: what was in the last column comes to the first row."""
    for _ in range(turns):
        n = image.shape[-1]
        image = torch.stack(
            [
                torch.stack(
                    [torch.stack([channel[c, n - 1 - r] for c in range(n)]) for r in range(n)]
                )
                for channel in image
            ]
        )
    return image


def plain_rotation(model: Any, batch: Batch, weight: float, used: int) -> Tensor:
    """lambda / (V B) times the sum of the cross entropies (the poster's equation, V = 2)."""
    turns = [
        [int(4 * u) for u in row] for row in rng.uniform(batch.keys, "rotation", used).T.tolist()
    ]
    views = [
        [plainly_turned(x, k) for x, k in zip(view, ks, strict=True)]
        for view, ks in zip(batch.views[0], turns, strict=False)
    ]
    features = encode(model.backbone, (torch.stack([torch.stack(view) for view in views]),))
    logits = [row for view in shared(model.auxiliaries["rotation"].head, features) for row in view]
    labels = [k for ks in turns for k in ks]
    losses = [-plain.log_softmax(list(row))[k] for row, k in zip(logits, labels, strict=True)]
    return torch.stack(losses).sum() * weight / len(losses)


@pytest.mark.parametrize(("rows", "hidden", "weight"), [(2, 3, 1.0), (7, 6, 0.2), (5, 1, 0.1)])
@pytest.mark.parametrize(("crops", "used"), [(((4, 2),), 2), (((4, 2),), 1), (MULTI, 3)])
def test_rotation(
    rows: int, hidden: int, weight: float, crops: tuple[tuple[int, int], ...], used: int
) -> None:
    base = "byol" if len(crops) == 1 else "swav"
    model = attached(base, rows, "rotation", crops, hidden=hidden, weight=weight, views=used)
    batch = make_batch(rows, crops, seed=rows)
    agrees(
        model, model(batch, CLOCK).losses["rotation"], plain_rotation(model, batch, weight, used)
    )


def test_rotation_of_one_image_repeated() -> None:
    model, batch = attached("simclr", 6, "rotation", hidden=4), repeated(make_batch(6))
    agrees(model, model(batch, CLOCK).losses["rotation"], plain_rotation(model, batch, 0.2, 2))


def test_four_turns_are_all_equally_likely_and_views_turn_independently() -> None:
    keys = rng.hash64(1, torch.arange(4000))
    turns = (4 * rng.uniform(keys, "rotation", 2)).long()
    pairs = torch.bincount(4 * turns[:, 0] + turns[:, 1], minlength=16)
    assert (pairs - 250).abs().max() < 70  # 4.5 standard deviations
    x = torch.randn(2, 4, 3, 5, 5)
    for k in range(4):
        assert torch.equal(turned(x, torch.full((2, 4), k))[1, 2], plainly_turned(x[1, 2], k))


def test_rotation_knows_its_accuracy_and_reduces_in_float32() -> None:
    model, batch = attached("byol", 8, "rotation", hidden=4), make_batch(8)
    with torch.no_grad():
        model.auxiliaries["rotation"].head[-1].weight.zero_()
        model.auxiliaries["rotation"].head[-1].bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    turns = (4 * rng.uniform(batch.keys, "rotation", 2)).long()
    out = model(batch, CLOCK)
    assert out.scalars["rotation_accuracy"].item() == pytest.approx(
        (turns == 2).double().mean().item()
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            model.float()(
                Batch(
                    tuple(v.float() for v in batch.views),
                    batch.index,
                    batch.keys,
                    batch.pixel_range,
                ),
                CLOCK,
            )
            .losses["rotation"]
            .dtype
            == torch.float32
        )


# --- any auxiliary --------------------------------------------------------------------------------


def test_the_method_itself_is_left_as_it_is() -> None:
    """Its initial values, names, losses and signals; the auxiliary's parameters are in its own
    group.
    """
    plainly, joint, batch = (
        make("byol", 5, hidden=4, dim=3),
        attached("byol", 5, "rotation"),
        make_batch(5),
    )
    mine = {k: v for k, v in joint.state_dict().items() if not k.startswith("auxiliaries.")}
    assert mine.keys() == plainly.state_dict().keys()
    assert all(torch.equal(v, mine[k]) for k, v in plainly.state_dict().items())
    alone, both = plainly(batch, CLOCK), joint(batch, CLOCK)
    assert torch.equal(alone.losses["all"], both.losses["all"])
    assert both.losses.keys() == {"all", "rotation"}
    assert torch.equal(alone.embedding, both.embedding)
    (group,) = joint.groups()
    taken = {name for name, p in joint.named_parameters() if group.match(name, p)}
    assert taken == {
        name for name, _ in joint.named_parameters() if name.startswith("auxiliaries.rotation.")
    }
    assert joint.ema(CLOCK) == plainly.ema(CLOCK)


def test_losses_that_drive_parts_take_no_auxiliary() -> None:
    model = make("byol", 5, hidden=4, dim=3)
    type(model).separate_losses = True
    try:
        with pytest.raises(
            ConfigError, match=r"losses of byol drive a part .* remove the auxiliaries"
        ):
            auxiliaries.attach(
                model,
                [component_config("auxiliaries", "rotation")(name="rotation")],
                RunInfo(40, 5, 10, ((4, 2),)),
            )
    finally:
        type(model).separate_losses = False


def test_an_encoder_of_maps_is_pooled() -> None:
    model = small.engine(small.config("densecl+rotation")).method
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert model.backbone(x).shape == (3, 32, 2, 2)
    assert torch.equal(model.encode(x), model.backbone(x).mean((2, 3)))


def test_equal_logits_cost_the_logarithm_of_four() -> None:
    model, batch = attached("byol", 3, "rotation", weight=1.0), make_batch(3)
    with torch.no_grad():
        for p in model.auxiliaries.parameters():
            p.zero_()
    assert model(batch, CLOCK).losses["rotation"].item() == pytest.approx(math.log(4))


# --- SuNCEt ---------------------------------------------------------------------------------------


def supported(method: str, labels: list[int], **options: Any) -> tuple[Any, Batch]:
    model = make(method, 4, **HEADS[method])
    leaf = component_config("auxiliaries", "suncet")(name="suncet", **options)
    model = auxiliaries.attach(
        model, [leaf], RunInfo(40, 4, 10, ((4, 2),), support=len(labels))
    ).double()
    images = torch.randn(
        1,
        len(labels),
        3,
        4,
        4,
        generator=torch.Generator().manual_seed(len(labels)),
        dtype=torch.float64,
    )
    batch, index = make_batch(4), torch.arange(len(labels))
    support = Batch((images,), index, index, batch.pixel_range, labels=torch.tensor(labels))
    return model, dataclasses.replace(batch, support=support)


def plain_suncet(model: Any, batch: Batch, temperature: float) -> Tensor:
    """Equation 2, averaged over the anchors that have another sample of their class; unlabelled
    ones take no part.
    """
    assert batch.support is not None
    assert batch.support.labels is not None
    z = shared(model.projector, encode(model.backbone, batch.support.views))[0]
    y = batch.support.labels.tolist()
    losses = []
    for i in range(len(z)):
        near = {
            k: torch.exp(plain.cos(z[i], z[k]) / temperature)
            for k in range(len(z))
            if k != i and y[k] >= 0
        }
        own = [near[j] for j in near if y[j] == y[i]]
        if own:
            losses.append(
                -torch.log(torch.stack(own).sum() / torch.stack(list(near.values())).sum())
            )
    return torch.stack(losses).sum() / len(losses)


@pytest.mark.parametrize(("temperature", "weight"), [(0.1, 1.0), (0.5, 0.3), (1.0, 2.0)])
@pytest.mark.parametrize(
    "labels", [[0, 0], [0, 1, 0, 1], [5, 2, 2, 5, 5, 2, 9, 9], [0, 1, 0, -1, 1], [3, 1, 3, 3]]
)
@pytest.mark.parametrize("method", ["simclr", "swav"])
def test_suncet(method: str, labels: list[int], temperature: float, weight: float) -> None:
    model, batch = supported(method, labels, temperature=temperature, weight=weight)
    agrees(
        model,
        model(batch, CLOCK).losses["suncet"],
        weight * plain_suncet(model, batch, temperature),
    )


def test_suncet_of_equal_embeddings_counts_the_class() -> None:
    """Of five others one is of the class."""
    model, _ = supported("simclr", [0, 1, 2, 0, 1, 2])
    loss, scalars = model.auxiliaries["suncet"]._loss(
        torch.ones(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    )
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)
    assert scalars["suncet_probability"].item() == pytest.approx(1 / 5)


def test_suncet_reduces_in_float32_and_survives_a_step_without_a_pair() -> None:
    part = supported("simclr", [0, 1, 0, 1])[0].auxiliaries["suncet"]
    z = torch.randn(4, 3).bfloat16().requires_grad_()
    loss, _ = part._loss(z, torch.tensor([0, 1, 0, 1]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        part._loss(z.double(), torch.tensor([0, 1, 0, 1]))[0].item(), rel=1e-5
    )
    lonely, _ = part._loss(z, torch.tensor([0, 1, -1, -1]))
    (gradient,) = torch.autograd.grad(lonely, z)
    assert lonely.item() == 0
    assert (gradient == 0).all()


def test_suncet_is_over_when_the_labelled_samples_are() -> None:
    model, batch = supported("simclr", [0, 1, 0, 1])
    assert model(dataclasses.replace(batch, support=None), CLOCK).losses.keys() == {"all"}


def test_suncet_needs_labels_and_a_projector() -> None:
    leaf = component_config("auxiliaries", "suncet")(name="suncet")
    with pytest.raises(ValueError, match=r"set data\.support"):
        auxiliaries.attach(make("simclr", 4), [leaf], RunInfo(40, 4, 10, ((4, 2),)))
    with pytest.raises(ValueError, match="a method with a projector"):
        auxiliaries.attach(make("supervised", 4), [leaf], RunInfo(40, 4, 10, ((4, 2),), support=4))
