"""The batch script: what may stand in it, what bash makes of it, and when it brings a job back. The
bash is a real one.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from scaletrain.launch.slurm import command, submit, task
from scaletrain.launch.slurm.queue import Partition, SlurmError, seconds
from scaletrain.launch.slurm.submit import Resources
from scaletrain.runtime import signals

NEVER = float("inf")
LISTS = ("tuple[str, ...]",)
TEXTS = ("str | None", *LISTS)
NUMBERS = ("int", "int | None")


def texts() -> dict[str, str]:
    """The fields of Resources that hold text, with their types."""
    kinds = {field.name: str(field.type) for field in fields(Resources)}
    assert {*kinds.values()} <= {*TEXTS, *NUMBERS}, (
        "a field of a new kind: is what it holds checked, and is it tried here?"
    )
    return {name: kind for name, kind in kinds.items() if kind in TEXTS}


@pytest.mark.parametrize(
    "bad", ["\n", "\r", "\0", "\x1b", "\t", "\x7f", "\x85", "\u2028", "\u2029", "\udcff"], ids=ascii
)
def test_no_control_character_reaches_the_script(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"a{bad}touch planted{bad}b"
    assert len(texts()) >= 10
    for name, kind in texts().items():
        with pytest.raises(SlurmError) as error:
            Resources(**{name: ("true", text) if kind in LISTS else text})
        assert str(error.value).startswith(f"--{name} contains the control character {bad!a}")
        assert len(str(error.value).splitlines()) == 1
    for folder, run in ((Path("/runs/x"), Path(text)), (Path(text), Path("/runs/x"))):
        with pytest.raises(SlurmError, match=r"^--run contains the control character"):
            submit.script(folder, run, Resources(), 1)
    monkeypatch.setattr(sys, "executable", text)
    with pytest.raises(SlurmError, match=r"^the path of Python contains the control character"):
        submit.script(Path("/runs/x"), Path("/runs/x"), Resources(), 1)


def test_a_backslash_is_refused_where_slurm_would_take_it_for_an_escape() -> None:
    for options in ({"account": "a\\b"}, {"time": "1\\0"}):
        with pytest.raises(SlurmError, match="contains a backslash"):
            Resources(**options)
    with pytest.raises(SlurmError, match=r"^--run contains a backslash"):
        submit.script(Path("/runs/a\\b/1"), Path("/runs/a\\b"), Resources(), 1)
    line = "echo a\\ b"
    assert f"\n{line}\n" in submit.script(
        Path("/runs/1"), Path("/runs"), Resources(setup=(line,)), 1
    )


@pytest.mark.parametrize(
    "text",
    [
        "$(touch planted)",
        "`touch planted`",
        "'; touch planted; '",
        '" # & | > x',
        "it's ~ * [a]",
        "é",
    ],
)
def test_what_stands_in_the_script_is_not_run(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option but those that are shell code, and every path."""
    values = {
        name: "1-0" if name == "time" else f"{name} {text}"
        for name in texts()
        if name not in submit.SHELL
    }
    run = tmp_path / text
    (folder := run / "launches" / "0001").mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", f"/bin/{text}")
    script = submit.script(folder, run, Resources(nodes=2, **values), 3)

    directives = [
        line.partition("=")[2] for line in script.splitlines() if line.startswith("#SBATCH --")
    ]
    assert {*values.values(), str(run), f"scaletrain-{text}"} <= {
        "".join(shlex.split(value)) for value in directives
    }
    done, (look, step) = bash(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert look[-3:] == ["test", "-d", str(folder)]
    assert step[step.index("--output") + 1] == f"{folder}/%A_%a_%t_log.out"
    assert step[-5:] == [f"/bin/{text}", "-u", "-m", "scaletrain.launch.slurm.start", str(folder)]
    assert not list(tmp_path.rglob("planted"))


def test_percent_signs_of_a_path_are_not_slurms() -> None:
    run = Path("/runs/50%job/%A")
    script = submit.script(run / "launches" / "0001", run, Resources(), 1)
    assert "#SBATCH --output=/runs/50%%job/%%A/launches/0001/%j_0_log.out\n" in script
    assert "--error /runs/50%%job/%%A/launches/0001/%j_%t_log.err " in script
    assert "\ncd /runs/50%job/%A/launches/0001\n" in script
    assert "#SBATCH --comment=/runs/50%job/%A\n" in script


def bash(
    script: str, place: Path, code: int = 0, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run a batch script; also the arguments of each srun in it. Python ends with `code`, and a
    requeue ends the script.
    """
    note = f'printf "%s\\x1f" "$@" >> {place}/calls; echo >> {place}/calls'
    tools = {
        "srun": f'{note}\ncase "$*" in *scaletrain.launch.slurm.start*) exit {code};; esac',
        "scontrol": "kill $PPID",
        "sleep": "",
    }
    for name, body in tools.items():
        (place / name).write_text(f"#!/bin/bash\n{body}\n")
        (place / name).chmod(0o755)
    (place / "calls").write_text("")
    (place / "script").write_text(script)
    slurm = {
        "PATH": f"{place}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        **environment,
    }
    done = subprocess.run(
        ["bash", str(place / "script")],
        env=slurm,
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, [line.split("\x1f")[:-1] for line in (place / "calls").read_text().splitlines()]


class Job:
    """A job whose batch script is started again and again."""

    def __init__(self, place: Path, restarts: int) -> None:
        self.place, self.run, self.starts = place, place / "run", 0
        self.folder = self.run / "launches" / "0001"
        self.folder.mkdir(parents=True)
        self.script = submit.script(self.folder, self.run, Resources(restarts=restarts), 1)

    def crashes(self, code: int = 1, job: str = "7", **environment: str) -> str:
        """What becomes of it: requeued, or its exit code; with the last line of its log."""
        variables = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(self.starts), **environment}
        done, _ = bash(self.script, self.place, code, **variables)
        self.starts += 1
        self.said = done.stderr.strip()
        return "requeued" if done.returncode == -signal.SIGTERM else str(done.returncode)

    def saves(self, step: int, job: str = "7") -> None:
        (self.folder / f"{job}.progress").write_text(f"step {step}\n")


def test_crashes_are_counted_at_one_and_the_same_checkpoint(tmp_path: Path) -> None:
    job = Job(tmp_path, restarts=2)
    assert [job.crashes(), job.crashes()] == ["requeued", "requeued"]
    job.saves(1)
    assert [job.crashes(), job.crashes()] == ["requeued", "requeued"]
    assert job.said == "7: exit code 1 after saving step 1, requeued"
    job.saves(12)
    assert [job.crashes(), job.crashes(75), job.crashes(137)] == ["requeued", "requeued", "137"]
    assert job.said == "error: 7 failed 3 times after saving step 12"


def test_what_others_save_in_the_run_folder_is_no_progress_of_this_job(tmp_path: Path) -> None:
    """Another launch that trains there, an evaluation, another element of the array."""
    job = Job(tmp_path, restarts=1)
    for step, outcome in ((1, "requeued"), (2, "1")):
        (job.run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (job.run / "checkpoints" / f"step-{step:08d}" / "manifest.json").touch()
        job.saves(step, job="8")
        assert job.crashes() == outcome
    assert job.said == "error: 7 failed 2 times before this job has saved anything"

    elements = [
        {"job": number, "SLURM_ARRAY_JOB_ID": "20", "SLURM_ARRAY_TASK_ID": number[1]}
        for number in ("20", "21")
    ]
    job.saves(5, job="21")
    assert [job.crashes(**element) for element in elements] == ["requeued", "requeued"]
    assert [job.crashes(**element) for element in elements] == ["1", "1"]
    assert job.said == "error: 20_1 failed 2 times after saving step 5"


def test_a_refusal_is_final_and_a_stop_on_request_is_no_crash(tmp_path: Path) -> None:
    job = Job(tmp_path, restarts=0)
    assert job.crashes(2) == "2"
    (job.folder / "7.1.failure").write_text("2")  # of the first rank; the last one was killed
    assert job.crashes(137) == "2"
    for _ in range(3):
        (job.folder / f"7.{job.starts}.stopped").touch()
        assert job.crashes(140) == "requeued"
    assert not list(job.folder.glob("*.crashes"))
    assert job.crashes() == "1"
    assert job.said == "error: 7 failed 1 time before this job has saved anything"


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        ("90", 5400), ("90:30", 5430), ("1:00:00", 3600), ("2-0", 172800),
        ("1-12:30", 131400), ("1-12:30:15", 131415),
        ("00:00:30", 30), ("0", NEVER), ("0:00", NEVER), ("UNLIMITED", NEVER),
        ("infinite", NEVER), ("Unlimited", NEVER),
    ],
)  # fmt: skip
def test_time_limits(limit: str, wanted: float) -> None:
    assert seconds(limit) == wanted
    assert Resources(time=limit, warning=29).time == limit
    if wanted is not NEVER:
        with pytest.raises(SlurmError, match=f"leave nothing of --time {limit}"):
            Resources(time=limit, warning=int(wanted))


@pytest.mark.parametrize(
    "limit", ["1h", "1d", "-5", "1-00:00:00:00", "1:2:3:4", "5 ", "", "1-", "1.5", "NONE", "٣"]
)
def test_what_is_no_time_limit_is_told_the_forms(limit: str) -> None:
    with pytest.raises(
        SlurmError,
        match=r"DAYS-HOURS:MINUTES, DAYS-HOURS:MINUTES:SECONDS; 0 or UNLIMITED for none$",
    ):
        Resources(time=limit)


def test_what_the_partition_decides() -> None:
    place = Partition("train", ("n1", "n2"), (64, 64), (8, 8))
    assert list(Resources(time="0").undecided()) == [
        "--gpus-per-node",
        "--ntasks-per-node",
        "--cpus-per-task",
        "--mem",
    ]
    decided = Resources(nodes=2).on(place)
    assert (decided.gpus_per_node, decided.tasks_per_node, decided.cpus_per_task) == (8, 8, 8)
    script = submit.script(Path("/runs/1"), Path("/runs"), decided, 1)
    assert {
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --cpus-per-task=8",
    } <= set(script.splitlines())
    own = Resources(gpus_per_node=2, tasks_per_node=1, cpus_per_task=3)
    assert own.on(place) == own
    with pytest.raises(SlurmError, match="have 4 to 8 GPUs: say --gpus-per-node"):
        Resources().on(Partition("mixed", ("n1", "n2"), (64, 64), (8, 4)))


def test_json_of_tasks(tmp_path: Path) -> None:
    tasks = [
        task.Task(["train", "a b.yaml", 'data.path="é\\n"'], "/runs/x"),
        task.Task([], "/runs/y"),
    ]
    task.write(tmp_path, tasks)
    assert task.read(tmp_path) == tasks
    assert json.loads((tmp_path / task.TASKS).read_text())[1] == {"arguments": [], "run": "/runs/y"}


def dry_run(*options: str) -> Any:
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, ["--dry-run", *options])


def test_dry_run_needs_neither_slurm_nor_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    run = tmp_path / "run"
    done = dry_run(
        "--nodes", "8", "--run", str(run), "data.path=/not/here", "--grid", "optim.lr=0.1,0.2"
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "\n#SBATCH --job-name=scaletrain-run\n" in done.stdout
    assert "\n#SBATCH --nodes=8\n" in done.stdout
    assert "\n#SBATCH --array=0-1%2\n" in done.stdout
    for option in ("--gpus-per-node", "--ntasks-per-node", "--cpus-per-task", "--time", "--mem"):
        assert f"# left to the cluster: {option}, " in done.stdout
        assert f"#SBATCH {option}" not in done.stdout
        assert any(line.split()[:1] == [option] for line in done.stderr.splitlines())
    subprocess.run(["/bin/bash", "-n"], input=done.stdout, text=True, check=True)
    assert not run.exists()

    whole = (
        "--gpus-per-node",
        "4",
        "--tasks-per-node",
        "4",
        "--cpus-per-task",
        "8",
        "--time",
        "0",
        "--mem",
        "9G",
    )
    decided = dry_run(*whole, "--run", str(run))
    assert "left to the cluster" not in decided.stdout
    assert "\n#SBATCH --time=0\n" in decided.stdout
    for options in (
        ["optim.lrr=1"],
        ["--grid", "optim.lrr=1,2"],
        ["--run", f"{run}\ntouch planted"],
        ["--time", "1h"],
    ):
        refused = dry_run("--run", str(run), *options)
        assert isinstance(refused.exception, ValueError)
        assert refused.stdout == ""


def test_the_recipe_comes_first_or_by_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for words in (["byol_r18_cifar10", "--data", "/x"], ["--config", "byol_r18_cifar10", "seed=1"]):
        done = dry_run(*words)
        assert done.exit_code == 0, done.output
        assert f"#SBATCH --comment={tmp_path}/runs/byol_r18_cifar10\n" in done.stdout
    assert "--array=0-5%6" in dry_run("relicv2_r50_in1k", "--grid", "byol_masks").stdout
    for words, says in (
        (["byol_r18_cifar10", "--config", "relic_r18_cifar10"], "two recipes are named"),
        (["byol_r18_cifar"], "the nearest are byol_r18_cifar10"),
        (["byol_r18_cifar10", "relic_r18_cifar10"], "an override has the form key.subkey=value"),
    ):
        assert says in str(dry_run(*words).exception)


def test_progress_is_noted_for_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(signals.PROGRESS_FILE, raising=False)
    signals.note_progress("step 1")
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    slurm |= {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.1.0.7"}
    monkeypatch.setenv(
        "SCALETRAIN_PROGRESS_FILE",
        task.environment(slurm, str(tmp_path))["SCALETRAIN_PROGRESS_FILE"],
    )
    for step in (2, 10):
        signals.note_progress(f"step {step}")
        assert (tmp_path / "7.progress").read_text() == f"step {step}\n"
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setenv("SCALETRAIN_PROGRESS_FILE", str(tmp_path / "gone" / "7.progress"))
    signals.note_progress("step 11")  # a note that cannot be written ends no run
