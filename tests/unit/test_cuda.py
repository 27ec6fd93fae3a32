"""The GPU against the CPU. The same cases run on the CPU against itself, which shows that they can
run at all.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from kit import heads, small
from kit.data import write_shards

from benchmarks.gpu import comparison
from scaletrain.config.schema import DataConfig, View
from scaletrain.core import Clock
from scaletrain.data.loading.loader import Stream, open_stream
from scaletrain.doctor import parity
from scaletrain.engines.base import Engine
from scaletrain.evals.predictions import Drawn, Ranked
from scaletrain.train.build import build

GPU = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="NO GPU HERE: the CUDA paths were NOT tested"
    ),
)
CLOCK = Clock(0, 20, 0, small.STEPS_PER_EPOCH)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("name", list(parity.CASES))
def test_operation_agrees_with_the_cpu(name: str, device: str) -> None:
    case, tolerance = parity.CASES[name]
    assert parity.difference(case, torch.device(device)) <= tolerance


def step(method: str, device: str, precision: str) -> dict[str, torch.Tensor]:
    """The loss of one step, and the parameters after it as they moved."""
    cfg = small.config(method, engine={"precision": precision})
    engine = build(cfg, small.SAMPLES, small.STEPS_PER_EPOCH, torch.device(device))
    before = {
        name: p.detach().cpu().double().clone() for name, p in engine.method.named_parameters()
    }
    batch = comparison.batch(cfg, 0, torch.device(device))
    loss = engine.step(batch, CLOCK, cfg.optim.lr, cfg.optim.lr).loss
    moves = {
        name: p.detach().cpu().double() - before[name]
        for name, p in engine.method.named_parameters()
    }
    return {"loss": torch.tensor(loss, dtype=torch.float64), **moves}


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The loss's relative difference, or the moves' as one long vector if that is larger."""
    one, other = (torch.cat([v.flatten() for k, v in x.items() if k != "loss"]) for x in (a, b))
    return max(
        float((a["loss"] - b["loss"]).abs() / b["loss"].abs()),
        float((one - other).norm() / other.norm()),
    )


@pytest.mark.parametrize("method", ["simclr", "byol"])
@pytest.mark.parametrize(
    ("device", "precision", "tolerance"),
    [
        pytest.param(
            "cuda", "fp64", 1e-9, marks=GPU.marks
        ),  # the mathematics, free of TF32 and rounding
        pytest.param(
            "cuda", "fp32", 5e-2, marks=GPU.marks
        ),  # convolutions may use TF32, which has 10 bits
        pytest.param("cuda", "bf16", 0.4, marks=GPU.marks),
        ("cpu", "fp32", 1e-4),
        (
            "cpu",
            "bf16",
            0.4,
        ),  # 7 bits through 20 layers; the loss magnifies them by a temperature of 0.1
    ],
)
def test_a_step_agrees_with_float64_on_the_cpu(
    method: str, device: str, precision: str, tolerance: float
) -> None:
    assert apart(step(method, device, precision), step(method, "cpu", "fp64")) < tolerance


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_difference_is_found(device: str) -> None:
    def case(where: torch.device) -> list[torch.Tensor]:
        wrong = case.calls == 0  # type: ignore[attr-defined]
        case.calls += 1  # type: ignore[attr-defined]
        return [
            torch.tensor(
                [1.0, 2.0 + 0.02 * wrong, float("nan") if wrong and case.nan else 0.0], device=where
            )
        ]  # type: ignore[attr-defined]

    for nan, expected in ((False, 0.01), (True, float("inf"))):
        case.calls, case.nan = 0, nan  # type: ignore[attr-defined]
        assert parity.difference(case, torch.device(device)) == pytest.approx(expected)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_step_that_is_not_finite_leaves_no_trace(device: str) -> None:
    config = small.config("byol")
    assert comparison.changed_by_skipped_step(config, torch.device(device)) == set()


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_trace_of_a_skipped_step_is_found(device: str) -> None:
    """An engine that takes every step for a good one."""
    config = small.config("byol")
    with mock.patch.object(Engine, "_agree", return_value=(0.0, True)):
        assert comparison.changed_by_skipped_step(config, torch.device(device))


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_batches_of_workers_arrive_whole(device: str, tmp_path: Path) -> None:
    """A GPU that is busy copies them late, when their memory could be in use again."""
    data = DataConfig(
        path=str(write_shards(tmp_path / "d", (48,), masks=True)),
        lanes=2,
        window=2,
        foreground={"masks": True},
        prefetch=1,
    )
    data = data.model_copy(update={"views": (View(size=128, count=2),)})

    def batches(place: torch.device, workers: int) -> Stream:
        given = data.model_copy(update={"workers": workers})
        return open_stream(given, seed=1, batch=8, rank=0, world=1, device=place)

    work, found = torch.ones(2048, 2048, device=device), []
    for batch in batches(torch.device(device), 1).batches(0, 24):
        found.append(batch)
        if device == "cuda":
            for _ in range(20):
                work = work @ work

    for batch, whole in zip(found, batches(torch.device("cpu"), 0).batches(0, 24), strict=True):
        for name in ("index", "keys", "labels", "masks"):
            assert torch.equal(getattr(batch, name).cpu(), getattr(whole, name)), name
        assert torch.allclose(batch.views[0].cpu(), whole.views[0], atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("knn", {"ks": (5,)}),
        ("linear", {"epochs": 5, "augment": False}),
        ("logistic", {"strengths": 5}),
        ("svm", {"costs": (0.1, 10.0)}),
        ("fewshot", {"shots": (5,), "draws": 2}),
    ],
)
def test_a_head_agrees_with_the_cpu(name: str, settings: dict[str, object], device: str) -> None:
    """All but a few images near a border between classes."""
    train, test = heads.blobs(200, 1.5, 0), heads.blobs(100, 1.5, 1)
    here, there = heads.Context(train, test), heads.Context(train, test)
    there.device = torch.device(device)
    (_, one), (_, other) = (heads.measured(name, part, **settings) for part in (here, there))

    for key, prediction in one.predictions.items():
        if isinstance(prediction, Ranked | Drawn):
            found = other.predictions[key]
            assert isinstance(found, Ranked | Drawn)
            assert (prediction.predicted != found.predicted).double().mean() <= 0.02
