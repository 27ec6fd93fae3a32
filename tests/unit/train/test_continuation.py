"""A run that starts from the whole state of another one, under a recipe of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import pipelines

from scaletrain.checkpoint import reader
from scaletrain.config import load
from scaletrain.config.recipe import ConfigError
from scaletrain.evals.encoders import targets
from scaletrain.train import records
from scaletrain.train.loop import train

SYNTHETIC = ("data.path=synthetic", "data.synthetic_samples=16", "steps=2")


def run(folder: Path, name: str, *overrides: str, **options: Any) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(pipelines.RECIPE)
    train(load.load(recipe, [*SYNTHETIC, *overrides]), folder / name, **options)
    return folder / name


def meta(run: Path) -> dict[str, Any]:
    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    return saved.meta


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("source"), "run")


def test_all_tensors_are_taken_over_and_the_schedule_begins_again(
    source: Path, tmp_path: Path
) -> None:
    # at a rate so small that no float32 weight moves: what is left is the source's state
    other = ("data.views.0.size=24", "optim.lr=1e-30", "steps=1", "optim.weight_decay=0")
    new = run(tmp_path, "run", *other, "method.tau=1", continues=source)
    before, after = pipelines.tensors(source), pipelines.tensors(new)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.startswith("method.") and tensor.is_floating_point() and "running" not in name:
            assert torch.equal(after[name], tensor), name

    saved = reader.latest(source / "checkpoints")
    assert saved is not None
    found = meta(new)
    assert found["clock"] == {"step": 1, "total": 1, "steps_per_epoch": 2}
    assert found["samples"] == 8
    assert {key: found["continues"][key] for key in ("path", "step", "samples")} == {
        "path": str(saved.path),
        "step": 2,
        "samples": 16,
    }
    assert len(found["continues"]["sha256"]) == 64
    assert records.read(new).steps[0].step == 0


def test_it_resumes_from_its_own_checkpoints_without_the_source(
    source: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    whole = run(tmp_path, "whole", "steps=4", continues=copy)
    half = Path(shutil.copytree(whole, tmp_path / "half"))
    shutil.rmtree(half / "checkpoints" / "step-00000004")
    shutil.rmtree(copy)

    run(tmp_path, "half", "steps=4")
    expected, got = pipelines.tensors(whole), pipelines.tensors(half)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert meta(half)["continues"] == meta(whole)["continues"]
    # that it is named again changes nothing, another one is refused
    run(tmp_path, "half", "steps=4", continues=copy)
    with pytest.raises(ValueError, match=rf"state of {copy}/.* and not of {source}: leave out"):
        run(tmp_path, "half", "steps=4", continues=source)
    own = run(tmp_path, "own")
    with pytest.raises(ValueError, match=r"state of no other run: leave out --continue"):
        run(tmp_path, "own", continues=own)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.width=0.125"], r"method\.backbone\S+ has shape .* and must have shape"),
        (["method.dim=4"], r"another model: method\.projector\S+ has shape"),
        (["method={name: simsiam, hidden: 24, dim: 8}"], r"another model: "),
        (["optim.name=sgd"], r"optim\.name=lars is not that of optim\.name=sgd"),
        (["optim.lars_momentum=inside"], r"set optim\.lars_momentum=outside"),
        (["optim.name=adamw"], r"optim\.name=lars is not that of optim\.name=adamw"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    source: Path, tmp_path: Path, overrides: list[str], says: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"^--continue {source}/checkpoints/step-00000002: .*{says}"
    ):
        run(tmp_path, "run", *overrides, continues=source)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_embeddings_of_other_samples_are_refused(tmp_path: Path) -> None:
    method = "method={name: deepcluster_v2, hidden: 24, dim: 8, clusters: [5, 4], iterations: 4}"
    first = run(tmp_path, "first", method)
    refused = (
        r"deepcluster_v2 keeps every sample's embedding, and the data is not the same:\n  .*16 "
    )
    with pytest.raises(ValueError, match=refused):
        run(tmp_path, "more", method, "data.synthetic_samples=24", continues=first)
    run(tmp_path, "same", method, continues=first)


def test_what_is_no_source_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--continue \S+: there is no checkpoint"):
        run(tmp_path, "run", continues=tmp_path)
    with pytest.raises(ValueError, match="--init and --continue exclude each other"):
        run(tmp_path, "run", continues=source, init=source)


def test_an_encoder_that_saw_other_images_is_refused(source: Path, tmp_path: Path) -> None:
    """No tensor shows model.input: every shape fits."""
    sobel = ("model.input=sobel",)
    says = r"model\.input=rgb, and this run has model\.input=sobel: set model\.input=rgb"
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, "continued", *sobel, continues=source)
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, "run", *sobel, init=source)

    saved = reader.latest(source / "checkpoints")
    assert saved is not None
    exported = tmp_path / "encoder.safetensors"
    targets.export(source, saved, "backbone", exported)
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, "file", *sobel, init=exported)


def test_another_normalisation_is_said(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "run", "data.mean=[0,0,0]", init=source)
    said = " ".join(capsys.readouterr().out.split())
    assert "its images were normalised with data.mean=[0.485, 0.456, 0.406], here they are" in said


def test_a_run_that_is_shortened_to_its_newest_step_is_finished(tmp_path: Path) -> None:
    run(tmp_path, "run", "steps=6")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    run(tmp_path, "run", "steps=4", change=True)
    found = meta(tmp_path / "run")
    assert (found["clock"]["step"], found["clock"]["total"], found["finished"]) == (4, 4, True)
