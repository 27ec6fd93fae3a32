"""A pipeline as a chain of jobs on a real cluster: preempted, resumed, submitted again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from kit import pipelines
from kit.commands import call
from kit.slurm_cluster import Cluster
from kit.slurm_jobs import unavailable, wait_for

from scaletrain.train import records

pytestmark = [unavailable, pytest.mark.timeout(400)]
PIPELINE = """
options: {data: null}
stages:
- name: pretrain
  train: recipe.yaml
  set: {data.path: "${data}", steps: 40, checkpoint.every_steps: 0}
- {name: labels, do: subset, set: {shards: "${data}", share: 50}}
- name: larger
  train: recipe.yaml
  set: {data.path: "${data}", steps: 4, data.views.0.size: 24}
  continue: ${pretrain.run}
  after: [labels]
"""


def test_a_chain_of_jobs_equals_one_driver(cluster: Cluster, tmp_path: Path) -> None:
    file, work = pipelines.write(tmp_path, PIPELINE), tmp_path / "work"
    data = f"data={pipelines.shards(tmp_path / 'shards')}"

    def launch() -> str:
        options = ("--work", work, data, "--tasks-per-node", "1", "--cpus-per-task", "1")
        done = call("launch", "slurm", "--pipeline", file, *options, **cluster.env)
        assert done.exit_code == 0, done.output
        return str(done.stdout)

    jobs = dict(re.findall(r"job (\d+): ([\w-]+),", launch()))
    assert list(jobs.values()) == ["pretrain", "labels", "larger"]
    first, _, last = jobs
    # submitted again, nothing is new
    again = launch()
    assert f"larger: job {last} was submitted before" in again
    assert not re.search(r"^job \d+:", again, re.MULTILINE)

    wait_for(lambda: len(records.read(work / "pretrain").steps) > 2)
    cluster.run(f"scontrol requeue {first}")
    assert cluster.until(last, "COMPLETED", "FAILED", "CANCELLED", seconds=300) == "COMPLETED"
    log = "".join(path.read_text() for path in (work / "launches").glob("pretrain.*/*_log.out"))
    assert "pretrain: resumed at step" in log
    assert "every stage is finished: nothing is submitted" in launch()

    alone = tmp_path / "alone"
    pipelines.drive(file, alone, [data])
    for name in ("pretrain", "larger"):
        expected, got = (pipelines.tensors(place / name) for place in (alone, work))
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
    subsets = [(place / "labels" / "subset.json").read_text() for place in (alone, work)]
    assert subsets[0] == subsets[1]
