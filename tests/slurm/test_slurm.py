"""launchers/slurm.py on a real cluster of four nodes on this machine: grids, bad input, what it
shows and what it leaves.
"""

from __future__ import annotations

import csv
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from kit.slurm_cluster import Cluster
from kit.slurm_jobs import ROOT, SHORT, launch, log, start, unavailable, wait_for

from scaletrain.cli.main import main
from scaletrain.launch.slurm import task

pytestmark = [unavailable, pytest.mark.timeout(300)]


def test_grid_runs_as_one_array_with_one_table(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "50%job %A"  # no pattern of SLURM's
    options = (
        "--grid",
        "optim.lr=0.1,0.2",
        "--seeds",
        "2",
        "--cpus-per-task",
        "1",
        *SHORT,
        "--follow",
    )
    done = launch(cluster, recipe, run, *options)
    rows = list(csv.DictReader((run / "grid.csv").read_text().splitlines()))
    assert [(row["optim.lr"], row["seed"]) for row in rows] == [
        ("0.1", "0"),
        ("0.1", "1"),
        ("0.2", "0"),
        ("0.2", "1"),
    ]
    assert {row["state"] for row in rows} == {"completed"}
    assert len({row["loss"] for row in rows}) == 4
    assert all(row["loss"] in done.stdout for row in rows)
    assert (run / "optim.lr=0.2,seed=1" / "checkpoints" / "step-00000002").is_dir()
    ids = set(re.findall(r"job (\d+)_\d: completed", done.stdout))
    assert len(ids) == 1
    assert "0.2" in launch(cluster, recipe, run, "--table").stdout
    logs = {path.name for path in (run / "launches" / "0001").glob("*_log.*")}
    assert logs == {
        f"{job}_{element}_0_log.{kind}"
        for job in ids
        for element in range(4)
        for kind in ("out", "err")
    }
    assert [path.name for path in run.parent.iterdir()] == [run.name]


def test_a_job_can_submit_a_job(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "100%j it's #1"
    inner = [
        sys.executable,
        str(ROOT / "launchers" / "slurm.py"),
        "--config",
        str(recipe),
        "--run",
        str(run),
        *SHORT,
    ]
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
        [*outer, "x", *inner, "--follow"],
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    assert (run / "checkpoints" / "step-00000002").is_dir()
    assert [path.name for path in run.parent.iterdir()] == [run.name]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--partition", "tain"],
            "the cluster has no partition 'tain'; there are far, train, urgent",
        ),
        (["--nodes", "0"], "Invalid value for '--nodes'"),
        (["--nodes", "9"], "has 4 nodes and 9 are asked for: lower --nodes"),
        (
            ["--tasks-per-node", "3", "--cpus-per-task", "2"],
            "has 4 CPUs per node and 6 are asked for",
        ),
        (["--gpus-per-node", "2"], "has 0 GPUs per node and 2 are asked for"),
        (["--partition", "far"], "but the nodes write logs there: choose a shared --run"),
        (["steps=2"], "optim.warmup_epochs=1 means 8 steps of warm-up"),
        (["data.path=''"], "add data.path=FOLDER"),
        (["--tasks-per-node", "4", "batch=6"], "batch"),
        (["optim.lrr=1"], "did you mean 'optim.lr'"),
        (["--grid", "optim.lr"], "write KEY=VALUE,VALUE"),
        (["--grid", "optim.lr=0.2,0.20"], "names a value twice"),
        (["--time", "1", "--warning", "60"], "leave nothing of --time 1"),
        (["--time", "1h"], "0 or UNLIMITED for none"),
        (["--run", "x\ntouch planted\n"], "--run contains the control character"),
        (["--account", "x" * 4000, "--qos", "no such"], "sbatch refused the job: "),
    ],
)
def test_bad_input_is_one_clear_error(
    cluster: Cluster,
    recipe: Path,
    tmp_path: Path,
    options: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        ["scaletrain", "launch", "slurm", str(recipe), "--run", str(tmp_path / "run"), *options],
    )
    with pytest.raises(SystemExit) as end:
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert end.value.code == 2
    assert says in said
    assert "Traceback" not in said
    # the job of another test may still be completing
    assert not cluster.run("squeue -h --states=pending,running")


def test_without_slurm(
    cluster: Cluster, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cluster.env, "PATH", str(tmp_path))
    assert "sinfo is not installed" in launch(cluster, recipe, tmp_path / "run", code=2).stderr


def test_dry_run_shows_the_script_and_leaves_nothing(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    wanted = {
        "--account": "vision", "--qos": "high", "--time": "1-12:00:00", "--mem": "3G",
        "--constraint": "fast", "--exclude": "n4", "--mail": "a@b.c",
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
    assert (
        f"apptainer exec x.sif {sys.executable} -u -m scaletrain.launch.slurm.start" in done.stdout
    )
    assert "#SBATCH --time" not in launch(cluster, recipe, run, "--dry-run").stdout, (
        "the partition's"
    )
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
    assert done.stdout.startswith("#!/bin/bash\n")
    assert (
        "1 run of 2 nodes x 1 process, 0 GPUs per node, 4 CPUs per process, partition train"
        in done.stderr
    )
    assert not run.exists()


def test_taken_port_is_named_and_the_next_start_takes_another(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
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


def test_job_whose_log_folder_the_node_does_not_see(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    run, shown = tmp_path / "run", tmp_path / "shown.txt"
    cluster.run("scontrol update partitionname=train state=down")
    command = [
        sys.executable,
        str(ROOT / "launchers" / "slurm.py"),
        "--config",
        str(recipe),
        "--run",
        str(run),
        "--follow",
    ]
    with (
        shown.open("w") as out,
        subprocess.Popen(command, env=cluster.env, stdout=out, stderr=out) as following,
    ):
        wait_for(lambda: "pending" in shown.read_text())
        (run / "launches").rename(run / "elsewhere")
        cluster.run("scontrol update partitionname=train state=up")
        assert following.wait(60) == 1
    assert f"wrote no log: does its node see {run / 'launches' / '0001'}?" in shown.read_text()
