"""SimSiam, ReLIC, Barlow Twins and VICReg: loss and gradient against plain sums over samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kit import plain_losses as plain
from kit.tiny import CLOCK, agrees, encode, make, make_batch, repeated
from test_losses import describe
from torch import Tensor

from scaletrain.core import Batch
from scaletrain.methods.simsiam import spread

SHAPES = [(2, 4, 3), (5, 7, 6), (9, 3, 2)]
SMALL: dict[str, dict[str, Any]] = {
    "simsiam": {"hidden": 6, "dim": 4, "bottleneck": 3},
    "relic": {"hidden": 6, "dim": 4},
    "barlow_twins": {"hidden": 6, "dim": 4},
    "vicreg": {"hidden": 6, "dim": 4},
}


def through(model: Any, batch: Batch, *names: str) -> list[list[Tensor]]:
    """[views][samples] behind the heads of these names, statistics per view."""
    views = encode(model.get_submodule(names[0]), batch.views)
    for name in names[1:]:
        views = [plain.head(model.get_submodule(name), view) for view in views]
    return views


# --- SimSiam --------------------------------------------------------------------------------------


def plain_simsiam(p: plain.Views, z: plain.Views) -> Tensor:
    """Eq. 2: D(p1, sg z2) / 2 + D(p2, sg z1) / 2 with D the negative cosine, mean over samples."""
    return plain.mean(
        -plain.cos(p[0][n], z[1][n].detach()) / 2 - plain.cos(p[1][n], z[0][n].detach()) / 2
        for n in range(len(p[0]))
    )


@pytest.mark.parametrize(("rows", "hidden", "dim"), SHAPES)
@pytest.mark.parametrize("same", [False, True])
def test_simsiam(rows: int, hidden: int, dim: int, same: bool) -> None:
    model, batch = (
        make("simsiam", rows, hidden=hidden, dim=dim, bottleneck=hidden + 1),
        make_batch(rows),
    )
    # the two views are equal, the samples are not: equal samples have no direction behind the last
    # norm
    if same:
        batch = Batch(
            (batch.views[0][:1].expand(2, -1, -1, -1, -1) * 1,),
            batch.index,
            batch.keys,
            batch.pixel_range,
        )
    z = through(model, batch, "backbone", "projector")
    p = [plain.head(model.predictor, view) for view in z]
    agrees(model, model(batch, CLOCK).losses["all"], plain_simsiam(p, z))


def test_the_spread_of_simsiam_tells_collapse() -> None:
    assert spread(
        torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    ).item() == pytest.approx(1, abs=0.02)
    assert spread(torch.ones(8, 4) * torch.arange(1, 9)[:, None]).item() == pytest.approx(
        0, abs=1e-6
    )


# --- ReLIC ----------------------------------------------------------------------------------------


def plain_relic(o: plain.Views, t: plain.Views, temperature: float) -> tuple[Tensor, Tensor]:
    """-log p and KL(p || sg p') where p compares view a with all targets of view b, and p' view b
    with those of view a.
    """
    contrast, invariance = [], []
    for n in range(len(o[0])):
        log_p = [
            plain.log_softmax([plain.cos(o[a][n], x.detach()) / temperature for x in t[b]])
            for a, b in ((0, 1), (1, 0))
        ]
        contrast.append(-log_p[0][n] - log_p[1][n])
        pairs = [
            p.exp() * (p - q.detach())
            for a in (0, 1)
            for p, q in zip(log_p[a], log_p[1 - a], strict=True)
        ]
        invariance.append(sum(pairs, torch.zeros((), dtype=torch.float64)))
    return plain.mean(contrast), plain.mean(invariance)


@pytest.mark.parametrize(("rows", "hidden", "dim"), SHAPES)
@pytest.mark.parametrize(("temperature", "alpha"), [(0.1, 1.0), (0.7, 2.5), (0.3, 0.0)])
def test_relic(rows: int, hidden: int, dim: int, temperature: float, alpha: float) -> None:
    model = make("relic", rows, hidden=hidden, dim=dim, temperature=temperature, alpha=alpha)
    batch = make_batch(rows)
    o = through(model, batch, "backbone", "projector", "predictor")
    contrast, invariance = plain_relic(
        o, through(model, batch, "target_backbone", "target_projector"), temperature
    )
    out = model(batch, CLOCK)
    agrees(model, out.losses["all"], contrast + alpha * invariance)
    assert out.scalars["invariance"].item() == pytest.approx(invariance.item())
    assert invariance > 1e-6


def test_relic_of_equal_embeddings_is_the_logarithm_of_the_candidates() -> None:
    out = make("relic", 5, hidden=6, dim=4)(repeated(make_batch(5)), CLOCK)
    assert out.scalars["contrast"].item() == pytest.approx(2 * math.log(5))
    assert out.scalars["invariance"].item() == pytest.approx(0, abs=1e-14)


# --- Barlow Twins ---------------------------------------------------------------------------------


def plain_barlow(z: plain.Views, lambd: float) -> Tensor:
    """Eq. 1 and 2 over standardised channels, entry by entry."""
    a, b = (plain.norm(view, None, None) for view in z)
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(a[0])):
        for j in range(len(a[0])):
            c = plain.mean(x[i] * y[j] for x, y in zip(a, b, strict=True))
            loss = loss + ((1 - c) ** 2 if i == j else lambd * c**2)
    return loss


@pytest.mark.parametrize(("rows", "hidden", "dim"), [*SHAPES, (4, 3, 1)])
@pytest.mark.parametrize(("lambd", "scale"), [(0.0051, 1.0), (0.3, 0.1)])
@pytest.mark.parametrize("same", [False, True])
def test_barlow_twins(
    rows: int, hidden: int, dim: int, lambd: float, scale: float, same: bool
) -> None:
    model = make("barlow_twins", rows, hidden=hidden, dim=dim, lambd=lambd, scale=scale)
    batch = repeated(make_batch(rows)) if same else make_batch(rows)
    out = model(batch, CLOCK)
    agrees(
        model,
        out.losses["all"],
        scale * plain_barlow(through(model, batch, "backbone", "projector"), lambd),
    )
    if same:  # no sample differs from the mean: C = 0
        assert out.losses["all"].item() == pytest.approx(scale * dim)


def test_barlow_twins_gives_biases_and_norms_their_own_rate() -> None:
    model = make("barlow_twins", 4, bias_lr=0.25, **SMALL["barlow_twins"])
    (group,) = model.groups()
    assert group.lr == 0.25
    chosen = {name for name, p in model.named_parameters() if group.match(name, p)}
    assert chosen == {
        "projector.1.weight",
        "projector.1.bias",
        "projector.4.weight",
        "projector.4.bias",
    }


# --- VICReg ---------------------------------------------------------------------------------------


def plain_vicreg(z: plain.Views, weights: tuple[float, float, float]) -> Tensor:
    """lambda * mean square difference + mu * (v(z) + v(z')) / 2 + nu * (c(z) + c(z')), the
    covariances over B - 1.
    """
    rows, dim = len(z[0]), len(z[0][0])
    invariance = plain.mean((x[d] - y[d]) ** 2 for x, y in zip(*z, strict=True) for d in range(dim))
    variance, covariance = [], torch.zeros((), dtype=torch.float64)
    for view in z:
        middle = plain.mean(view)
        cov = [
            [sum((x - middle)[i] * (x - middle)[j] for x in view) / (rows - 1) for j in range(dim)]
            for i in range(dim)
        ]
        hinges = [1 - (cov[d][d] + 1e-4).sqrt() for d in range(dim)]  # type: ignore[union-attr]
        variance.append(plain.mean(h if h > 0 else 0 * h for h in hinges))
        covariance = (
            covariance + sum(cov[i][j] ** 2 for i in range(dim) for j in range(dim) if i != j) / dim
        )
    return weights[0] * invariance + weights[1] * plain.mean(variance) + weights[2] * covariance


@pytest.mark.parametrize(("rows", "hidden", "dim"), [*SHAPES, (4, 3, 1)])
@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (0.5, 0.1, 3.0)])
@pytest.mark.parametrize("same", [False, True])
def test_vicreg(
    rows: int, hidden: int, dim: int, weights: tuple[float, float, float], same: bool
) -> None:
    options: dict[str, Any] = dict(
        zip(("invariance", "variance", "covariance"), weights, strict=True)
    )
    model = make("vicreg", rows, hidden=hidden, dim=dim, **options)
    batch = repeated(make_batch(rows)) if same else make_batch(rows)
    out = model(batch, CLOCK)
    agrees(
        model,
        out.losses["all"],
        plain_vicreg(through(model, batch, "backbone", "projector"), weights),
    )
    if same:  # sqrt(1e-4) is all that is left of the deviations
        assert out.losses["all"].item() == pytest.approx(weights[1] * 0.99)
    else:
        assert out.scalars["covariance"] > 0 or dim == 1


def test_vicreg_refuses_a_batch_of_one() -> None:
    with pytest.raises(ValueError, match="set batch to at least 2"):
        make("vicreg", 1)


# --- all ------------------------------------------------------------------------------------------

HEADS = {
    ("simsiam", "projector"): "5>6 norm(scale,shift) relu 6>6 norm(scale,shift) relu 6>4 norm()",
    ("simsiam", "predictor"): "4>3 norm(scale,shift) relu 3>4+bias",
    ("relic", "projector"): "5>6+bias norm(scale,shift) relu 6>4",
    ("relic", "predictor"): "4>6+bias norm(scale,shift) relu 6>4",
    ("relic", "target_projector"): "5>6+bias norm(scale,shift) relu 6>4",
    ("barlow_twins", "projector"): "5>6 norm(scale,shift) relu 6>6 norm(scale,shift) relu 6>4",
    ("vicreg", "projector"): "5>6+bias norm(scale,shift) relu 6>6+bias norm(scale,shift) relu 6>4",
    ("directpred", "projector"): "5>6+bias norm(scale,shift) relu 6>4",
    ("directpred", "target_projector"): "5>6+bias norm(scale,shift) relu 6>4",
    ("c_simclr", "projector"): "5>6 norm(scale,shift) relu 6>4",
    ("c_byol", "projector"): "5>6+bias norm(scale,shift) relu 6>4",
    ("c_byol", "encoder"): "4>6+bias norm(scale,shift) relu 6>4",
    ("c_byol", "prior"): "4>6+bias norm(scale,shift) relu 6>4",
    ("c_byol", "target_projector"): "5>6+bias norm(scale,shift) relu 6>4",
}


@pytest.mark.parametrize(("method", "name"), HEADS)
def test_heads_have_the_papers_layers(method: str, name: str) -> None:
    module = make(method, 8, **SMALL.get(method, {"hidden": 6, "dim": 4})).get_submodule(name)
    assert " ".join(map(describe, module)) == HEADS[method, name]


@pytest.mark.parametrize("method", SMALL)
def test_losses_are_exact_although_heads_compute_in_bfloat16(method: str) -> None:
    """The plain loss of the very embeddings that the heads put out under autocast."""
    rows, model = 6, make(method, 6, **SMALL[method]).float()
    batch = make_batch(rows)
    batch = Batch(
        tuple(v.float() for v in batch.views), batch.index, batch.keys, batch.pixel_range.float()
    )
    found: dict[str, Tensor] = {}
    for name in ("projector", "predictor", "target_projector"):
        if hasattr(model, name):
            hook = lambda _m, _i, out, name=name: found.update({name: out.detach()})  # noqa: E731
            model.get_submodule(name).register_forward_hook(hook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch, CLOCK).losses["all"]
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    z = {name: [list(v) for v in x.double().unflatten(0, (-1, rows))] for name, x in found.items()}
    if method == "simsiam":
        exact = plain_simsiam(z["predictor"], z["projector"])
    elif method == "relic":
        exact = sum(plain_relic(z["predictor"], z["target_projector"], 0.1))  # type: ignore[assignment]
    else:
        exact = (
            plain_barlow(z["projector"], 0.0051)
            if method == "barlow_twins"
            else plain_vicreg(z["projector"], (25, 25, 1))
        )
    assert loss.item() == pytest.approx(exact.item(), rel=2e-5)
