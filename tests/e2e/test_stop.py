"""A request to stop that reaches one rank, a cancelled launcher, a second start in the same
folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from kit import ranks

from scaletrain.checkpoint import reader
from scaletrain.train import records, status

ROOT = Path(__file__).parents[2]
STEPS = 30
RECIPE = f"""
batch: 8
steps: {STEPS}
data: {{path: synthetic, synthetic_samples: 32, lanes: 4, workers: 1,
  views: [{{size: 16, count: 2}}]}}
model: {{name: resnet10, width: 0.0625, stem: cifar}}
method: {{name: byol, hidden: 24, dim: 8}}
optim: {{lr: 0.3, lr_scaling: none, warmup_epochs: 0}}
engine: {{name: ddp, precision: fp64}}
checkpoint: {{every_steps: 100}}
monitor: {{every: 1, images_every: 0}}
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(tmp_path: Path, run: str) -> subprocess.Popen[str]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = [
        sys.executable,
        str(ROOT / "launchers" / "local.py"),
        "--procs",
        "2",
        str(recipe),
        "--run",
        str(tmp_path / run),
    ]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    while len(records.read(run).steps) < step:
        assert process.poll() is None
        time.sleep(0.02)


def rank_process(launcher: int, rank: int) -> int:
    """The launcher's child that is this rank; its loader workers are that one's children."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = f"PPid:\t{launcher}\n" in (folder / "status").read_text()
            if mine and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    raise AssertionError("no such rank")


def listening(processes: set[int]) -> set[str]:
    """Addresses, as in /proc/net/tcp, on which these processes wait for connections."""
    owned = set()
    for process in processes:
        for handle in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                owned.add(str(handle.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in owned}


def test_asked_in_the_pass_before_an_epoch_it_ends_at_once(tmp_path: Path) -> None:
    """Clustering goes over all samples first: with these, for longer than the test may take."""
    recipe = tmp_path / "recipe.yaml"
    long = "{name: deepcluster_v2, hidden: 24, dim: 8, clusters: [5, 4], iterations: 4}"
    text = RECIPE.replace("synthetic_samples: 32", "synthetic_samples: 400000")
    recipe.write_text(text.replace("{name: byol, hidden: 24, dim: 8}", long))
    command = [
        sys.executable,
        "-m",
        "scaletrain",
        "train",
        str(recipe),
        "--run",
        str(tmp_path / "run"),
    ]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (tmp_path / "run" / "config.yaml").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGUSR2)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 140, errors
    assert (
        "stopped at step 0 on SIGUSR2, in a pass between steps: back to the last checkpoint" in out
    )
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_one_process_at_a_time_trains_in_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        lock.write("process 7 on n1, job 12\n")
        lock.flush()
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        process = subprocess.run(
            [
                *(sys.executable, "-m", "scaletrain", "train", str(tmp_path / "recipe.yaml")),
                *("--run", str(tmp_path / "run")),
            ],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert process.returncode == 75
        assert (
            f"error: {tmp_path / 'run'} is being trained by process 7 on n1, job 12\n"
            == process.stderr
        )
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def result(run: Path) -> dict[str, torch.Tensor]:
    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    assert saved.step == STEPS
    return {name: saved.read(name) for name in saved.names()}


def asked(tmp_path: Path, ask: Callable[[int], None], code: int, name: str) -> int:
    """Start a run, ask it to stop, check how it ends -> the step it has reached."""
    with start(tmp_path, "run") as process:
        wait_for_step(tmp_path / "run", 6, process)
        assert listening(
            {process.pid, rank_process(process.pid, 0), rank_process(process.pid, 1)}
        ) == {"0100007F"}  # 127.0.0.1
        assert status.alive(tmp_path / "run")
        ask(process.pid)
        out, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
    assert not status.alive(tmp_path / "run")
    reached = len(records.read(tmp_path / "run").steps)
    assert reached < STEPS
    assert f"stopped at step {reached} on {name}, saved; rerun the same command to resume" in out
    assert "failed" not in errors
    ended = status.read(tmp_path / "run")
    assert ended is not None
    assert (ended.state, ended.step, ended.total) == ("stopped", reached, STEPS)
    (begun,) = records.read(tmp_path / "run").starts
    assert (begun.world, begun.devices) == (2, {"cpu": 2})
    saved = reader.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.step == reached
    return reached


def test_asked_to_stop_it_saves_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    reached = asked(
        tmp_path,
        lambda launcher: os.kill(rank_process(launcher, 1), signal.SIGUSR2),
        140,
        "SIGUSR2",
    )
    with start(tmp_path, "run") as process:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert f"resumed from step {reached};" in out
    ranks.train(2, tmp_path / "recipe.yaml", tmp_path / "undisturbed")
    got, expected = (result(tmp_path / name) for name in ("run", "undisturbed"))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_closed_terminal_stops_it_in_the_same_way(tmp_path: Path) -> None:
    asked(tmp_path, lambda launcher: os.kill(launcher, signal.SIGHUP), 129, "SIGHUP")
