"""C-SimCLR and C-BYOL: the von Mises-Fisher distribution against its integral, and both losses
against plain sums.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from kit import plain_losses as plain
from kit.tiny import CLOCK, agrees, encode, make, make_batch, repeated, shared
from torch import Tensor

from scaletrain import rng
from scaletrain.core import Batch
from scaletrain.nn.vmf import VonMisesFisher

SHAPES = [
    (2, 2, 5.0, 3.0),
    (6, 4, 40.0, 10.0),
    (5, 3, 900.0, 0.5),
    (4, 8, 16384.0, 10.0),
]  # rows, dim, kappa e and b


@functools.cache
def angles(dim: int, kappa: float) -> tuple[float, Tensor, Tensor]:
    """Log of the integral of exp(kappa cos a) sin(a)^(dim - 2) over the angle; the angles and their
    probabilities.
    """
    a = torch.linspace(0, math.pi, 50_001, dtype=torch.float64)[1:-1]
    log = kappa * a.cos() + (dim - 2) * a.sin().log()
    weights = (log - log.max()).exp()
    return float(log.max() + (weights.sum() * (a[1] - a[0])).log()), a, weights / weights.sum()


# --- the distribution -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "kappa"), [(3, 10.0), (3, 0.5), (8, 40.0), (128, 1024.0), (256, 16384.0), (5, 0.0)]
)
def test_samples_have_the_distributions_moments(dim: int, kappa: float) -> None:
    n, vmf = 10_000, VonMisesFisher(dim, kappa)
    mean = torch.nn.functional.normalize(
        torch.randn(dim, generator=torch.Generator().manual_seed(1)).double(), dim=0
    )
    z = vmf.sample(mean.expand(n, -1), torch.arange(n), "test")
    torch.testing.assert_close(z.norm(dim=1), torch.ones(n).double())
    log, a, p = angles(dim, kappa)
    assert vmf.log_normaliser == pytest.approx(log, abs=1e-5)
    cosine = (p * a.cos()).sum().item()
    deviation = ((p * a.cos().square()).sum().item() - cosine**2) ** 0.5
    found = z @ mean
    assert abs(found.mean().item() - cosine) < 4 * deviation / n**0.5
    assert found.std().item() == pytest.approx(deviation, rel=0.04)
    third = ((found - found.mean()) / found.std()).pow(3).mean().item()
    assert third == pytest.approx((p * ((a.cos() - cosine) / deviation) ** 3).sum().item(), abs=0.1)
    across = z - found[:, None] * mean  # no direction across the mean is preferred
    assert across.mean(0).norm() < 5 * (across.square().sum(1).mean() / n) ** 0.5


def test_a_sample_depends_on_its_key_alone() -> None:
    vmf, mean = VonMisesFisher(3, 4.0), torch.tensor([[0.0, 1.0, 0.0]]).expand(5, -1).double()
    keys = torch.tensor([3, 9, 4, 1, 7])
    z = vmf.sample(mean, keys, "a")
    assert torch.equal(vmf.sample(mean[:2], keys[3:], "a"), z[3:])
    assert not torch.equal(vmf.sample(mean, keys, "b"), z)


def test_one_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set method\.dim"):
        VonMisesFisher(1, 4.0)


# --- the losses -----------------------------------------------------------------------------------


def log_density(mean: Tensor, z: Tensor, kappa: float) -> Tensor:
    return kappa * (mean * z).sum() - angles(len(mean), kappa)[0]


def code(mean: Tensor, cosine: Tensor, key: Tensor, purpose: str) -> Tensor:
    """The sample at this cosine to the mean, across it in the direction of a Gaussian that is drawn
    by the key.
    """
    draws = rng.uniform(key, purpose, len(mean) + 1)[1:].tolist()
    noise = torch.tensor([NormalDist().inv_cdf(u + 2.0**-25) for u in draws], dtype=torch.float64)
    across = noise - (noise * mean).sum() * mean
    return cosine * mean + (1 - cosine * cosine).sqrt() * plain.unit(across)


def codes(vmf: Any, mean: plain.Views, keys: Tensor) -> list[list[Tensor]]:
    """[views][samples]; only the cosines are the model's own, which
    test_samples_have_the_distributions_moments proves.
    """
    result = []
    for view, purpose in zip(mean, ("code1", "code2"), strict=True):
        units = [plain.unit(v) for v in view]
        drawn = vmf.sample(torch.stack(units).detach(), keys, purpose)
        cosines = [(z * u).sum().detach() for z, u in zip(drawn, units, strict=True)]
        result.append(
            [code(u, c, k, purpose) for u, c, k in zip(units, cosines, keys, strict=True)]
        )
    return result


def plain_c_simclr(
    r: plain.Views, z: plain.Views, kappa_e: float, kappa_b: float, beta: float
) -> Tensor:
    """beta (log e - log b) - log of b(z | y) over its sum with all other views of the batch; both
    directions summed.
    """
    losses = []
    for v in (0, 1):
        for n, sample in enumerate(z[v]):
            x, y = [plain.unit(a) for a in r[v]], [plain.unit(a) for a in r[1 - v]]
            residual = log_density(x[n], sample, kappa_e) - log_density(y[n], sample, kappa_b)
            others = [*y[:n], *y[n + 1 :], *x[:n], *x[n + 1 :]]
            found = plain.log_softmax([kappa_b * (sample * c).sum() for c in (y[n], *others)])[0]
            losses.append(beta * residual - found)
    return 2 * plain.mean(losses)


@pytest.mark.parametrize(("rows", "dim", "kappa_e", "kappa_b"), SHAPES)
@pytest.mark.parametrize(("beta", "same"), [(1.0, False), (0.3, False), (1.0, True)])
def test_c_simclr(
    rows: int, dim: int, kappa_e: float, kappa_b: float, beta: float, same: bool
) -> None:
    model = make("c_simclr", rows, dim=dim, kappa_e=kappa_e, kappa_b=kappa_b, beta=beta)
    batch = repeated(make_batch(rows)) if same else make_batch(rows)
    r = shared(model.projector, encode(model.backbone, batch.views))
    if same:  # behind the last norm equal samples have no direction
        r = [[x + 1 for x in view] for view in r]
        model.projector.register_forward_hook(lambda _m, _i, out: out + 1)
    slow = plain_c_simclr(r, codes(model.e, r, batch.keys), kappa_e, kappa_b, beta)
    close(model, model(batch, CLOCK), slow, same)


def plain_c_byol(
    model: Any, mean: plain.Views, t: plain.Views, prior: plain.Views, keys: Tensor
) -> Tensor:
    """kappa_d / 2 times BYOL's loss of the decoded codes, plus beta (log e(z | x) - log b(z | y)),
    summed over views.
    """
    config, z = model.config, codes(model.e, mean, keys)
    byol = plain.byol([[model.decoder.weight @ x for x in view] for view in z], t)
    residual = []
    for v in (0, 1):
        b = prior[1 - v] if config.residual == "other" else prior[v]
        for n, x in enumerate(z[v]):
            e = log_density(plain.unit(mean[v][n]), x, config.kappa_e)
            residual.append(2 * (e - log_density(plain.unit(b[n]), x, config.kappa_b)))
    loss: Tensor = config.kappa_d / 2 * byol + config.beta * plain.mean(residual)
    return loss


@pytest.mark.parametrize(("rows", "dim", "kappa_e", "kappa_b"), SHAPES)
@pytest.mark.parametrize(
    ("beta", "residual", "same"), [(1.0, "other", False), (0.3, "own", False), (1.0, "other", True)]
)
def test_c_byol(
    rows: int, dim: int, kappa_e: float, kappa_b: float, beta: float, residual: str, same: bool
) -> None:
    kappas: dict[str, Any] = {"kappa_e": kappa_e, "kappa_b": kappa_b, "kappa_d": 3.0}
    model = make("c_byol", rows, hidden=6, dim=dim, beta=beta, residual=residual, **kappas)
    batch = repeated(make_batch(rows)) if same else make_batch(rows)

    def heads(views: plain.Views, *names: str) -> plain.Views:
        for name in names:
            views = [plain.head(model.get_submodule(name), view) for view in views]
        return views

    mean = heads(encode(model.backbone, batch.views), "projector", "encoder")
    t = heads(encode(model.target_backbone, batch.views), "target_projector")
    prior = heads([[plain.unit(x).detach() for x in view] for view in t], "prior")
    close(model, model(batch, CLOCK), plain_c_byol(model, mean, t, prior, batch.keys), same)


def close(model: Any, out: Any, slow: Tensor, same: bool) -> None:
    """As `agrees`, once the constant that the two quadratures disagree by is taken out; the
    gradients must agree as they are.

    Those of equal samples vanish behind a norm, which divides what rounding leaves of them by
    sqrt(1e-5).
    """
    fast = out.losses["all"]
    assert fast.item() == pytest.approx(slow.item(), rel=1e-6, abs=2e-4)
    if not same:
        agrees(model, fast - fast.item() + slow.item(), slow)
        return
    parameters = list(model.projector.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["c_simclr", "c_byol"])
def test_losses_are_exact_although_heads_compute_in_bfloat16(method: str) -> None:
    options: dict[str, Any] = {
        "dim": 4,
        "kappa_e": 50.0,
        **({"hidden": 6} if method == "c_byol" else {}),
    }
    model, batch = make(method, 6, **options).float(), make_batch(6)
    batch = Batch(
        tuple(v.float() for v in batch.views), batch.index, batch.keys, batch.pixel_range.float()
    )
    found: dict[str, Tensor] = {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _m, _i, out, name=name: found.update({name: out.detach()})
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch, CLOCK).losses["all"]
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    z = {
        name: [list(v) for v in x.double().unflatten(0, (-1, 6))]
        for name, x in found.items()
        if name != "decoder"
    }
    if method == "c_simclr":
        exact = plain_c_simclr(
            z["projector"], codes(model.e, z["projector"], batch.keys), 50.0, 10.0, 1.0
        )
    else:
        decoded = [list(v) for v in found["decoder"].double()]
        exact = 2 * plain.byol(decoded, z["target_projector"]) + plain_residual(
            model, z, batch.keys
        )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)


def plain_residual(model: Any, z: dict[str, list[list[Tensor]]], keys: Tensor) -> Tensor:
    drawn = codes(model.e, z["encoder"], keys)
    terms = [
        log_density(plain.unit(z["encoder"][v][n]), x, 50.0)
        - log_density(plain.unit(z["prior"][1 - v][n]), x, 10.0)
        for v in (0, 1)
        for n, x in enumerate(drawn[v])
    ]
    return 2 * plain.mean(terms)
