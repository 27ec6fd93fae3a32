"""What a driver does again, refuses, and leaves alone; a run of two steps takes a moment."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import evals, pipelines
from kit.commands import call

from scaletrain.config.recipe import ConfigError
from scaletrain.launch import local
from scaletrain.launch.slurm.chain import Chain
from scaletrain.launch.slurm.submit import Resources
from scaletrain.pipelines import driver, load
from scaletrain.pipelines.driver import BusyError, Driver, StageError
from scaletrain.runtime.signals import Stopped

SYNTHETIC = """
options: {size: 16}
stages:
- name: first
  train: recipe.yaml
  set: {data.path: synthetic, data.synthetic_samples: 16, steps: 2, data.views.0.size: "${size}"}
- name: second
  train: recipe.yaml
  set: {data.path: synthetic, data.synthetic_samples: 16, steps: 4, batch: 8}
  continue: ${first.run}
"""
FINISHED = ["first: finished before", "second: finished before"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return pipelines.write(tmp_path, SYNTHETIC)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipeline and its finished stages."""
    folder = tmp_path_factory.mktemp("trained")
    pipelines.drive(pipelines.write(folder, SYNTHETIC), folder / "work")
    return folder


@pytest.fixture
def done(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, and so in another place."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_a_finished_pipeline_is_left_alone_without_torch(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "work").rglob("*.*")}
    code = (
        "import sys; from scaletrain.cli.main import app\n"
        "try: app(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "pipeline", str(done / "pipeline.yaml")]
    out = subprocess.run(
        [*command, "--work", str(done / "work")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    ).stdout
    assert out.splitlines() == [*FINISHED, "False"]
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if before[path] != after[path]} == {".lock"}


def test_other_options_of_a_finished_stage_are_refused(done: Path) -> None:
    file, work = done / "pipeline.yaml", done / "work"
    with pytest.raises(ConfigError) as error:
        pipelines.drive(file, work, ["size=24"])
    assert "stage 'first'" in str(error.value)
    assert "data.views.0.size: 16 -> 24" in str(error.value)
    assert "--redo first" in str(error.value)
    # what a finished run started from is an option too
    text = file.read_text()
    file.write_text(text.replace("  continue: ${first.run}\n", "  init: x.safetensors\n"))
    with pytest.raises(
        ConfigError, match=r"init:  -> .*x\.safetensors\n.*continue: \${work}/first"
    ):
        pipelines.drive(file, work)
    file.write_text(text)
    # the same in other words
    assert pipelines.drive(file, work, ["first.optim.name=lars"]) == FINISHED


def test_a_single_stage_and_a_chain_of_jobs_refuse_other_options_of_finished_stages(
    done: Path,
) -> None:
    file, work = done / "pipeline.yaml", done / "work"
    shutil.rmtree(work / "second")
    pipeline = load.load(file, work, ["first.seed=1"])
    with pytest.raises(ConfigError, match=r"stage 'first' .*\n.*seed: 0 -> 1"):
        Driver(pipeline, say=lambda _: None).run_one("second")
    with pytest.raises(ConfigError, match=r"stage 'first' .*\n.*seed: 0 -> 1"):
        Chain(pipeline, Resources(), None)


def test_a_relative_path_is_that_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, work = pipelines.write(tmp_path, EVALUATED.partition("- name: scores")[0]), tmp_path / "w"
    for name, count in (("a", 32), ("b", 40)):
        evals.shards(tmp_path / name / "d", [n % 2 for n in range(count)], seed=count)

    monkeypatch.chdir(tmp_path / "a")
    pipelines.drive(file, work, ["data=d"])
    made = json.loads((work / "base" / "stage.json").read_text())
    assert made["stage"]["recipe"]["data"]["path"] == str(tmp_path / "a" / "d")
    assert f"{tmp_path / 'a' / 'd'}/*.tar" in made["files"]

    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"data\.path: .*a/d -> .*b/d"):
        pipelines.drive(file, work, ["data=d"])
    assert pipelines.drive(file, work, ["data=../a/d"]) == ["base: finished before"]


def test_a_stage_done_again_makes_its_users_stale(done: Path) -> None:
    file, work = done / "pipeline.yaml", done / "work"
    with pytest.raises(ConfigError, match="made from another result of stage 'first'"):
        pipelines.drive(file, work, ["first.seed=1"], redo=["first"])
    assert (work / "earlier" / "first.1" / "checkpoints" / "step-00000002").is_dir()
    said = pipelines.drive(file, work, ["first.seed=1"], redo=["second"])
    assert said[0].startswith("second: done again; what was there is in")
    assert said[1] == FINISHED[0]
    assert said[-1] == "second: finished"


def test_a_redo_that_is_refused_moves_nothing_and_a_killed_one_goes_on(done: Path) -> None:
    file, work = done / "pipeline.yaml", done / "work"
    for word, says in (("second.optim.lrr=1", "unknown key"), ("first.seed=1", "seed: 0 -> 1")):
        with pytest.raises(ConfigError, match=says):
            pipelines.drive(file, work, [word], redo=["second"])
    assert not (work / "earlier").exists()

    def killed(_: object) -> int:
        raise KeyboardInterrupt

    pipeline = load.load(file, work)
    with pytest.raises(KeyboardInterrupt):
        Driver(pipeline, start=killed, say=lambda _: None).run(["second"])
    assert pipelines.drive(file, work, redo=["second"])[-1] == "second: finished"
    assert not (work / ".redo").exists()

    with pytest.raises(KeyboardInterrupt):
        Driver(pipeline, start=killed, say=lambda _: None).run(["second"])
    shutil.copytree(work / "earlier" / "second.2" / "checkpoints", work / "second" / "checkpoints")
    manifest = work / "second" / "checkpoints" / "step-00000004" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    said = pipelines.drive(file, work, redo=["second"])
    assert "second: resumed at step 2 of 4" in said
    kept = [path.name for path in (work / "earlier").iterdir()]
    assert sorted(kept) == ["second.1", "second.2"]


def test_a_stage_that_has_begun_resumes_or_is_refused(done: Path) -> None:
    file, work = done / "pipeline.yaml", done / "work"
    expected = pipelines.tensors(work / "second")
    # the last checkpoint is damaged
    manifest = work / "second" / "checkpoints" / "step-00000004" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    assert (
        "second  train recipe  step 2 of 4"
        in call("pipeline", file, "--work", work, "--status").stdout
    )
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        pipelines.drive(file, work, ["second.seed=1"])
    said = pipelines.drive(file, work)
    assert said[1:] == ["second: resumed at step 2 of 4", "second: finished"]
    got = pipelines.tensors(work / "second")
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_stop_and_a_failure_are_told_and_passed_on(file: Path, tmp_path: Path) -> None:
    for code, ending in ((140, "stopped; rerun the same command to resume"), (75, "failed")):
        said: list[str] = []
        given: list[list[str]] = []

        def start(arguments: list[str], code: int = code, given: list = given) -> int:
            given.append(arguments)
            return code

        pipeline = load.load(file, tmp_path / "work")
        with pytest.raises(StageError) as error:
            Driver(pipeline, start=start, say=said.append).run()  # type: ignore[arg-type]
        assert error.value.code == code
        assert said[1:] == [f"first: {ending}", "second: waits for first"]
        assert given[0][0] == str(tmp_path / "recipe.yaml")
        assert given[0][-2:] == ["--run", str(tmp_path / "work" / "first")]


def test_several_processes_train_by_the_local_launcher(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def start(arguments: list[str], procs: int, port: int, restarts: int) -> int:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        given.extend([procs, port, restarts, *arguments])
        return 143

    monkeypatch.setattr(local, "start", start)
    before = signal.getsignal(signal.SIGUSR2)
    got = call("pipeline", file, "--work", tmp_path / "work", "--procs", "3", "--umask", "027")
    assert got.exit_code == 143
    assert "first: stopped; rerun the same command to resume" in got.stdout
    assert given[:4] == [3, 0, 0, str(tmp_path / "recipe.yaml")]
    assert given[-4:] == ["--run", str(tmp_path / "work" / "first"), "--umask", "027"]
    assert signal.getsignal(signal.SIGUSR2) == before
    assert (tmp_path / "work").stat().st_mode & 0o777 == 0o750


def test_a_signal_stops_training_with_its_exit_code(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scaletrain.train import loop

    def stopped(*_: object, **__: object) -> None:
        raise Stopped(12, 1, saved=True)

    monkeypatch.setattr(loop, "train", stopped)
    got = call("pipeline", file, "--work", tmp_path / "work")
    assert got.exit_code == 140
    assert "first: stopped at step 1 on SIGUSR2, saved; rerun" in got.stdout


def test_a_second_driver_is_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "PATIENCE", 0)
    (tmp_path / "work").mkdir()
    path = tmp_path / "work" / ".lock"
    path.write_text("process 7 on n1\n")
    child = os.fork()
    if child == 0:
        with path.open("r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            (tmp_path / "locked").touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not (tmp_path / "locked").exists():
            time.sleep(0.01)
        with pytest.raises(BusyError, match="is being worked on by process 7 on n1") as error:
            pipelines.drive(file, tmp_path / "work")
        assert error.value.exit_code == 75
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_bad_input_is_one_error_before_anything_runs(file: Path, tmp_path: Path) -> None:
    got = call("pipeline", file, "--work", tmp_path / "work", "second.optim.lrr=1")
    assert got.exit_code == 2
    assert "stage 'second': command line: unknown key 'optim.lrr'" in got.stderr
    assert not (tmp_path / "work" / "first").exists()
    got = call("pipeline", file, "--work", tmp_path / "work", "--stage", "second")
    assert got.exit_code == 2
    assert "stage 'second' waits for first: run that first" in got.stderr


# --- computations ---------------------------------------------------------------------------------

COMPUTED = """
options: {data: null, share: 50}
stages:
- {name: labels, do: subset, set: {shards: "${data}", share: "${share}"}}
"""


def test_a_computation_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, work = pipelines.write(tmp_path, COMPUTED), tmp_path / "work"
    words = [f"data={pipelines.shards(tmp_path / 'shards')}"]
    # as a kill leaves it
    (work / ".labels.partial").mkdir(parents=True)
    (work / ".labels.partial" / "half").touch()
    said = pipelines.drive(file, work, words)
    assert said[-2:] == ["labels: 16 of 32 samples: 50 % of all, seed 0", "labels: finished"]
    assert {path.name for path in (work / "labels").iterdir()} == {"subset.json", "stage.json"}
    assert pipelines.drive(file, work, words) == ["labels: finished before"]

    with pytest.raises(ConfigError, match=r"options\.share: 50\.0 -> 25\.0"):
        pipelines.drive(file, work, [*words, "share=25"])
    index = tmp_path / "shards" / "train" / "scaletrain-index.json"
    before = index.read_bytes()
    index.write_text(json.dumps({**json.loads(before), "version": 1}))
    # an index of the same shards by another version
    assert pipelines.drive(file, work, words) == ["labels: finished before"]
    index.write_bytes(before.replace(b'"sha256": "', b'"sha256": "0'))
    with pytest.raises(ConfigError, match=r"shards/train/\*\.tar has changed since"):
        pipelines.drive(file, work, words)
    index.write_bytes(before)
    (work / "labels" / "subset.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"subset\.json is missing or was altered"):
        pipelines.drive(file, work, words)

    (work / "labels" / "stage.json").unlink()
    with pytest.raises(ConfigError, match="is not a result of this stage: move it away"):
        pipelines.drive(file, work, words)
    assert json.loads(before)["samples"] == 32


EVALUATED = """
options: {data: null, train: ""}
stages:
- {name: base, train: recipe.yaml, set: {data.path: "${data}", steps: 1}}
- name: scores
  do: evaluate
  set:
    {target: "${base.run}", benchmarks: [knn], train: "${train}", settings: {features.workers: 0}}
"""


@pytest.mark.parametrize("named", [False, True])
def test_another_test_set_is_noticed_although_no_option_names_it(
    named: bool, tmp_path: Path
) -> None:
    file, work = pipelines.write(tmp_path, EVALUATED), tmp_path / "work"
    data = pipelines.shards(tmp_path / "shards")
    words = [f"data={data}", *([f"train={data}"] if named else [])]
    assert pipelines.drive(file, work, words)[-1] == "scores: finished"
    (result,) = json.loads((work / "scores" / "results.json").read_text())
    assert result["intervals"].keys() == result["metrics"].keys()
    assert pipelines.drive(file, work, words) == [
        "base: finished before",
        "scores: finished before",
    ]
    shutil.rmtree(tmp_path / "shards" / "test")
    evals.shards(tmp_path / "shards" / "test", [n % 2 for n in range(12)], seed=9)
    with pytest.raises(ConfigError, match=r"stage 'scores' (.|\n)*the test set has changed since"):
        pipelines.drive(file, work, words)


MOVED = """
options: {data: null}
stages:
- {name: labels, do: subset, set: {shards: "${data}", share: 50}}
- name: base
  train: recipe.yaml
  set: {data.path: "${data}", data.subset: "${labels.output}/subset.json", steps: 4}
"""


def test_a_pipeline_that_was_moved_before_its_training_was_finished_is_refused(
    tmp_path: Path,
) -> None:
    file, work = pipelines.write(tmp_path, MOVED), tmp_path / "work"
    words = [f"data={pipelines.shards(tmp_path / 'shards')}"]
    pipelines.drive(file, work, words)
    moved = work.rename(tmp_path / "wor")
    assert len(pipelines.drive(file, moved, words)) == 2
    shutil.rmtree(moved / "base" / "checkpoints" / "step-00000004")
    with pytest.raises(ConfigError, match=r"with data\.subset .*/work/labels/.* cannot be moved"):
        pipelines.drive(file, moved, words)
    moved.rename(work)
    assert "base: resumed at step 2 of 4" in pipelines.drive(file, work, words)
