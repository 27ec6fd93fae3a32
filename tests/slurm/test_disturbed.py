"""launchers/slurm.py on a real cluster of four nodes: what disturbs a job leaves no trace in what
it trains.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kit.slurm_cluster import Cluster
from kit.slurm_jobs import CRASHED, STEPS, launch, log, start, steps, tensors, unavailable, wait_for

pytestmark = [unavailable, pytest.mark.timeout(300)]


def rank_process(cluster: Cluster, job: str, rank: int) -> int:
    """Of a rank itself, which is older than its loader workers."""
    marks, found = {f"SLURM_JOB_ID={job}".encode(), f"RANK={rank}".encode()}, []
    for pid in cluster.processes():
        with contextlib.suppress(OSError):
            if marks <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                found.append(pid)
    return min(found)


def kill_rank(cluster: Cluster, job: str) -> None:
    os.kill(rank_process(cluster, job, 1), signal.SIGKILL)


def lose_node(cluster: Cluster, job: str) -> None:
    node = cluster.run(f"squeue -h -o %B -j {job}")
    cluster.run(f"scontrol update nodename={node} state=down reason=test")


def preempt(cluster: Cluster, job: str) -> None:
    urgent = [
        "sbatch",
        "--partition=urgent",
        "--nodes=4",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    ]
    subprocess.run(urgent, env=cluster.env, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("disturb", "trace"),
    [
        (preempt, r"stopped at step (\d+) on SIGUSR2.*resumed from step \1;"),
        (kill_rank, CRASHED),
        (lose_node, r"(?i:node failure).*resumed from step \d+;"),
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
        with contextlib.suppress(
            subprocess.CalledProcessError
        ):  # refused where the node has come back by itself
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


def test_a_job_saves_and_comes_back_before_its_time_limit(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
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
    assert f"error: {job} failed 2 times before this job has saved anything" in log(run)
    assert (run / "launches" / "0001" / f"{job}.crashes").read_text().count("\n") == 2


def test_an_element_of_an_array_is_requeued_alone(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
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
    assert [(row["seed"], row["step"]) for row in rows] == [
        ("0", str(STEPS - 1)),
        ("1", str(STEPS - 1)),
        ("2", str(STEPS - 1)),
    ]
