"""launchers/slurm.py on a real cluster of four nodes on this machine: what disturbs a job leaves no trace in what it trains."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from slurm.cluster import Cluster, missing

from scaletrain import checkpoint
from scaletrain.slurm import task

ROOT = Path(__file__).parents[2]
STEPS = 40
CRASHED = r"exit code \d+, requeued from step-0*(\d+).*resumed from step \1;"
RECIPE = f"""
batch: 12
steps: {STEPS}
data: {{lanes: 4, window: 2, workers: 1, views: [{{size: 16, count: 2, blur: 0.0}}, {{size: 8, count: 1, blur: 0.0}}]}}
model: {{name: resnet18, width: 0.0625, stem: cifar}}
method: {{name: relicv2, hidden: 24, dim: 8, negatives: 3, tau: 0.9}}
optim: {{lr: 0.3, rule: none, warmup_epochs: 1, trust: 0.02}}
engine: {{name: ddp, precision: fp64}}
checkpoint: {{every_steps: 6, keep_last: 2}}
monitor: {{every: 1, images_every: 0}}
"""
SHORT = ("steps=2", "optim.warmup_epochs=0")
pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"SLURM IS NOT TESTED: {', '.join(missing())} not installed"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        running.env |= {"PYTHONPATH": str(ROOT)}
        yield running
        leftover = running.processes
    assert not leftover()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose data are shards of 96 made-up images."""
    folder = tmp_path_factory.mktemp("work with spaces")
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(96):
        cv2.imwrite(str(folder / "images" / f"{i:03d}.png"), draw.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    script = [sys.executable, str(ROOT / "shards" / "folder.py"), str(folder / "images"), str(folder / "shards")]
    subprocess.run([*script, "--per-shard", "16"], check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("data: {", f"data: {{path: '{folder / 'shards'}', "))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> dict[str, torch.Tensor]:
    """What the local launcher trains with as many processes."""
    run = recipe.parent / "undisturbed"
    command = [sys.executable, str(ROOT / "launchers" / "local.py"), "--procs", "2", str(recipe), "--run", str(run)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return tensors(run)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.latest(run / "checkpoints")
    assert saved is not None
    assert saved.step == STEPS
    return {name: saved.read(name) for name in saved.names()}


def launch(cluster: Cluster, recipe: Path, run: Path, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launchers" / "slurm.py"), "--config", str(recipe), "--run", str(run)]
    done = subprocess.run([*command, *options], env=cluster.env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def start(cluster: Cluster, recipe: Path, run: Path, *options: str) -> str:
    """The id of a job of two processes on two nodes."""
    done = launch(cluster, recipe, run, "--nodes", "2", "--cpus-per-task", "1", *options)
    found = re.search(r"job (\d+)", done.stdout)
    assert found
    return found[1]


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def log(run: Path) -> str:
    return "".join(path.read_text() for path in sorted((run / "launches").glob("*/*_0_log.*")))


def rank_process(cluster: Cluster, job: str, rank: int) -> int:
    """Of a rank itself, which is older than its loader workers."""
    marks, found = {f"SLURM_JOB_ID={job}".encode(), f"RANK={rank}".encode()}, []
    for pid in cluster.processes():
        with contextlib.suppress(OSError):
            if marks <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                found.append(pid)
    return min(found)


def signal_job(cluster: Cluster, job: str) -> None:
    cluster.run(f"scancel --signal=USR2 {job}")


def kill_first_rank(cluster: Cluster, job: str) -> None:
    os.kill(rank_process(cluster, job, 0), signal.SIGKILL)


def kill_other_rank(cluster: Cluster, job: str) -> None:
    os.kill(rank_process(cluster, job, 1), signal.SIGKILL)


def lose_node(cluster: Cluster, job: str) -> None:
    node = cluster.run(f"squeue -h -o %B -j {job}")
    cluster.run(f"scontrol update nodename={node} state=down reason=test")


def preempt(cluster: Cluster, job: str) -> None:
    urgent = ["sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(urgent, env=cluster.env, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("disturb", "trace"),
    [
        (signal_job, r"stopped at step (\d+) on SIGUSR2.*resumed from step \1;"),
        (preempt, r"stopped at step (\d+) on SIGUSR2.*resumed from step \1;"),
        (kill_first_rank, CRASHED),
        (kill_other_rank, CRASHED),
        (lose_node, r"Node failure on n\d.*resumed from step \d+;"),
    ],
)
def test_a_disturbed_job_ends_like_an_undisturbed_one(
    cluster: Cluster,
    recipe: Path,
    undisturbed: dict[str, torch.Tensor],
    tmp_path: Path,
    disturb: Callable[[Cluster, str], None],
    trace: str,
) -> None:
    run = tmp_path / "run"
    job = start(cluster, recipe, run)
    wait_for(lambda: steps(run) >= 9 and list((run / "checkpoints").glob("step-*/manifest.json")))
    disturb(cluster, job)
    assert cluster.until(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", log(run)
    assert re.search(trace, log(run), re.DOTALL), log(run)
    got = tensors(run)
    assert got.keys() == undisturbed.keys()
    assert all(torch.equal(got[name], undisturbed[name]) for name in got)
    if disturb is lose_node:
        with contextlib.suppress(subprocess.CalledProcessError):  # refused where the node has come back by itself
            cluster.run("scontrol update nodename=n[1-4] state=resume")


def test_cancelled_job_saves_ends_and_is_continued_by_the_same_command(
    cluster: Cluster, recipe: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = start(cluster, recipe, run)
    wait_for(lambda: steps(run) >= 8)
    cluster.run(f"scancel {job}")
    assert cluster.until(job, "CANCELLED", "COMPLETED", "FAILED", seconds=30) == "CANCELLED"
    assert "stopped at step" in log(run)
    reached = steps(run)
    time.sleep(3)
    assert cluster.state(job) == "CANCELLED", "it came back"
    again = start(cluster, recipe, run)
    assert cluster.until(again, "COMPLETED", "FAILED") == "COMPLETED"
    assert f"resumed from step {reached};" in log(run)
    assert sorted(path.name for path in (run / "launches").iterdir()) == ["0001", "0002"]
    got = tensors(run)
    assert all(torch.equal(got[name], undisturbed[name]) for name in undisturbed)


def test_a_job_saves_and_comes_back_before_its_time_limit(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(cluster, recipe, run, "--time", "1", "--warning", "30", "steps=100000")
    again = re.compile(r"stopped at step (\d+) on SIGUSR2.*resumed from step \1;", re.DOTALL)
    wait_for(lambda: again.search(log(run)), 180)  # SLURM may warn up to a minute early
    assert "saved on request, requeued" in log(run)
    cluster.run(f"scancel {job}")
    assert cluster.until(job, "CANCELLED", "FAILED", "COMPLETED", seconds=30) == "CANCELLED"


def test_a_crash_that_repeats_is_given_up(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(cluster, recipe, run, "--restarts", "1", "--container", "false")
    assert cluster.until(job, "COMPLETED", "FAILED") == "FAILED"
    assert f"{job} failed 2 times at its start without getting further" in log(run)
    assert (run / "launches" / "0001" / f"{job}.crashes").read_text().count("\n") == 2


def test_grid_runs_as_one_array_with_one_table(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "grid"
    options = ("--grid", "optim.lr=0.1,0.2", "--seeds", "2", "--cpus-per-task", "1", *SHORT, "--follow")
    done = launch(cluster, recipe, run, *options)
    rows = list(csv.DictReader((run / "grid.csv").read_text().splitlines()))
    assert [(row["optim.lr"], row["seed"]) for row in rows] == [("0.1", "0"), ("0.1", "1"), ("0.2", "0"), ("0.2", "1")]
    assert {row["state"] for row in rows} == {"completed"}
    assert len({row["loss"] for row in rows}) == 4
    assert all(row["loss"] in done.stdout for row in rows)
    assert (run / "optim.lr=0.2,seed=1" / "checkpoints" / "step-00000002").is_dir()
    ids = set(re.findall(r"job (\d+)_\d: completed", done.stdout))
    assert len(ids) == 1
    assert "0.2" in launch(cluster, recipe, run, "--table").stdout


def test_an_element_of_an_array_is_requeued_alone(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "grid"
    done = launch(cluster, recipe, run, "--seeds", "2", "--cpus-per-task", "1", "--throttle", "1")
    job = re.search(r"job (\d+)_0, ", done.stdout)
    assert job
    first, second = (run / f"seed={seed}" for seed in range(2))
    wait_for(lambda: steps(first) >= 9)
    cluster.run(f"scancel --signal=USR2 {job[1]}_0")
    assert cluster.until(f"{job[1]}_1", "COMPLETED", "FAILED") == "COMPLETED", log(run)
    assert cluster.until(f"{job[1]}_0", "COMPLETED", "FAILED") == "COMPLETED", log(run)
    assert tensors(first).keys() == tensors(second).keys()
    assert log(run).count("saved on request, requeued") == 1
    again = launch(cluster, recipe, run, "--seeds", "3", "--cpus-per-task", "1", "--follow")
    assert again.stdout.count("completed") >= 3
    rows = list(csv.DictReader((run / "grid.csv").read_text().splitlines()))
    assert [(row["seed"], row["step"]) for row in rows] == [("0", str(STEPS - 1)), ("1", str(STEPS - 1)), ("2", str(STEPS - 1))]


def test_a_job_can_submit_a_job(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    inner = [sys.executable, str(ROOT / "launchers" / "slurm.py"), "--config", str(recipe), "--run", str(run), *SHORT]
    outer = [
        "srun",
        "--nodes=1",
        "--ntasks=2",
        "--cpus-per-task=2",
        "--mem=100",
        "bash",
        "-c",
        'test $SLURM_PROCID = 1 || exec "$@"',
    ]
    done = subprocess.run(
        [*outer, "x", *inner, "--follow"], env=cluster.env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    assert (run / "checkpoints" / "step-00000002").is_dir()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--partition", "tain"], "the cluster has no partition 'tain'; there are far, train, urgent"),
        (["--nodes", "0"], "Invalid value for '--nodes'"),
        (["--nodes", "9"], "has 4 nodes and 9 are asked for: lower --nodes"),
        (["--tasks-per-node", "3", "--cpus-per-task", "2"], "has 4 CPUs per node and 6 are asked for"),
        (["--gpus-per-node", "2"], "has 0 GPUs per node and 2 are asked for"),
        (["--partition", "far"], "but the nodes write logs there: choose a shared --run"),
        (["steps=2"], "optim.warmup_epochs=1 means 8 steps of warm-up"),
        (["data.path=''"], "add data.path=FOLDER"),
        (["--tasks-per-node", "4", "batch=6"], "batch"),
        (["optim.lrr=1"], "did you mean 'optim.lr'"),
        (["--grid", "optim.lr"], "write KEY=VALUE,VALUE"),
        (["--grid", "optim.lr=0.2,0.20"], "names a value twice"),
        (["--time", "1", "--warning", "60"], "leave nothing of --time 1"),
        (["--account", "x" * 4000, "--qos", "no such"], "sbatch refused the job"),
    ],
)
def test_bad_input_is_one_clear_error(cluster: Cluster, recipe: Path, tmp_path: Path, options: list[str], says: str) -> None:
    done = launch(cluster, recipe, tmp_path / "run", *options, code=2)
    assert says in " ".join(done.stderr.split())
    assert not cluster.run("squeue -h")


def test_without_slurm(cluster: Cluster, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cluster.env, "PATH", str(tmp_path))
    assert "sinfo is not installed" in launch(cluster, recipe, tmp_path / "run", code=2).stderr


def test_dry_run_shows_the_script_and_leaves_nothing(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wanted = {
        "--account": "vision", "--qos": "high", "--time": "1-12:00:00", "--mem": "3G", "--constraint": "fast",
        "--exclude": "n4", "--mail": "a@b.c",
    }  # fmt: skip
    options = [
        *(word for pair in wanted.items() for word in pair),
        "--setup",
        "module load cuda",
        "--container",
        "apptainer exec x.sif",
    ]
    done = launch(cluster, recipe, run, "--nodes", "2", "--dry-run", *options)
    for name, value in wanted.items():
        assert f"#SBATCH {'--mail-user' if name == '--mail' else name}={value}\n" in done.stdout
    assert "\nmodule load cuda\n" in done.stdout
    assert f"apptainer exec x.sif {sys.executable} -u -m submitit" in done.stdout
    assert "wckey" not in done.stdout
    assert "--time" not in launch(cluster, recipe, run, "--dry-run").stdout, "the partition's, not submitit's"
    script = done.stdout[done.stdout.index("#!/bin/bash") :]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert not run.exists()


def test_taken_port_is_named_and_the_next_start_takes_another(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cluster.run("scontrol update partitionname=train state=down")
    job = start(cluster, recipe, run, *SHORT)
    assert f"job {job} trains {run} already" in launch(cluster, recipe, run, code=2).stderr
    with socket.socket() as other:
        other.bind(("", task.port(job, 0)))
        other.listen()
        cluster.run("scontrol update partitionname=train state=up")
        assert cluster.until(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert re.search(rf"error: port {task.port(job, 0)} on n\d: Address already in use", log(run))


def test_job_whose_log_folder_the_node_does_not_see(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    run, shown = tmp_path / "run", tmp_path / "shown.txt"
    cluster.run("scontrol update partitionname=train state=down")
    command = [sys.executable, str(ROOT / "launchers" / "slurm.py"), "--config", str(recipe), "--run", str(run), "--follow"]
    with shown.open("w") as out, subprocess.Popen(command, env=cluster.env, stdout=out, stderr=out) as following:
        wait_for(lambda: "pending" in shown.read_text())
        (run / "launches").rename(run / "elsewhere")
        cluster.run("scontrol update partitionname=train state=up")
        assert following.wait(60) == 1
    assert f"wrote no log: does its node see {run / 'launches' / '0001'}?" in shown.read_text()
