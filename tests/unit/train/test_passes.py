"""Passes over the data between steps: which images and samples they show, in which mode, and what
is left of them; and the hook after the last step.
"""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.data import children, joined, write_shards
from torch import Tensor

from scaletrain.checkpoint import reader
from scaletrain.config import load, schema
from scaletrain.core import Batch, Clock, Features, Write
from scaletrain.data.loading.loader import Stream, open_stream
from scaletrain.engines.base import Engine
from scaletrain.runtime.signals import Interrupt, Stopped
from scaletrain.train import records
from scaletrain.train.build import build
from scaletrain.train.loop import train
from scaletrain.train.passes import Passes
from scaletrain.train.session import whole_images

VIEWS = [
    {
        "size": 16,
        "count": 2,
        "scale": [0.1, 0.3],
        "grayscale": 1.0,
        "solarize": 1.0,
        "interpolation": "bilinear",
    }
]


def recipe(folder: Path, method: dict[str, object]) -> schema.Config:
    return load.build(
        {
            "batch": 12,
            "epochs": 2,
            "threads": 1,
            "data": {"path": str(folder), "lanes": 4, "window": 2, "workers": 0, "views": VIEWS},
            "model": {"name": "resnet10", "width": 0.0625, "stem": "cifar"},
            "method": method,
            "optim": {"warmup_epochs": 0},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("passes") / "shards", (30, 18))


def first(data: schema.DataConfig) -> tuple[Stream, Batch]:
    stream = open_stream(data, seed=0, batch=12, rank=0, world=1, device=torch.device("cpu"))
    batch = next(iter(stream.batches(0, 1)))
    stream.close()
    return stream, batch


def test_whole_images_are_the_same_samples_undistorted(folder: Path) -> None:
    data = recipe(folder, {"name": "byol"}).data
    (training, drawn), (passing, whole) = first(data), first(whole_images(data))
    assert training.steps_per_epoch == passing.steps_per_epoch == 4
    assert torch.equal(drawn.index, whole.index)
    assert drawn.views[0].shape == (2, 12, 3, 16, 16)
    assert whole.views[0].shape == (1, 12, 3, 16, 16)
    again = first(
        whole_images(
            data.model_copy(
                update={"views": (data.views[0].model_copy(update={"scale": (0.5, 1.0)}),)}
            )
        )
    )[1]
    assert torch.equal(whole.views[0], again.views[0])  # nothing is left to chance
    colours = whole.views[0].std(2).mean()
    assert colours > 4 * drawn.views[0].std(2).mean()  # of which training here shows none


@pytest.mark.parametrize(
    ("name", "count", "options"),
    [("pcl", 1, {"queue": 24, "warmup_epochs": 0}), ("deepcluster_v2", 2, {})],
)
def test_a_method_that_wants_whole_images_gets_them(
    name: str,
    count: int,
    options: dict[str, object],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []
    model = importlib.import_module(f"scaletrain.methods.{name}").Model
    right = model._embed

    def embed(self: object, batch: Batch) -> Tensor:
        seen.append(tuple(batch.views[0].shape))
        return right(self, batch)  # type: ignore[no-any-return]

    monkeypatch.setattr(model, "_embed", embed)
    train(
        recipe(folder, {"name": name, "hidden": 16, "dim": 8, "clusters": [4, 5], **options}),
        tmp_path / "run",
    )
    assert set(seen) == {(count, 12, 3, 16, 16)}


# --- all samples, and the mode --------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four batches of 12 samples and one more."""
    return write_shards(tmp_path_factory.mktemp("passes") / "uneven", (30, 19))


def opened(config: schema.Config, every: bool, rank: int = 0, world: int = 1) -> Stream:
    device = torch.device("cpu")
    return open_stream(
        config.data, seed=0, batch=12, rank=rank, world=world, device=device, every=every
    )


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_every_sample_in_equally_many_batches(world: int, uneven: Path) -> None:
    config = recipe(uneven, {"name": "byol"})
    whole = list(opened(config, True).batches(5, 10))
    parts = [list(opened(config, True, rank, world).batches(5, 10)) for rank in range(world)]
    for step, batch in enumerate(whole):
        found = joined([part[step] for part in parts])
        assert torch.equal(found.index, batch.index)
        assert torch.equal(found.views[0], batch.views[0])


def passes_of(config: schema.Config) -> tuple[Engine, Passes]:
    engine = build(config, 49, 4, torch.device("cpu"))
    return engine, Passes(engine, lambda every: opened(config, every))


def test_a_pass_shows_every_sample_once_or_those_of_an_epoch(uneven: Path) -> None:
    _, passes = passes_of(recipe(uneven, {"name": "byol"}))
    with passes.features(Clock(4, 8, 1, 4), Interrupt(), 4) as features:
        found = [(index, out) for index, out in features(lambda batch: batch.index + 100)]
        epoch = torch.cat([index for index, _ in features(lambda b: b.index, every=False)])
    assert [len(index) for index, _ in found] == [12, 12, 12, 12, 1]
    assert sorted(torch.cat([index for index, _ in found]).tolist()) == list(range(49))
    assert all(torch.equal(out, index + 100) for index, out in found)
    assert len(epoch) == len(set(epoch.tolist())) == 48
    passes.close()


def test_running_statistics_are_used_unless_the_batchs_are_asked_for(uneven: Path) -> None:
    engine, passes = passes_of(recipe(uneven, {"name": "byol"}))
    network = engine.method.backbone
    frozen = network.bn1.eval()  # type: ignore[union-attr,operator]
    before = {name: t.clone() for name, t in engine.method.state_dict().items()}
    modes = []

    def embed(batch: Batch) -> Tensor:
        modes.append((network.training, frozen.training))
        return network(batch.views[0][0])  # type: ignore[no-any-return]

    def row(training: bool) -> Tensor:
        """The embedding of sample 7."""
        with passes.features(Clock(0, 8, 0, 4), Interrupt(), 0) as features:
            parts = list(features(embed, training=training))
        index, out = (torch.cat(column) for column in zip(*parts, strict=True))
        return out[index == 7]

    usual = row(training=False)
    assert set(modes) == {(False, False)}
    assert network.training
    assert not frozen.training
    network.layer1.eval()  # type: ignore[union-attr,operator]
    assert torch.equal(row(training=False), usual)
    assert not torch.allclose(row(training=True), usual)
    assert modes[-1] == (True, False)
    after = engine.method.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    passes.close()


@pytest.mark.parametrize("every", [False, True])
def test_a_pass_that_ends_early_leaves_no_worker(every: bool, uneven: Path) -> None:
    config = recipe(uneven, {"name": "byol"})
    data = config.data.model_copy(update={"workers": 1})
    _, passes = passes_of(config.model_copy(update={"data": data}))
    before = children()
    with passes.features(Clock(0, 8, 0, 4), Interrupt(), 0) as features:
        for _ in features(lambda batch: batch.index, every=every):
            assert len(children()) == len(before) + 1
            break
        assert children() == before
        kept = features(lambda batch: batch.index, every=every)
        next(kept)
    assert children() == before


# --- the hook after the last step -----------------------------------------------------------------

Hook = Callable[[Any, Clock, Features, Write], None]


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[[Hook], None]:
    """ending(hook): give BYOL this hook."""
    model = importlib.import_module("scaletrain.methods.byol").Model
    return lambda hook: monkeypatch.setattr(model, "on_end", hook)


def final(run: Path) -> tuple[reader.SavedStep, float]:
    """The last checkpoint, and the number that the hook of these tests leaves in it."""
    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    return saved, saved.read("method.predictor.0.bias")[0].item()


def test_the_hook_runs_once_after_the_last_step_and_its_result_is_saved(
    uneven: Path, tmp_path: Path, ending: Callable[[Hook], None]
) -> None:
    seen: list[tuple[int, int, int]] = []

    def hook(model: Any, clock: Clock, features: Features, write: Write) -> None:
        samples = torch.cat([index for index, _ in features(lambda batch: batch.index)])
        seen.append((clock.step, clock.epoch, len(samples)))
        write("predictor.0.bias", torch.full_like(model.predictor[0].bias, float(len(seen))))

    ending(hook)
    config = recipe(uneven, {"name": "byol", "hidden": 16, "dim": 8})
    train(config, tmp_path / "run")
    assert seen == [(8, 2, 49)]
    saved, left = final(tmp_path / "run")
    assert (saved.step, saved.meta["finished"], left) == (8, True, 1)

    train(config, tmp_path / "run")
    assert len(seen) == 1
    train(config.model_copy(update={"epochs": 3.0}), tmp_path / "run", change=True)
    assert seen[1:] == [(12, 3, 49)]
    assert final(tmp_path / "run")[1] == 2


def test_a_run_that_ends_before_or_in_the_hook_resumes_with_it(
    uneven: Path, tmp_path: Path, ending: Callable[[Hook], None]
) -> None:
    """The steps are saved and not made again: a failure, then a signal during its pass."""
    failures = [True, True, False]

    def hook(model: Any, clock: Clock, features: Features, write: Write) -> None:
        failing = failures.pop(0)
        if failing and len(failures) == 2:
            raise OSError("as of a lost disk")
        if failing:
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in features(lambda batch: batch.index):
            pass
        write("predictor.0.bias", torch.full_like(model.predictor[0].bias, 5.0))

    ending(hook)
    config = recipe(uneven, {"name": "byol", "hidden": 16, "dim": 8})
    with pytest.raises(OSError, match="lost disk"):
        train(config, tmp_path / "run")
    with pytest.raises(Stopped, match="stopped at step 8 on SIGTERM, in a pass between steps"):
        train(config, tmp_path / "run")
    saved, left = final(tmp_path / "run")
    assert (saved.step, saved.meta["finished"]) == (8, False)
    assert left != 5

    before = records.read(tmp_path / "run")
    train(config, tmp_path / "run")
    saved, left = final(tmp_path / "run")
    assert (saved.step, saved.meta["finished"], left) == (8, True, 5)
    after = records.read(tmp_path / "run")
    assert after.steps == before.steps
    # each with the step that it resumed from
    assert [start.step for start in after.starts] == [0, 8, 8]
    assert failures == []
