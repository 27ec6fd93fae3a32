"""A pipeline as a chain of jobs on a real cluster: preempted, resumed, submitted again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit import pipelines
from kit.slurm_cluster import Cluster
from kit.slurm_jobs import unavailable, wait_for

pytestmark = [unavailable, pytest.mark.timeout(300)]
PIPELINE = """
options: {data: null}
stages:
- name: pretrain
  train: recipe.yaml
  set: {data.path: "${data}", steps: 30}
- {name: labels, do: subset, set: {shards: "${data}", share: "${item}"}, foreach: [25, 50]}
- name: larger
  train: recipe.yaml
  set: {data.path: "${data}", steps: 4, data.views.0.size: 24}
  continue: ${pretrain.run}
  after: [labels]
"""


def launch(cluster: Cluster, file: Path, work: Path, *options: str) -> str:
    words = ["launch", "slurm", "--pipeline", str(file), "--work", str(work), *options]
    done = subprocess.run(
        [sys.executable, "-m", "scaletrain", *words],
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_chain_of_jobs_equals_one_driver(cluster: Cluster, tmp_path: Path) -> None:
    file, work = pipelines.write(tmp_path, PIPELINE), tmp_path / "work"
    data = f"data={pipelines.shards(tmp_path / 'shards')}"
    options = (data, "--tasks-per-node", "2", "--cpus-per-task", "1")
    said = launch(cluster, file, work, *options)
    jobs = dict(re.findall(r"job (\d+): ([\w-]+),", said))
    assert list(jobs.values()) == ["pretrain", "labels-0", "labels-1", "larger"]
    last = list(jobs)[-1]

    # submitted again, nothing new is
    again = launch(cluster, file, work, *options)
    assert f"larger: job {last} was submitted before" in again
    assert not re.search(r"^job \d+:", again, re.MULTILINE)

    metrics = work / "pretrain" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 5)
    cluster.run(f"scontrol requeue {next(iter(jobs))}")
    assert cluster.until(last, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    assert "every stage is finished" in launch(cluster, file, work, *options)

    alone = tmp_path / "alone"
    start = [sys.executable, "-m", "scaletrain", "pipeline", str(file), data]
    subprocess.run(
        [*start, "--work", str(alone), "--procs", "2"],
        env=cluster.env | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    for name in ("pretrain", "larger"):
        expected, got = (pipelines.tensors(place / name) for place in (alone, work))
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
    for name in ("labels-0", "labels-1"):
        subsets = [(place / name / "subset.json").read_text() for place in (alone, work)]
        assert subsets[0] == subsets[1]
        assert json.loads(subsets[0])["rule"].startswith(("25", "50"))
