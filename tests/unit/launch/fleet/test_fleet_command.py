"""`scaletrain launch fleet` on this machine, and what it refuses."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kit import evals
from kit.commands import call

from scaletrain.evals.request import Request
from scaletrain.evals.run import Evaluation
from scaletrain.launch.fleet.claims import Claim, Claims

ROOT = Path(__file__).parents[4]
QUICK = ("features.workers=0",)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train = evals.shards(tmp_path / "data" / "train", [i % 6 for i in range(12)])
    evals.shards(tmp_path / "data" / "test", [i % 6 for i in range(6)], seed=1)
    return evals.run_folder(tmp_path, train)


def measure(run: Path) -> str:
    """Measure knn; the name of its result."""
    evaluation = Evaluation(run, Request(("knn",), overrides=QUICK))
    evaluation.result("knn", notice=lambda text: None)
    return evaluation.path("knn").stem


def test_what_is_measured_is_shown_and_drawn(run: Path) -> None:
    name = measure(run)
    with Claims(run) as claims:
        claims.write(name, Claim(attempts=1, error="earlier"))
    done = call("launch", "fleet", run, "--benchmarks", "knn", "--local", "1", "--set", *QUICK)
    assert done.exit_code == 0, done.output
    # what was measured before is no news
    table = done.stdout.splitlines()
    assert table[0] == str(run)
    assert table[1].split() == ["step", "knn"]
    assert table[2].split()[0] == "7"
    assert table[-1] == "1 measured"
    assert claims.names() == set()
    assert len(list((run / "tensorboard" / "evals").rglob("*tfevents*"))) == 1


def test_without_benchmarks_it_only_collects(run: Path) -> None:
    measure(run)
    done = call("launch", "fleet", run)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [str(run), "1 result in its curves in TensorBoard"]
    assert len(list((run / "tensorboard" / "evals").rglob("*tfevents*"))) == 1
    assert not (run / "evals" / "encoders").exists()


def test_what_was_given_up_is_the_exit_code_and_can_be_tried_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("launch", "fleet", run, "--benchmarks", "knn", "--set", *QUICK)
    name = Evaluation(run, Request(("knn",), overrides=QUICK)).path("knn").stem
    with Claims(run) as claims:
        claims.write(name, Claim(attempts=4, error="exit code 1; it crashed"))
    done = call(*options, "--local", "1")
    assert done.exit_code == 1
    assert "failed: exit code 1; it crashed" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 failed"
    done = call(*options, "--again", "--local", "1", "--dry-run")
    assert done.exit_code == 0
    export = run / "evals" / "encoders" / "step-00000007.safetensors"
    assert f"scaletrain eval {export} knn --encoder trained" in done.stdout

    done = call(*options, "--dry-run", PATH="")
    assert done.exit_code == 0, done.output
    assert "sinfo is not installed" in done.stderr
    assert f"#SBATCH --comment='{run}#evals/" in done.stdout.replace('"', "'") or (
        f"#SBATCH --comment={run}" in done.stdout
    )
    assert "#SBATCH --job-name=scaletrain-run-knn" in done.stdout
    assert not (run / "evals" / "launches").exists()


def test_a_fleet_that_is_asked_to_end_ends_its_processes(run: Path, tmp_path: Path) -> None:
    """What it had begun is free, and the next one does it."""
    options = ["launch", "fleet", str(run), "--benchmarks", "knn", "--local", "1", "--set", *QUICK]
    log = tmp_path / "fleet.log"
    with log.open("w") as out:
        command = [sys.executable, "-m", "scaletrain", *options]
        fleet = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    limit = time.monotonic() + 100
    while "running" not in log.read_text():
        assert fleet.poll() is None, log.read_text()
        assert time.monotonic() < limit
        time.sleep(0.05)

    children = Path(f"/proc/{fleet.pid}/task/{fleet.pid}/children").read_text().split()
    assert children
    fleet.send_signal(signal.SIGUSR2)
    assert fleet.wait(60) == 128 + signal.SIGUSR2, log.read_text()
    assert not [pid for pid in children if Path(f"/proc/{pid}/cmdline").exists()]

    done = call(*options)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "1 measured"
    assert "result: " in next((run / "evals" / "logs").iterdir()).read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["no", "--benchmarks", "knn"], "there is no run folder "),
        (["data", "--benchmarks", "knn"], "is no run folder: it has no config.yaml"),
        (["run", "--benchmarks", "knnn"], "unknown benchmark 'knnn'"),
        (["run", "--benchmarks", "knn", "--set", "knn.kss=1"], "kss"),
        (["run", "--benchmarks", "knn", "--set", "linear.epochs=1"], "override of 'linear'"),
        (["run", "--benchmarks", "knn", "--local", "1", "--dataset", "pet"], "did you mean 'pets'"),
        (["run", "run", "--benchmarks", "knn"], "a run is named twice"),
        (["run", "--benchmarks", "knn"], "`scaletrain launch fleet --local N`"),
    ],
)
def test_bad_input_is_one_clear_error(
    run: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], says: str
) -> None:
    monkeypatch.chdir(run.parent)
    done = call("launch", "fleet", *options, PATH="")
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
