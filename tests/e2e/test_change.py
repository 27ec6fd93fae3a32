"""What may change between two starts of a run, what is refused, and what its records then say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from kit import importing
from typer.testing import CliRunner

from scaletrain.checkpoint import files, reader
from scaletrain.cli import main as cli
from scaletrain.config import load
from scaletrain.runtime import durable
from scaletrain.train.records import read

RECIPE = """
batch: 8
epochs: 2
data: {lanes: 4, window: 2, workers: 0, views: [{size: 16, count: 2, blur: 0.0}]}
model: {name: resnet10, width: 0.0625, stem: cifar}
method: {name: byol, hidden: 16, dim: 8}
optim: {lr: 0.1, warmup_epochs: 0}
checkpoint: {every_steps: 3, keep_last: 5}
monitor: {every: 1, images_every: 0}
"""


def write(folder: Path, name: str, seed: int, count: int = 36) -> Path:
    """Shards of made-up images, of which an epoch has 4 steps of 8 or 2 of 16."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        place = folder / f"images-{name}-{seed}" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"{i:02d}.png"), draw.integers(0, 256, (18, 18, 3), dtype=np.uint8))
    importing.run("folder", place.parent, folder / name, "--per-shard", 12, "--force")
    return folder / name


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), "train", 0)


@pytest.fixture(scope="module")
def begun(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its checkpoint at step 3, of 8."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert train(folder / "run", f"data.path={shards}").exit_code == 0
    for step in (6, 8):
        shutil.rmtree(folder / "run" / "checkpoints" / f"step-{step:08d}")
    return folder / "run"


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "run")
    shutil.copy(begun.parent / "recipe.yaml", tmp_path)
    return tmp_path / "run"


def train(run: Path, *arguments: object) -> Any:
    words = ["train", str(run.parent / "recipe.yaml"), *map(str, arguments), "--run", str(run)]
    return CliRunner(
        env={"RANK": None, "SCALETRAIN_ERROR_FILE": None, "SCALETRAIN_DEBUG": None}
    ).invoke(cli.app, words)


def records(run: Path) -> list[dict[str, Any]]:
    return [record.model_dump() for record in read(run).steps]


# --- the data -------------------------------------------------------------------------------------


def test_other_shards_under_the_same_path_are_refused_until_accepted(
    run: Path, tmp_path: Path
) -> None:
    data = write(tmp_path, "train", 0)
    assert train(run, f"data.path={data}", "--change").exit_code == 0  # the same bytes elsewhere
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    write(tmp_path, "train", 1, count=40)

    refused = train(run, f"data.path={data}")
    assert refused.exit_code == 2
    assert f"the data is not what {run}/checkpoints/step-00000006 was trained on" in refused.stderr
    assert f"{data} (36 samples, sha256 " in refused.stderr
    assert f" -> {data} (40 samples, sha256 " in refused.stderr
    assert "--change to resume with this data" in refused.stderr

    accepted = train(run, f"data.path={data}", "--change")
    assert accepted.exit_code == 0, accepted.stderr
    assert "resumed from step 6" in accepted.stdout
    assert "6 steps of 8 samples, 4 an epoch, count as 6 steps of 8, 5 an epoch" in accepted.stdout
    logged = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged] == [3, 6]
    assert any("40 samples" in line for line in logged[1]["changes"])
    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    assert saved.meta["data"]["sources"][0]["samples"] == 40


def by_slash(shards: Path, tmp_path: Path) -> str:
    return f"{shards}/"


def by_link(shards: Path, tmp_path: Path) -> str:
    (tmp_path / "link").symlink_to(shards.parent)
    return f"{tmp_path}/link/{shards.name}"


def by_another_working_directory(shards: Path, tmp_path: Path) -> str:
    os.chdir(shards.parent)
    return shards.name


@pytest.mark.parametrize("spell", [by_slash, by_link, by_another_working_directory])
def test_spellings_of_one_folder_are_one_data_set(
    run: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spell: Callable[[Path, Path], str],
) -> None:
    monkeypatch.chdir(tmp_path)
    resumed = train(run, f"data.path={spell(shards, tmp_path)}")
    assert resumed.exit_code == 0, resumed.stderr
    assert "resumed from step 3" in resumed.stdout
    assert Path(load.load(run / "config.yaml").data.path).is_absolute()
    os.chdir(tmp_path)
    assert "nothing left to train" in train(run, f"data.path={shards}").stdout


# --- batch and schedule ---------------------------------------------------------------------------


def test_a_changed_batch_keeps_the_place_in_samples(run: Path, shards: Path) -> None:
    """3 steps of 8 are 1 of 16 with 8 samples again; the 3 steps to the end draw 48 samples
    more.
    """
    changed = train(run, f"data.path={shards}", "batch=16", "--change")
    assert changed.exit_code == 0, changed.stderr
    assert (
        "3 steps of 8 samples, 4 an epoch, count as 1 steps of 16, 2 an epoch; 8 samples come again"
        in changed.stdout
    )
    assert "done: 3 steps, 48 images in" in changed.stdout
    assert [(r["step"], r["samples"], r["epochs"]) for r in records(run)] == [
        (0, 8, 0.25),
        (1, 16, 0.5),
        (2, 24, 0.75),
        (3, 40, 1.0),
        (4, 56, 1.5),
        (5, 72, 2.0),
    ]
    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    assert (saved.step, saved.meta["clock"]["step"], saved.meta["samples"]) == (6, 4, 72)

    evaluated = CliRunner().invoke(
        cli.app, ["eval", str(run), "knn", "--test", str(shards), "--set", "features.workers=0"]
    )
    assert evaluated.exit_code == 0, evaluated.output
    (result,) = (run / "evals").glob("*.json")
    assert json.loads(result.read_text())["trained"] == {"samples": 72, "epochs": 2.0}

    again = train(run, f"data.path={shards}", "batch=16")
    assert again.exit_code == 0
    assert "nothing left to train" in again.stdout


def test_a_schedule_that_ends_before_the_place_reached_is_refused(run: Path, shards: Path) -> None:
    refused = train(run, f"data.path={shards}", "epochs=0.5", "--change")
    assert refused.exit_code == 2
    assert (
        "this run has made 3 steps already, and the changed schedule ends after 2: raise epochs or "
        "steps" in refused.stderr
    )
    assert train(run, f"data.path={shards}").exit_code == 0  # nothing was changed by the attempt


def test_a_run_of_an_earlier_version_resumes_with_a_notice(run: Path, shards: Path) -> None:
    path = run / "checkpoints" / "step-00000003" / "manifest.json"
    manifest = json.loads(files.unseal(path))
    for name in ("data", "samples"):
        del manifest["meta"][name]
    del manifest["meta"]["clock"]["steps_per_epoch"]
    with durable.replacing(path, "test") as file:
        file.write(files.seal(json.dumps(manifest)))

    resumed = train(run, f"data.path={shards}")
    assert resumed.exit_code == 0, resumed.stderr
    assert (
        "was written by an earlier version, which did not record its data: not checked"
        in resumed.stdout
    )
    assert records(run)[-1]["samples"] == 64


# --- the end --------------------------------------------------------------------------------------


def test_the_last_line_says_what_was_done_and_what_is_next(run: Path, shards: Path) -> None:
    last = train(run, f"data.path={shards}").stdout.strip().splitlines()[-1]
    assert last.startswith("done: 5 steps, 40 images in 00:00:")
    assert last.endswith(
        f"checkpoint {run}/checkpoints/step-00000008; next: scaletrain eval {run} knn"
    )
