"""Every method's loss and gradient against the plain transcriptions, through Model.forward with a
tiny linear backbone.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kit import plain_losses as plain
from kit.tiny import CLOCK, LARGE, MULTI, agrees, commit, encode, make, make_batch, repeated, shared
from torch import Tensor, nn

from scaletrain.core import Batch, Clock
from scaletrain.ops.contrastive import cosine_distance, nt_xent

# --- BYOL -----------------------------------------------------------------------------------------


def plain_byol(model: Any, batch: Batch) -> Tensor:
    q = [
        plain.head(model.predictor, plain.head(model.projector, h))
        for h in encode(model.backbone, batch.views)
    ]
    z = [plain.head(model.target_projector, h) for h in encode(model.target_backbone, batch.views)]
    return plain.byol(q, z)


@pytest.mark.parametrize(("rows", "hidden", "dim"), [(2, 4, 3), (5, 7, 6), (9, 3, 1)])
@pytest.mark.parametrize("same", [False, True])
def test_byol(rows: int, hidden: int, dim: int, same: bool) -> None:
    model, batch = make("byol", rows, hidden=hidden, dim=dim), make_batch(rows)
    batch = repeated(batch) if same else batch
    agrees(model, model(batch, CLOCK).losses["all"], plain_byol(model, batch))


def test_byol_of_equal_embeddings_is_zero_and_of_opposite_ones_eight() -> None:
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert cosine_distance(z, 3 * z.detach()).item() == pytest.approx(0, abs=1e-14)
    assert torch.autograd.grad(cosine_distance(z, 3 * z.detach()), z)[0].abs().max() < 1e-14
    assert 2 * cosine_distance(z, -z).item() == pytest.approx(8)


# --- SimCLR ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "dim", "temperature"), [(2, 3, 0.5), (7, 4, 0.1), (6, 5, 0.07), (3, 1, 1.0)]
)
@pytest.mark.parametrize("layers", [2, 3])
def test_simclr(rows: int, dim: int, temperature: float, layers: int) -> None:
    model, batch = (
        make("simclr", rows, dim=dim, temperature=temperature, layers=layers),
        make_batch(rows),
    )
    z = shared(model.projector, encode(model.backbone, batch.views))
    agrees(model, model(batch, CLOCK).losses["all"], plain.nt_xent(z[0], z[1], temperature))


def test_simclr_of_equal_embeddings_is_the_logarithm_of_the_candidates() -> None:
    """2B - 1 candidates that all look alike, in both directions."""
    z = torch.ones(4, 3, dtype=torch.float64)
    assert nt_xent(z, z, 0.1).item() == pytest.approx(2 * math.log(7))
    assert nt_xent(z[:2], z[:2], 0.1).item() == pytest.approx(2 * math.log(3))


# --- SwAV -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "views", "prototypes", "temperature", "epsilon", "iterations"),
    [
        (2, LARGE, 3, 0.1, 0.05, 3),
        (6, MULTI, 4, 0.1, 0.05, 3),
        (5, MULTI, 7, 0.3, 0.2, 1),
        (4, LARGE, 1, 0.1, 0.05, 3),
    ],
)
@pytest.mark.parametrize("same", [False, True])
def test_swav(
    rows: int,
    views: tuple[tuple[int, int], ...],
    prototypes: int,
    temperature: float,
    epsilon: float,
    iterations: int,
    same: bool,
) -> None:
    options = {"hidden": 6, "dim": 4, "prototypes": prototypes}
    model = make(
        "swav",
        rows,
        views,
        temperature=temperature,
        epsilon=epsilon,
        iterations=iterations,
        **options,
    )
    batch = repeated(make_batch(rows, views)) if same else make_batch(rows, views)
    z = shared(model.projector, encode(model.backbone, batch.views))
    loss = model(batch, CLOCK).losses["all"]
    agrees(model, loss, plain.swav(z, model.prototypes.weight, temperature, epsilon, iterations))
    assert (loss.item() == 0) == (prototypes == 1)


def test_swav_balances_with_a_full_queue_only() -> None:
    """A queue of two batches: filled from `queue_epoch` on, used as soon as it is full, oldest rows
    leave first.
    """
    rows, epochs = 3, [0, 1, 1, 1, 1, 2]
    model = make("swav", rows, MULTI, hidden=6, dim=4, prototypes=5, queue=6, queue_epoch=1)
    kept: list[list[Tensor]] = [[], []]
    differed = 0
    for step, epoch in enumerate(epochs):
        batch = make_batch(rows, MULTI, seed=10 * step)
        z = shared(model.projector, encode(model.backbone, batch.views))
        full = [view if len(view) == 6 else [] for view in kept]
        slow = plain.swav(z, model.prototypes.weight, 0.1, 0.05, 3, full)
        agrees(model, model(batch, Clock(step, 10, epoch, 2)).losses["all"], slow)
        differed += (
            abs(slow.item() - plain.swav(z, model.prototypes.weight, 0.1, 0.05, 3).item()) > 1e-6
        )
        commit(model)
        if epoch >= 1:
            kept = [
                [*view, *(plain.unit(x).detach() for x in z[i])][-6:] for i, view in enumerate(kept)
            ]
    assert differed == 3


# --- DeepCluster v2 -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("views", "clusters", "temperature", "unknown"),
    [
        (LARGE, (3,), 0.1, 0),
        (MULTI, (4, 2, 5), 0.1, 2),
        (((4, 1), (2, 2)), (1, 3), 0.5, 4),
        (LARGE, (3, 3), 0.2, 5),
    ],
)
@pytest.mark.parametrize("rows", [2, 5])
def test_deepcluster_v2(
    rows: int,
    views: tuple[tuple[int, int], ...],
    clusters: tuple[int, ...],
    temperature: float,
    unknown: int,
) -> None:
    """`unknown` samples have no cluster in the first head, one less in the next ones."""
    model = make(
        "deepcluster_v2", rows, views, hidden=6, dim=4, clusters=clusters, temperature=temperature
    )
    batch = make_batch(rows, views)
    labels = [
        [-1 if n < unknown - h else (n + h) % k for h, k in enumerate(clusters)]
        for n in range(rows)
    ]
    prototypes = [
        torch.nn.functional.normalize(torch.randn(k, 4).double(), dim=1) for k in clusters
    ]
    model.assignments.write(batch.index, torch.tensor(labels))
    for head, centroids in enumerate(prototypes):
        model.get_buffer(f"prototypes{head}").copy_(centroids)
    z = shared(model.projector, encode(model.backbone, batch.views))
    agrees(
        model,
        model(batch, CLOCK).losses["all"],
        plain.deepcluster(z, prototypes, labels, temperature),
    )
    commit(model)
    for view, bank in enumerate(
        model.banks
    ):  # the memory takes the large views' normalised embeddings after the step
        expected = torch.stack([plain.unit(x) for x in z[view]])
        torch.testing.assert_close(
            bank.rows[batch.index], expected.detach(), rtol=1e-12, atol=1e-14
        )
    assert len(model.banks) == min(2, views[0][1])


# --- ReLICv2 --------------------------------------------------------------------------------------


def plain_relicv2(model: Any, batch: Batch, online: tuple[Tensor, ...]) -> Tensor:
    config = model.config
    o = [
        plain.head(model.predictor, plain.head(model.projector, h))
        for h in encode(model.backbone, online)
    ]
    t = [plain.head(model.target_projector, h) for h in encode(model.target_backbone, online[:1])]
    negatives = model._negatives(batch.keys).tolist()
    contrast, invariance = plain.relicv2(
        o, t, negatives, config.temperature, same_view=config.same_view
    )
    return config.contrast_scale * contrast + config.invariance_scale * invariance


@pytest.mark.parametrize(
    ("rows", "views", "negatives", "temperature", "same_view"),
    [
        (2, LARGE, 1, 0.3, True),
        (6, MULTI, 4, 0.2, True),
        (5, MULTI, 2, 1.0, False),
        (3, ((4, 1), (2, 1)), 1, 0.1, False),
    ],
)
@pytest.mark.parametrize("same", [False, True])
def test_relicv2(
    rows: int,
    views: tuple[tuple[int, int], ...],
    negatives: int,
    temperature: float,
    same_view: bool,
    same: bool,
) -> None:
    options = {
        "contrast_scale": 0.7,
        "invariance_scale": 1.9,
        "temperature": temperature,
        "same_view": same_view,
    }
    model = make("relicv2", rows, views, hidden=6, dim=4, negatives=negatives, **options)
    batch = repeated(make_batch(rows, views)) if same else make_batch(rows, views)
    out = model(batch, CLOCK)
    agrees(model, out.losses["all"], plain_relicv2(model, batch, batch.views))
    if same:  # every candidate looks alike
        assert out.scalars["contrast"].item() == pytest.approx(math.log(1 + negatives))
        assert out.scalars["invariance"].item() == pytest.approx(0, abs=1e-14)
    else:
        assert out.scalars["invariance"] > 1e-6


def test_relicv2_masks_large_views_with_one_grey_level() -> None:
    rows, draw = 40, torch.Generator().manual_seed(1)
    share = torch.rand(3, rows, 1, 1, 1, generator=draw)
    masks = (torch.rand(3, rows, 1, 4, 4, generator=draw) < share).double()
    model = make(
        "relicv2", rows, MULTI, hidden=6, dim=4, negatives=3, mask_probability=1.0, mask_minimum=0.4
    )
    batch = make_batch(rows, MULTI, masks=masks)
    loss = model(batch, CLOCK).losses["all"]
    large, small = (x.unflatten(0, (-1, rows)) for x in model.backbone.seen)
    assert torch.equal(small, batch.views[1])
    assert torch.equal(model.target_backbone.seen[0], large.flatten(0, 1))
    black, white = batch.pixel_range.view(2, 3, 1, 1)
    levels = []
    for v in range(3):
        for n in range(rows):
            seen, given, behind = large[v, n], batch.views[0][v, n], masks[v, n, 0] == 0
            if masks[v, n].mean() < 0.4 or not behind.any():
                assert torch.equal(seen, given)
                continue
            assert torch.equal(seen[:, ~behind], given[:, ~behind])
            level = ((seen - black) / (white - black))[:, behind]
            assert level.max() - level.min() < 1e-12
            levels.append(level.mean().item())
    assert 0 <= min(levels) < 0.1
    assert 0.9 < max(levels) <= 1
    agrees(model, loss, plain_relicv2(model, batch, (large, small)))


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_relicv2_masks_each_large_view_by_its_own_draw(probability: float) -> None:
    rows, views = 600, ((4, 2), (2, 1))
    model = make("relicv2", rows, views, hidden=6, dim=4, negatives=3, mask_probability=probability)
    masks = torch.ones(2, rows, 1, 4, 4, dtype=torch.float64)
    masks[..., 0, 0] = 0
    batch = make_batch(rows, views, masks=masks)
    model(batch, CLOCK)
    masked = (
        (model.backbone.seen[0].unflatten(0, (2, rows)) != batch.views[0])
        .flatten(2)
        .any(2)
        .double()
    )
    assert masked.mean(1).tolist() == pytest.approx([probability] * 2, abs=0.06)
    assert masked.prod(0).mean().item() == pytest.approx(probability**2, abs=0.04)


def test_relicv2_draws_negatives_evenly_from_the_other_samples() -> None:
    model = make("relicv2", 5, hidden=6, dim=4, negatives=4)
    keys = torch.arange(5)
    drawn = torch.cat([model._negatives(keys + 5 * i) for i in range(1500)], 1)  # [5, 6000]
    for n in range(5):
        count = torch.bincount(drawn[n], minlength=5).tolist()
        assert count.pop(n) == 0
        assert count == pytest.approx([1500] * 4, rel=0.1)


# --- all ------------------------------------------------------------------------------------------

HEADS = {
    ("byol", "projector"): "5>6+bias norm(scale,shift) relu 6>4",
    ("byol", "predictor"): "4>6+bias norm(scale,shift) relu 6>4",
    ("byol", "target_projector"): "5>6+bias norm(scale,shift) relu 6>4",
    ("simclr", "projector"): "5>5 norm(scale,shift) relu 5>4 norm(scale)",
    ("swav", "projector"): "5>6+bias norm(scale,shift) relu 6>4+bias",
    ("deepcluster_v2", "projector"): "5>6+bias norm(scale,shift) relu 6>4+bias",
    ("relicv2", "projector"): "5>6+bias norm(scale,shift) relu 6>4",
    ("relicv2", "predictor"): "4>6+bias norm(scale,shift) relu 6>4",
    ("relicv2", "target_projector"): "5>6+bias norm(scale,shift) relu 6>4",
}
SMALL: dict[str, dict[str, Any]] = {
    "byol": {"hidden": 6, "dim": 4},
    "simclr": {"dim": 4},
    "swav": {"hidden": 6, "dim": 4, "prototypes": 5},
    "deepcluster_v2": {"hidden": 6, "dim": 4, "clusters": (3, 4)},
    "relicv2": {"hidden": 6, "dim": 4, "negatives": 3},
}


def describe(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"{layer.in_features}>{layer.out_features}" + "+bias" * (layer.bias is not None)
    if isinstance(layer, nn.ReLU):
        return "relu"
    given = [word for word, p in (("scale", layer.weight), ("shift", layer.bias)) if p is not None]
    return f"norm({','.join(given)})"


@pytest.mark.parametrize(("method", "name"), HEADS)
def test_heads_have_the_papers_layers(method: str, name: str) -> None:
    module = make(method, 8, **SMALL[method]).get_submodule(name)
    assert " ".join(map(describe, module)) == HEADS[method, name]


def test_bfloat16_rows_give_float32_losses_near_the_exact_ones() -> None:
    a, b = torch.randn(2, 6, 5).bfloat16().unbind()
    exact = [list(x.double()) for x in (a, b)]
    for fast, slow in (
        (nt_xent(a, b, 0.1), plain.nt_xent(*exact, 0.1)),
        (
            cosine_distance(a, b),
            plain.mean(2 - 2 * plain.cos(x, y) for x, y in zip(*exact, strict=True)),
        ),
    ):
        assert fast.dtype == torch.float32
        assert fast.item() == pytest.approx(slow.item(), rel=2e-6)


@pytest.mark.parametrize("method", SMALL)
def test_losses_are_exact_although_heads_compute_in_bfloat16(method: str) -> None:
    """The plain loss of the very embeddings that the heads put out under autocast."""
    rows, model = 6, make(method, 6, **SMALL[method]).float()
    batch = make_batch(rows)
    batch = Batch(
        tuple(v.float() for v in batch.views), batch.index, batch.keys, batch.pixel_range.float()
    )
    if method == "deepcluster_v2":
        model.assignments.write(batch.index, torch.arange(rows)[:, None].expand(-1, 2) % 3)
        for head in range(2):
            model.get_buffer(f"prototypes{head}").normal_()
    found: dict[str, Tensor] = {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _m, _i, out, name=name: found.update({name: out.detach()})
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch, CLOCK).losses["all"]
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    views = {
        name: [list(v) for v in x.double().unflatten(0, (-1, rows))] for name, x in found.items()
    }
    assert loss.item() == pytest.approx(exact_loss(method, model, batch, views), rel=2e-5)


def exact_loss(method: str, model: Any, batch: Batch, views: dict[str, Any]) -> float:
    if method == "byol":
        return plain.byol(views["predictor"], views["target_projector"]).item()
    if method == "simclr":
        return plain.nt_xent(*views["projector"], 0.1).item()
    if method == "swav":
        return plain.swav(views["projector"], model.prototypes.weight.double(), 0.1, 0.05, 3).item()
    if method == "deepcluster_v2":
        heads = [model.get_buffer(f"prototypes{h}").double() for h in range(2)]
        return plain.deepcluster(
            views["projector"], heads, [[n % 3] * 2 for n in range(len(batch))], 0.1
        ).item()
    negatives = model._negatives(batch.keys).tolist()
    contrast, invariance = plain.relicv2(
        views["predictor"], views["target_projector"], negatives, 0.3
    )
    return (0.3 * contrast + 1.5 * invariance).item()
