"""A frozen teacher: equal to its source bit for bit whatever the engine, in no checkpoint, loaded
at every start, and never silently another one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import ranks, small, teachers
from kit.parity import ENGINES, EXACT, SINGLE, Run, of, single, whole
from torch import Tensor

from scaletrain.checkpoint import reader
from scaletrain.checkpoint.files import CheckpointError
from scaletrain.checkpoint.writer import Writer
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config
from scaletrain.core import Method, Source
from scaletrain.engines.base import Engine
from scaletrain.engines.placement import freeze
from scaletrain.estimate import memory, model
from scaletrain.train import initial_weights, weight_sources
from scaletrain.train.build import build_method, rebuild, run_info_of
from scaletrain.train.loop import train

MODULES = {"teacher": "backbone", "teacher_head": "head"}


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    with teachers.offered():
        yield


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return teachers.save(tmp_path / "teacher", 3, teachers.weights())


# --- under every engine ---------------------------------------------------------------------------


def held(engine: Engine) -> dict[str, Tensor]:
    """The teacher of an engine, by its names in its own run."""
    return {
        f"{own}.{name}": tensor.reshape(-1).clone()
        for module, own in MODULES.items()
        for name, tensor in engine.export(module).items()
    }


def trained(folder: Path, cases: Mapping[str, dict[str, Any]]) -> Run:
    """Under each engine two steps, and again the last one after a restart from a checkpoint."""
    found: Run = {}
    with teachers.offered(), small.smooth():
        for name, changes in cases.items():
            cfg = small.config(teachers.METHOD, **changes)
            engine = small.engine(cfg)
            sources = initial_weights.sources_of(engine.method)
            origins, _ = initial_weights.start_from(engine, sources)
            losses = small.run(engine, cfg, 0, 1)
            writer = Writer(folder / name, keep_last=1, keep_every=0)
            writer.save(1, engine.state(), {initial_weights.META: origins})
            writer.close()
            losses += small.run(engine, cfg, 1, 2)

            again, saved = small.engine(cfg), reader.latest(folder / name)
            assert saved is not None
            assert initial_weights.load_constant(again, saved, change=False) == (origins, [])
            again.restore(saved)
            assert small.run(again, cfg, 1, 2) == losses[1:]
            assert not {n for group in engine.optimizer.param_groups for n in group["names"]} & {
                n for n, _ in engine.method.named_parameters() if n.startswith("teacher")
            }

            found[f"{name}/loss"] = torch.tensor(losses, dtype=torch.float64)
            for kind, one in (("end", engine), ("again", again)):
                found |= {f"{name}/{kind}.{k}": v for k, v in held(one).items()}
    return found


def case(engine: str, teacher: Path) -> dict[str, Any]:
    return {
        "batch": 8,
        "data": {"views": [{"size": 8}]},
        "model": {"norm_group": 4},
        "optim": {"lr": 0.02},
        "engine": ENGINES[engine],
        "method": {"teacher": str(teacher)},
    }


def test_a_teacher_is_the_same_under_every_engine(teacher: Path, tmp_path: Path) -> None:
    cases = {name: case(name, teacher) for name in ENGINES if name != "fsdp2 reshard=false"}
    found = whole(ranks.run(2, trained, tmp_path, tmp_path, cases))
    precisions = {
        precision: {"name": "ddp", "precision": precision} for precision in ("fp64", "fp32")
    }
    alone = trained(tmp_path, {p: cases["ddp"] | {"engine": e} for p, e in precisions.items()})
    for name in cases:
        got = of(name, found)
        for kind in ("end", "again"):
            for k, tensor in teachers.weights().items():
                assert torch.equal(got[f"{kind}.{k}"], tensor.reshape(-1).to(got[f"{kind}.{k}"]))

        precision, limit = ("fp32", SINGLE) if single(ENGINES[name]) else ("fp64", EXACT)
        torch.testing.assert_close(got["loss"], alone[f"{precision}/loss"], rtol=limit, atol=0)
        saved = reader.latest(tmp_path / name)
        assert saved is not None
        assert not any("teacher" in tensor for tensor in saved.names())
        assert "method.classifier.0.weight" in saved.names()


# --- runs -----------------------------------------------------------------------------------------


def recipe(teacher: Path, **changes: Any) -> Config:
    data = {
        "path": "synthetic",
        "synthetic_samples": 24,
        "lanes": 4,
        "workers": 0,
        "views": [{"size": 16}],
    }
    checkpoints = {"every_steps": 2, "keep_every": 2}
    return small.config(
        teachers.METHOD,
        method={"teacher": str(teacher)},
        **{"steps": 4, "data": data, "checkpoint": checkpoints, **changes},
    )


def saved_tensors(run: Path) -> dict[str, Tensor]:
    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    return {name: saved.read(name) for name in saved.names()}


def test_a_run_resumes_with_the_teacher_that_it_began_with(teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe(teacher), run)
    end = saved_tensors(run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    # that the teacher was trained on does not matter, as long as its step is kept
    teachers.save(teacher, 9, teachers.weights(6))
    train(recipe(teacher), run)
    again = saved_tensors(run)
    assert again.keys() == end.keys()
    assert all(torch.equal(again[name], end[name]) for name in end)

    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    origin = saved.meta[initial_weights.META]["teacher"]
    assert (origin["path"], origin["step"], origin["module"]) == (str(teacher), 3, "backbone")
    network = rebuild(recipe(teacher), saved)
    assert not network.training
    weights = teachers.weights()
    assert torch.equal(
        network.get_parameter("teacher.conv1.weight"), weights["backbone.conv1.weight"]
    )


def test_another_teacher_is_refused(teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe(teacher), run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.rmtree(teacher)
    with pytest.raises(CheckpointError, match=r"module 'teacher' cannot be loaded: .*teacher"):
        train(recipe(teacher), run)

    teachers.save(teacher, 3, teachers.weights() | {"head.0.bias": torch.ones(5)})
    with pytest.raises(
        ConfigError,
        match=r"module 'teacher_head' are not those that .*step-00000002 was trained with: "
        r".*, step 3 \(sha256 \w+\) -> .*, step 3 \(sha256 \w+\)\nRestore them; .* use --change",
    ):
        train(recipe(teacher), run)
    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    with pytest.raises(ConfigError, match="'teacher_head' are not those"):
        rebuild(recipe(teacher), saved)

    train(recipe(teacher), run, change=True)
    assert "--change: teacher_head: " in (run / "changes.jsonl").read_text()
    train(recipe(teacher), run)


def test_the_start_of_a_run(teacher: Path, tmp_path: Path) -> None:
    """--init is a source of the backbone; what is not there ends the start."""
    run = tmp_path / "run"
    train(recipe(teacher, steps=1, optim={"lr": 1e-12}), run, init=teacher)
    weights = teachers.weights()["backbone.conv1.weight"]
    found = saved_tensors(run)["method.backbone.conv1.weight"].view_as(weights)
    torch.testing.assert_close(found, weights.double(), rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"cannot read .*nowhere"):
        train(recipe(tmp_path / "nowhere"), tmp_path / "other")


def test_modules_of_a_run_in_training_are_of_one_step(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: Any) -> weight_sources.Weights:
        found = weight_sources_read(*args)
        if not (teacher / "checkpoints" / "step-00000009").exists():
            teachers.save(teacher, 9, teachers.weights(6))
        return found

    weight_sources_read = weight_sources.read
    monkeypatch.setattr(weight_sources, "read", read)
    engine = small.engine(recipe(teacher))
    origins, _ = initial_weights.start_from(engine, engine.method.sources())
    assert {module: origin["step"] for module, origin in origins.items()} == dict.fromkeys(
        MODULES, 3
    )


# --- declarations ---------------------------------------------------------------------------------


def method_of(teacher: Path) -> Method:
    return build_method(recipe(teacher), run_info_of(recipe(teacher), 24, 2))


def test_constant_modules_stay_in_evaluation_mode(teacher: Path) -> None:
    method = method_of(teacher)
    freeze(method)
    for mode in (True, False):
        assert method.train(mode).backbone.training == mode
        for name in MODULES:
            module = method.get_submodule(name)
            assert not any(m.training for m in module.modules())
            assert not any(p.requires_grad for p in module.parameters())


def test_sources_that_are_not_right(teacher: Path) -> None:
    method = method_of(teacher)
    initial = {"backbone": Source(teacher), **method.sources()}
    method.sources = lambda: initial  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"takes its backbone from .*teacher; leave out one"):
        initial_weights.sources_of(method, teacher)
    method.sources = lambda: {"teacher": Source(teacher)}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no source for its constant module 'teacher_head'"):
        initial_weights.sources_of(method)
    method.sources = lambda: {"techer": Source(teacher)}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="has no module 'techer', for which it gives a source"):
        initial_weights.sources_of(method)


def test_estimates_count_it_as_frozen(teacher: Path) -> None:
    cfg = recipe(teacher)
    size = sum(p.numel() for n in MODULES for p in method_of(teacher).get_submodule(n).parameters())
    assert memory.measure(cfg, 2)["engines"]["ddp"]["frozen"] == 8 * size
    found = model.measure(cfg)["parameters"]
    assert found["constant"] == size
    assert found["heads"] == 5 * 32 + 5
