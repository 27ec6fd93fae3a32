"""From options to a batch script and a job, with submitit.

The batch script decides on requeueing, since it outlives every rank: a run that stopped on request comes back at once, a crash
comes back a bounded number of times for one and the same checkpoint, and bad input (exit code 2) does not.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env

from scaletrain.slurm import queue
from scaletrain.slurm.queue import Partition, SlurmError
from scaletrain.slurm.task import Task

RUNS = "runs.txt"  # in the folder of a launch: the run folder of each element of the array, in order


@dataclass(frozen=True)
class Resources:
    """What a job asks for. None leaves it to the cluster."""

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    time: str | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    mail: str | None = None
    setup: tuple[str, ...] = ()  # shell lines before the job's command
    container: str | None = None  # prefix of `python`
    throttle: int = 256  # elements of an array at once
    warning: int = 120  # seconds between the signal and the end
    restarts: int = 3  # crashes at one and the same checkpoint

    @property
    def world(self) -> int:
        return self.nodes * self.tasks_per_node

    def check(self, partition: Partition) -> None:
        """Raises SlurmError for what the partition can never give."""
        for wanted, given, name, option in (
            (self.nodes, len(partition.nodes), "nodes", "--nodes"),
            (self.gpus_per_node, max(partition.gpus), "GPUs per node", "--gpus-per-node"),
            (
                self.tasks_per_node * self.cpus_per_task,
                max(partition.cpus),
                "CPUs per node",
                "--tasks-per-node or --cpus-per-task",
            ),
        ):
            if wanted > given:
                raise SlurmError(f"partition '{partition.name}' has {given} {name} and {wanted} are asked for: lower {option}")
        if self.time and self.warning >= queue.seconds(self.time):
            raise SlurmError(f"--warning {self.warning} seconds before the end leave nothing of --time {self.time}: lower it")


def prepare(folder: Path, resources: Resources, name: str, comment: str) -> submitit.SlurmExecutor:
    """An executor whose jobs write to `folder`."""
    python = f"{resources.container or ''} {shlex.quote(sys.executable)}".strip()
    try:
        executor = submitit.SlurmExecutor(folder=folder, python=python)
    except RuntimeError:
        raise SlurmError("srun is not installed: this is no machine of a SLURM cluster") from None
    extra = {"mem": resources.mem, "requeue": True}
    executor.update_parameters(
        job_name=name,
        comment=comment,
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks_per_node,
        cpus_per_task=resources.cpus_per_task,
        gpus_per_node=resources.gpus_per_node or None,
        time=resources.time,  # its default is five minutes
        partition=resources.partition,
        account=resources.account,
        qos=resources.qos,
        constraint=resources.constraint,
        exclude=resources.exclude,
        mail_user=resources.mail,
        mail_type="END,FAIL,REQUEUE" if resources.mail else None,
        array_parallelism=resources.throttle,
        signal_delay_s=resources.warning,
        wckey=None,  # its default is refused where such keys are enforced
        setup=_before(folder, resources),
        teardown=_after(folder, resources.restarts),
        # since SLURM 22.05 srun does not take the number of CPUs from sbatch
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus_per_task}"],
        additional_parameters={key: value for key, value in extra.items() if value is not None},
    )
    return executor


def script(executor: submitit.SlurmExecutor) -> str:
    """The batch script, as it would be submitted."""
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def submit(executor: submitit.SlurmExecutor, tasks: Sequence[Task], runs: Sequence[Path]) -> list[str]:
    """The ids of the jobs; several tasks make one array. Raises SlurmError with sbatch's own words."""
    _make(executor.folder)
    (executor.folder / RUNS).write_text("".join(f"{run}\n" for run in runs))
    inside = "SLURM_JOB_ID" in os.environ  # then what that job was given is not for this one
    kept = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or (k.startswith("SBATCH_") and not inside)}
    try:
        with clean_env():
            os.environ.update(kept)
            if len(tasks) == 1:
                return [executor.submit(tasks[0]).job_id]
            with executor.batch():
                jobs = [executor.submit(task) for task in tasks]
            return [job.job_id for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"sbatch refused the job: {_reason(str(error))}") from None


def _make(folder: Path) -> None:
    """Make the folder of a launch, closed to others: what is pickled there is run."""
    launches = folder.parent
    launches.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    launches.mkdir(exist_ok=True, mode=0o700)
    for place in (launches.parent, launches):
        state = place.stat()
        if state.st_uid != os.getuid() or state.st_mode & 0o022:
            raise SlurmError(
                f"{place} can be changed by others, who could then run programs as you: chmod go-w it, or choose --run"
            )
    folder.mkdir(mode=0o700)


def _reason(text: str) -> str:
    """sbatch's own complaint, out of what submitit says."""
    lines = [line.removeprefix("sbatch: error: ") for line in text.splitlines() if line.startswith("sbatch: error: ")]
    return lines[-1] if lines else text


def _before(folder: Path, resources: Resources) -> list[str]:
    lines = list(resources.setup)
    if resources.nodes > 1:
        text = f"error: some nodes do not see {folder}: choose a --run that all nodes share"
        look = "srun --nodes=$SLURM_JOB_NUM_NODES --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1"
        lines += [f"look() {{ {look} test -d {shlex.quote(str(folder))}; }}"]
        lines += [f"look || {{ sleep 5; look; }} || {{ sleep 20; look; }} || {{ echo {shlex.quote(text)} >&2; exit 2; }}"]
    return [*lines, "set +e  # what ends the command is judged below"]


def _after(folder: Path, restarts: int) -> list[str]:
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
if [ -s "$start.failure" ]; then code=$(cat "$start.failure"); fi  # of the first rank that failed; srun tells the last
if [ -e "$start.stopped" ]; then
    echo "$id: saved on request, requeued" >&2
    again
elif [ "$code" -ne 0 ] && [ "$code" -ne 2 ]; then
    run=$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {RUNS})
    newest=$(cd "$run/checkpoints" 2>/dev/null && ls -d step-*/manifest.json 2>/dev/null | tail -n 1)
    newest=${{newest%/manifest.json}}
    echo "exit code $code after ${{newest:-no checkpoint}}" >> "$id.crashes"
    if [ "$(grep -c "after ${{newest:-no checkpoint}}$" "$id.crashes")" -le {restarts} ]; then
        echo "$id: exit code $code, requeued from ${{newest:-the start}}" >&2
        again
    fi
    echo "error: $id failed {restarts + 1} times at ${{newest:-its start}} without getting further" >&2
fi
exit "$code\"""".splitlines()
