"""From options to a batch script and a job, with submitit.

The batch script decides on requeueing, since it outlives every rank: a run that stopped on request
comes back at once, a crash comes back a bounded number of times for one and the same checkpoint,
and bad input (exit code 2) does not.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env

from scaletrain.launch.slurm import queue, start, task
from scaletrain.launch.slurm.queue import Partition, SlurmError
from scaletrain.launch.slurm.task import Task
from scaletrain.runtime.tables import plural

# in the folder of a launch
SCRIPT = "batch.sh"
# Unicode's categories of control characters, line ends and bytes that are no UTF-8
CONTROL = ("Cc", "Zl", "Zp", "Cs")
# options that are shell code by their nature: what they run is the user's own wish
SHELL = ("setup", "container")


@dataclass(frozen=True)
class Resources:
    """What a job asks for. None leaves it to the cluster. Raises SlurmError for text that a batch
    script cannot hold.
    """

    nodes: int = 1
    tasks_per_node: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    mail: str | None = None
    # e.g. afterok:12:13
    dependency: str | None = None
    # shell lines before the job's command
    setup: tuple[str, ...] = ()
    # prefix of `python`
    container: str | None = None
    # elements of an array at once
    throttle: int = 256
    # seconds between the signal and the end
    warning: int = 120
    # crashes at one and the same checkpoint
    restarts: int = 3
    # stops on request at one and the same checkpoint; None: any number
    stops: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    check_text(f"--{field.name.replace('_', '-')}", text, shell=field.name in SHELL)

        if self.time is not None and self.warning >= queue.seconds(self.time):
            raise SlurmError(
                f"--warning {self.warning} seconds before the end leave nothing of --time "
                f"{self.time}: lower it"
            )

    @property
    def tasks(self) -> int:
        """Processes of each node; one as long as that is left to the partition."""
        return self.tasks_per_node or 1

    def on(self, partition: Partition) -> Resources:
        """With the partition's values where none are asked for. Raises SlurmError for what it can
        never give.
        """
        if self.gpus_per_node is None and len(set(partition.gpus)) > 1:
            few, many = min(partition.gpus), max(partition.gpus)
            raise SlurmError(
                f"the nodes of partition '{partition.name}' have {few} to {many} GPUs: say "
                "--gpus-per-node"
            )

        gpus = partition.gpus[0] if self.gpus_per_node is None else self.gpus_per_node
        tasks = self.tasks_per_node or max(1, gpus)
        cpus = self.cpus_per_task or max(1, min(partition.cpus) // tasks)

        for wanted, given, name, option in (
            (self.nodes, len(partition.nodes), "nodes", "--nodes"),
            (gpus, max(partition.gpus), "GPUs per node", "--gpus-per-node"),
            (
                tasks * cpus,
                max(partition.cpus),
                "CPUs per node",
                "--tasks-per-node or --cpus-per-task",
            ),
        ):
            if wanted > given:
                raise SlurmError(
                    f"partition '{partition.name}' has {given} {name} and {wanted} are asked for: "
                    f"lower {option}"
                )

        return replace(self, gpus_per_node=gpus, tasks_per_node=tasks, cpus_per_task=cpus)

    def undecided(self) -> dict[str, str]:
        """Options that are left to the cluster -> what it will choose."""
        choices = {
            "--gpus-per-node": (self.gpus_per_node, "all of a node"),
            "--ntasks-per-node": (self.tasks_per_node, "one per GPU, or one"),
            "--cpus-per-task": (self.cpus_per_task, "the node's, divided by its tasks"),
            "--time": (self.time, "the partition's limit"),
            "--mem": (self.mem, "the partition's default"),
        }

        return {option: choice for option, (value, choice) in choices.items() if value is None}


def check_text(option: str, text: str, *, shell: bool = False) -> None:
    """Raises SlurmError for what would not stay on its line of a batch script, or would not be read
    there as it is meant.
    """
    for character in text:
        if unicodedata.category(character) in CONTROL:
            raise SlurmError(
                f"{option} contains the control character {character!a}, which has no place in a "
                "batch script"
            )

    if "\\" in text and not shell:
        raise SlurmError(
            f"{option} contains a backslash, which SLURM does not read as a character of its own: "
            f"{text}"
        )


class _Executor(SlurmExecutor):
    """submitit's, which also renders batch scripts where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def _executor(
    folder: Path, run: Path, resources: Resources, count: int, drafts: Path, comment: str | None
) -> _Executor:
    """Of `count` runs; more than one make an array. `folder` receives the logs, `run` names the
    job, and is its comment unless there is another.

    Every text in the script is an option, which Resources has checked, or is checked here. submitit
    replaces %j and the like in the path of its own folder, so it has `drafts`, and the paths of the
    logs are given to SLURM as SLURM reads them.
    """
    check_text("--run", str(run))
    check_text("--run", str(folder))
    check_text("--run", comment or "")

    logs = _logs(folder, count)
    forced = {
        "output": f"{logs}_0_log.out",
        "error": f"{logs}_0_log.err",
        "mem": resources.mem,
        "requeue": True,
        "dependency": resources.dependency,
        # a job whose dependency has failed ends as well
        "kill-on-invalid-dep": "yes" if resources.dependency else None,
    }
    executor = _Executor(folder=drafts)

    executor.update_parameters(
        job_name=f"scaletrain-{run.name}",
        comment=comment or str(run),
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks_per_node,
        cpus_per_task=resources.cpus_per_task,
        gpus_per_node=resources.gpus_per_node or None,
        # its default is five minutes
        time=resources.time,
        partition=resources.partition,
        account=resources.account,
        qos=resources.qos,
        constraint=resources.constraint,
        exclude=resources.exclude,
        mail_user=resources.mail,
        mail_type="END,FAIL,REQUEUE" if resources.mail else None,
        array_parallelism=resources.throttle,
        signal_delay_s=resources.warning,
        # its default is refused where such keys are enforced
        wckey=None,
        setup=_before(folder, resources),
        teardown=_after(folder, resources),
        additional_parameters={key: value for key, value in forced.items() if value is not None},
        # the command has an srun of its own
        use_srun=False,
    )

    executor.parameters["map_count"] = count if count > 1 else None
    return executor


def _logs(folder: Path, count: int) -> str:
    """How the paths of all logs begin, as SLURM reads them: %j and the like are replaced, %% stands
    for a percent sign.
    """
    return f"{folder}/".replace("%", "%%") + ("%A_%a" if count > 1 else "%j")


def _command(folder: Path, resources: Resources, count: int) -> str:
    """What the batch script starts on every task."""
    check_text("the path of Python", sys.executable, shell=True)
    logs = _logs(folder, count)
    step = [
        "srun",
        "--unbuffered",
        "--output",
        f"{logs}_%t_log.out",
        "--error",
        f"{logs}_%t_log.err",
        "--kill-on-bad-exit=1",
    ]

    python = f"{resources.container or ''} {shlex.quote(sys.executable)}".strip()
    # since SLURM 22.05 srun does not take the number of CPUs from sbatch
    cpus = '--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"'
    return f"{shlex.join(step)} {cpus} {python} -u -m {start.__name__} {shlex.quote(str(folder))}"


def script(
    folder: Path, run: Path, resources: Resources, count: int, comment: str | None = None
) -> str:
    """The batch script of `count` runs, as it would be submitted; more than one make an array."""
    with tempfile.TemporaryDirectory() as drafts:
        executor = _executor(folder, run, resources, count, Path(drafts), comment)
        return executor._make_submission_file_text(_command(folder, resources, count), "")


def submit(
    folder: Path,
    run: Path,
    resources: Resources,
    tasks: Sequence[Task],
    comment: str | None = None,
) -> list[str]:
    """The ids of the jobs; several tasks make one array. comment: by which queue.live finds them;
    None: the path of the run. Raises SlurmError with sbatch's own words.
    """
    _make(folder)
    task.write(folder, tasks)
    count = len(tasks)

    # for people
    text = script(folder, run, resources, count, comment)
    (folder / SCRIPT).write_text(text, encoding="utf-8")

    # then what that job was given is not for this one
    inside = "SLURM_JOB_ID" in os.environ
    kept = {
        k: v
        for k, v in os.environ.items()
        if k == "SLURM_CONF" or (k.startswith("SBATCH_") and not inside)
    }

    try:
        # submitit prints what sbatch says as well as raising it
        with (
            tempfile.TemporaryDirectory() as drafts,
            clean_env(),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            os.environ.update(kept)
            executor = _executor(folder, run, resources, count, Path(drafts), comment)
            job = executor._submit_command(_command(folder, resources, count)).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        raise queue.refusal(f"sbatch refused the job: {_reason(str(error))}") from None

    return [job] if count == 1 else [f"{job}_{element}" for element in range(count)]


def _reason(text: str) -> str:
    """sbatch's own complaint, out of what submitit says."""
    lines = [
        line.removeprefix("sbatch: error: ")
        for line in text.splitlines()
        if line.startswith("sbatch: error: ")
    ]

    return lines[-1] if lines else text


def _make(folder: Path) -> None:
    """Make the folder of a launch, closed to others: its batch script and tasks are run."""
    launches = folder.parent
    launches.parent.mkdir(parents=True, exist_ok=True)
    launches.mkdir(exist_ok=True, mode=0o700)

    for place in (launches.parent, launches):
        state = place.stat()
        if state.st_uid != os.getuid() or state.st_mode & 0o022:
            raise SlurmError(
                f"{place} can be changed by others, who could then run programs as you: chmod go-w "
                "it, or choose --run"
            )

    folder.mkdir(mode=0o700)


def _before(folder: Path, resources: Resources) -> list[str]:
    each = (
        "srun --nodes=$SLURM_JOB_NUM_NODES --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 "
        if resources.nodes > 1
        else ""
    )
    text = f"error: some nodes do not see {folder}: choose a --run that all nodes share"

    return [
        *(
            f"# left to the cluster: {option}, {choice}"
            for option, choice in resources.undecided().items()
        ),
        *resources.setup,
        f"look() {{ {each}test -d {shlex.quote(str(folder))}; }}",
        f"look || {{ sleep 5; look; }} || {{ sleep 20; look; }} || {{ echo {shlex.quote(text)} "
        f">&2; exit 2; }}",
        "set +e  # what ends the command is judged below",
    ]


def _after(folder: Path, resources: Resources) -> list[str]:
    """Shell lines after the command. Crashes are counted by what this job has saved: others may
    write to the run folder too. A job that ends for good leaves its exit code in a file.
    """
    restarts, stops = resources.restarts, resources.stops
    counted = "true"
    if stops is not None:
        counted = (
            f'echo "$when: stopped" >> "$id.stops" && [ "$(grep -cF "$when: " "$id.stops")" -le '
            f"{stops} ]"
        )

    return f"""\
code=$?
cd {shlex.quote(str(folder))}
id=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
id=${{id:-$SLURM_JOB_ID}}
start=$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}
again() {{  # the controller may be away for a moment; after success it ends this script
    for try in 1 2 3 4 5 6; do
        if scontrol requeue "$id"; then sleep 300; fi
        sleep 5
    done
}}
# of the first rank that failed; srun tells the last
if [ -s "$start.failure" ]; then code=$(cat "$start.failure"); fi
when="before this job has saved anything"
if [ -s "$SLURM_JOB_ID.progress" ]; then
    when="after saving $(head -n 1 "$SLURM_JOB_ID.progress")"
fi
if [ -e "$start.stopped" ] && {counted}; then
    echo "$id: saved on request, requeued" >&2
    again
elif [ "$code" -ne 0 ] && [ "$code" -ne 2 ]; then
    echo "$when: exit code $code" >> "$id.crashes"
    if [ "$(grep -cF "$when: " "$id.crashes")" -le {restarts} ]; then
        echo "$id: exit code $code $when, requeued" >&2
        again
    fi
    echo "error: $id failed {plural(restarts + 1, "time")} $when" >&2
fi
echo "$code" > "$id.exit"
exit "$code\"""".splitlines()
