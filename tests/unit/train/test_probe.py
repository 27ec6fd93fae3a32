"""The online probe learns, resumes, and leaves no trace in the training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from kit import evals, pipelines, ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from scaletrain import dist
from scaletrain.checkpoint import reader
from scaletrain.config import load
from scaletrain.config.recipe import ConfigError
from scaletrain.core import Batch, StepResult
from scaletrain.train import probe, records
from scaletrain.train.loop import train

ENGINES = ("ddp", "fsdp2", "deepspeed", "fairscale")
CPU = torch.device("cpu")


def run(folder: Path, name: str, *overrides: str, **options: Any) -> Path:
    """A run on the shards of `labelled`, after which the ranks stay together."""
    words = [f"data.path={folder / 'train'}", "engine.precision=fp32", *overrides]
    with mock.patch.object(dist, "shutdown"):
        train(load.load(folder / "recipe.yaml", words), folder / name, **options)
    return folder / name


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    (folder / "recipe.yaml").write_text(pipelines.RECIPE)
    evals.shards(folder / "train", [n % 4 for n in range(32)])
    return folder


@pytest.fixture(scope="module")
def whole(labelled: Path) -> Path:
    return run(labelled, "whole", "monitor.probe=true")


@pytest.fixture(scope="module")
def plain(labelled: Path) -> Path:
    return run(labelled, "plain")


def tensors(run: Path, *, probe: bool = False) -> dict[str, torch.Tensor]:
    """Those of the newest checkpoint, of the training or of the probe."""
    return {
        name: tensor
        for name, tensor in pipelines.tensors(run).items()
        if name.startswith("probe.") == probe
    }


def curve(run: Path) -> list[tuple[Any, ...]]:
    names = ("train/loss", "probe/loss", "probe/top1")
    return [(r.step, *map(r.scalars.get, names)) for r in records.read(run).steps]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- no trace -------------------------------------------------------------------------------------


def every_engine(folder: Path) -> dict[str, torch.Tensor]:
    """Train with and without the probe on these ranks, without leaving them in between."""
    for engine in ENGINES:
        for name, given in (("plain", "false"), ("probe", "true")):
            at = f"{dist.world()}-{engine}-{name}"
            run(folder, at, f"engine={{name: {engine}}}", "steps=2", f"monitor.probe={given}")
    return {}


@pytest.fixture(scope="module")
def trained(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for world in (1, 2):
        ranks.run(world, every_engine, tmp_path_factory.mktemp("ranks"), labelled)
    return labelled


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [1, 2])
def test_it_changes_no_bit_of_the_training(world: int, engine: str, trained: Path) -> None:
    with_it, without = (trained / f"{world}-{engine}-{name}" for name in ("probe", "plain"))
    assert same(tensors(with_it), tensors(without))
    losses, others = ([loss for _, loss, *_ in curve(each)] for each in (with_it, without))
    assert losses == others
    assert tensors(with_it, probe=True)["probe.weights"].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_it_learns_from_the_samples_of_all_ranks(engine: str, trained: Path) -> None:
    one, two = (trained / f"{world}-{engine}-probe" for world in (1, 2))
    for point, other in zip(curve(one), curve(two), strict=True):
        assert point == pytest.approx(other, rel=1e-3)
    theirs = tensors(two, probe=True)
    for name, tensor in tensors(one, probe=True).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0.05, atol=2e-4)


def test_it_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    own = probe.OnlineProbe(3, 2, CPU)
    own.step(result(torch.ones(4, 3)), batch([0, 1, 1, 0]))
    assert torch.equal(torch.get_rng_state(), before)


# --- what it computes -----------------------------------------------------------------------------


def result(embedding: torch.Tensor | None, *, skipped: bool = False) -> StepResult:
    return StepResult(0.0, {}, torch.zeros(()), embedding=embedding, skipped=skipped)


def batch(labels: list[int]) -> Batch:
    rows = torch.arange(len(labels))
    return Batch((), rows, rows, torch.zeros(2, 3), torch.tensor(labels))


def test_it_is_a_linear_classifier_trained_by_adam() -> None:
    """As torch computes it, with samples without a label and a micro-batch, the last of two."""
    draw = torch.Generator().manual_seed(0)
    own, layer = probe.OnlineProbe(5, 3, CPU), torch.nn.utils.skip_init(torch.nn.Linear, 5, 3)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    adam = torch.optim.Adam(layer.parameters(), lr=1e-3)

    for _ in range(20):
        x = torch.randn(12, 5, generator=draw, dtype=torch.bfloat16)
        labels = torch.randint(-1, 3, (24,), generator=draw)
        loss = F.cross_entropy(logits := layer(x.float()), labels[12:], ignore_index=-1)
        known = labels[12:] >= 0
        right = (logits.argmax(1) == labels[12:])[known].float().mean()
        scalars = own.step(result(x), batch(labels.tolist()))
        assert float(scalars["probe/loss"]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(scalars["probe/top1"]) == pytest.approx(100 * float(right))

        adam.zero_grad()
        loss.backward()
        adam.step()
        expected = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        torch.testing.assert_close(own.weights, expected, rtol=1e-4, atol=1e-6)


def test_steps_that_teach_nothing_leave_it_finite() -> None:
    own = probe.OnlineProbe(2, 2, CPU)
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    own.step(result(x, skipped=True), batch([0, 1]))
    assert int(own.steps) == 0
    unknown = own.step(result(x), batch([-1, -1]))
    assert math.isnan(float(unknown["probe/top1"]))
    own.step(result(x * math.inf), batch([0, 1]))
    assert not own.weights.any()
    own.step(result(x), batch([0, 1]))
    assert own.weights.isfinite().all()
    assert own.weights.any()
    for other in (None, torch.ones(2, 3)):
        with pytest.raises(ConfigError, match=r"monitor\.probe=true: this method does not report"):
            own.step(result(other), batch([0, 1]))


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_it_learns_whatever_the_scale_of_the_features(scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 64, generator=draw)
    own, seen = probe.OnlineProbe(64, 10, CPU), []
    for _ in range(150):
        labels = torch.randint(0, 10, (64,), generator=draw)
        x = F.relu(centres[labels] + torch.randn(64, 64, generator=draw)) * scale
        seen.append(own.step(result(x), batch(labels.tolist())))

    assert float(seen[0]["probe/loss"]) == pytest.approx(math.log(10), rel=1e-6)
    assert sum(float(scalars["probe/top1"]) for scalars in seen[-20:]) / 20 > 90


# --- checkpoints ----------------------------------------------------------------------------------


def cut(run: Path, name: str) -> Path:
    """A copy of a run of six steps that was killed after the fourth."""
    copy = Path(shutil.copytree(run, run.parent / name))
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    return copy


def test_its_curves_are_in_tensorboard_too(whole: Path) -> None:
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    for place, name in enumerate(("probe/loss", "probe/top1"), 2):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(c[0], pytest.approx(c[place], rel=1e-6)) for c in curve(whole)]


def test_it_resumes_bit_for_bit(labelled: Path, whole: Path) -> None:
    half = cut(whole, "half")
    run(labelled, "half", "monitor.probe=true")
    assert curve(half) == curve(whole)
    assert same(tensors(half), tensors(whole))
    assert same(tensors(half, probe=True), tensors(whole, probe=True))


def test_a_run_may_begin_and_end_with_or_without_it(
    labelled: Path, whole: Path, plain: Path
) -> None:
    less = cut(whole, "less")
    run(labelled, "less", change=True)
    assert same(tensors(less), tensors(plain))
    assert tensors(less, probe=True) == {}

    more = cut(plain, "more")
    run(labelled, "more", "monitor.probe=true", change=True)
    assert same(tensors(more), tensors(whole))
    assert int(tensors(more, probe=True)["probe.steps"]) == 2
    (line,) = (more / "changes.jsonl").read_text().splitlines()
    changes = json.loads(line)["changes"]
    assert changes == [
        "monitor.probe: False -> True",
        "the online probe starts at zero: the checkpoint has none",
    ]

    run(labelled, "next", "monitor.probe=true", continues=whole)
    assert int(tensors(labelled / "next", probe=True)["probe.steps"]) == 12

    saved = reader.latest(whole / "checkpoints")
    assert saved is not None
    smaller = probe.OnlineProbe(4, 2, CPU)
    assert "other classes or features" in smaller.restore(saved)[0]
    assert not smaller.weights.any()


def test_it_needs_labels(labelled: Path) -> None:
    evals.shards(labelled / "unlabelled", [None] * 16)
    with pytest.raises(
        ConfigError,
        match=r"monitor\.probe=true needs labels, and 16 of 16 samples have no label.*set "
        r"monitor\.probe=false",
    ):
        run(labelled, "refused", f"data.path={labelled / 'unlabelled'}", "monitor.probe=true")
