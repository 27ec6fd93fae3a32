"""Two fleets on a real cluster follow a training; one of them and jobs of theirs are killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit import fleets
from kit.slurm_cluster import Cluster
from kit.slurm_jobs import launch, unavailable, wait_for

pytestmark = [unavailable, pytest.mark.timeout(300)]


def test_everything_is_measured_once_whoever_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    scene = fleets.prepare(tmp_path / "data", 60, 30, ("knn", "linear"))
    expected = scene.undisturbed(tmp_path / "undisturbed")
    run, logs = tmp_path / "run", [tmp_path / f"{n}.log" for n in range(2)]
    launch(cluster, scene.recipe, run, "--cpus-per-task", "1")
    first, second = (scene.fleet(cluster, run, log) for log in logs)

    wait_for(lambda: fleets.running(cluster, run))
    first.kill()
    first.wait()
    (killed, *_) = fleets.running(cluster, run)
    wait_for(lambda: fleets.kill(fleets.evaluating(cluster, killed)))
    wait_for(lambda: {*fleets.running(cluster, run)} - {killed})
    (stopped, *_) = {*fleets.running(cluster, run)} - {killed}
    wait_for(lambda: fleets.evaluating(cluster, stopped))
    cluster.run(f"scancel --signal=USR2 {stopped}")
    again = scene.fleet(cluster, run, logs[0])

    assert [again.wait(200), second.wait(200)] == [0, 0], logs[0].read_text() + logs[1].read_text()
    assert fleets.metrics(run) == expected
    assert set(fleets.measured(run).values()) == {1}
    assert fleets.errors(run) == []
    assert fleets.curves(run) == {"knn": [30, 60], "linear": [30, 60]}
    assert fleets.equal(run, tmp_path / "undisturbed")
    assert [path.name for path in (run / "evals" / "claims").iterdir()] == [".lock"]
    assert fleets.log(run).count("saved on request, requeued") == 1
    assert "4 measured" in logs[1].read_text()
