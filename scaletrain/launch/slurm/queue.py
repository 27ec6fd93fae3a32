"""What the cluster says of itself and of its jobs, through sinfo, scontrol and squeue: accounting
need not be installed.
"""

from __future__ import annotations

import getpass
import math
import re
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scaletrain.doctor.disk import filesystem

LIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
)
# may come back
REQUEUED = ("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "PREEMPTED", "NODE_FAIL")
MEMORY_FILES = ("tmpfs", "ramfs", "devtmpfs")
LOCAL_FILES = (*MEMORY_FILES, "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs")
# What SLURM's programs say where the cluster does not answer, or not in time.
AWAY = (
    "configuration source",
    "Unable to contact slurm controller",
    "Socket timed out",
    "Zero Bytes were transmitted",
    "temporarily un",
)
TIMES = (
    "minutes, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES, "
    "DAYS-HOURS:MINUTES:SECONDS"
)


class SlurmError(ValueError):
    """The cluster refused; the text says what to change."""


class UnavailableError(SlurmError):
    """No cluster answers here."""


@dataclass(frozen=True)
class Partition:
    """`cpus`, `gpus`: of each node."""

    name: str
    nodes: tuple[str, ...]
    cpus: tuple[int, ...]
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class State:
    """e.g. RUNNING on n[1-2], or PENDING for (Resources). `name` is empty for a job that the
    controller has forgotten.
    """

    name: str
    where: str

    @property
    def live(self) -> bool:
        return self.name in LIVE or self.name in REQUEUED

    def __str__(self) -> str:
        return (
            f"{self.name.lower()} {self.where}".strip() if self.name else "no longer in the queue"
        )


def ask(*command: str) -> str:
    """Standard output of one of SLURM's programs. Raises SlurmError with its own words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise UnavailableError(
            f"{command[0]} is not installed: this is no machine of a SLURM cluster. "
            "`scaletrain launch local` trains on this machine, torchrun on several"
        ) from None
    except subprocess.TimeoutExpired:
        raise UnavailableError(
            f"{command[0]} does not answer: is slurmctld up? Try `scontrol ping`"
        ) from None

    if done.returncode:
        said = (done.stderr.strip() or "failed").splitlines()[-1]
        raise refusal(
            f"{command[0]}: {said.removeprefix(f'{command[0]}: ').removeprefix('error: ')}"
        )

    return done.stdout.strip()


def refusal(said: str) -> SlurmError:
    """The error for what one of SLURM's programs has said."""
    return UnavailableError(said) if any(text in said for text in AWAY) else SlurmError(said)


def partition(name: str | None = None) -> Partition:
    """The named or the default partition; several, parted by commas, as one."""
    rows = [
        line.split("|") for line in ask("sinfo", "-h", "-N", "-a", "-o", "%P|%N|%c|%G").splitlines()
    ]
    known = sorted({row[0] for row in rows})
    chosen = (
        name
        if name is not None
        else next((p.removesuffix("*") for p in known if p.endswith("*")), None)
    )

    if chosen is None:
        raise SlurmError(
            "the cluster has no default partition: choose one with --partition; there are "
            f"{', '.join(known)}"
        )

    there = [p.removesuffix("*") for p in known]
    for part in chosen.split(","):
        if part not in there:
            raise SlurmError(
                f"the cluster has no partition '{part}'; there are {', '.join(there) or 'none'}"
            )

    mine = {row[1]: row for row in rows if row[0].removesuffix("*") in chosen.split(",")}.values()
    cpus = tuple(int(re.sub(r"\D.*", "", row[2])) for row in mine)
    return Partition(
        chosen, tuple(row[1] for row in mine), cpus, tuple(_gpus(row[3]) for row in mine)
    )


def seconds(limit: str) -> float:
    """Of a time limit as SLURM takes it; infinite for none. Raises SlurmError for what is in no
    form of it.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf

    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit, re.ASCII)
    if not found:
        raise SlurmError(
            f"--time {limit!r} is no time limit of SLURM's: write {TIMES}; 0 or UNLIMITED for none"
        )

    days, a, b, c = (int(part or 0) for part in found.groups())
    hours, minutes, rest = (a, b, c) if found[1] or found[4] else (0, a, b)
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest or math.inf


def states(jobs: Iterable[str]) -> dict[str, State]:
    """Of each job or array element (`12_3`)."""
    jobs = list(jobs)
    wanted = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    try:
        lines = ask("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%R", "-j", wanted).splitlines()
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        lines = []

    there = {job: State(name, where) for job, name, where in (line.split("|", 2) for line in lines)}
    return {job: there.get(job, State("", "")) for job in jobs}


@dataclass(frozen=True)
class Job:
    """A job, or element of an array, that runs or waits."""

    id: str
    state: str
    comment: str


def mine() -> list[Job]:
    """This user's jobs that run or wait."""
    form = ("-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T|%k")
    return [Job(*line.split("|", 2)) for line in ask("squeue", *form).splitlines()]


def live(comment: str) -> list[str]:
    """This user's jobs with this comment that run or wait."""
    return [job.id for job in mine() if job.comment == comment]


def check_shared(folder: Path, nodes: Iterable[str]) -> str | None:
    """A warning where the folder may be unknown to the nodes. Raises SlurmError where it
    must be.
    """
    kind = filesystem(folder)
    if kind not in LOCAL_FILES or all(map(_here, nodes)):
        return None
    if kind in MEMORY_FILES or folder.is_relative_to("/tmp") or folder.is_relative_to("/var/tmp"):
        raise SlurmError(
            f"{folder} is on this machine only ({kind}), but the nodes write logs there: choose a "
            "shared --run"
        )

    return f"{folder} is on a {kind} file system: the nodes must see it under this name"


def _here(node: str) -> bool:
    """Whether a node is this machine: only an own address can be bound."""
    found = re.search(r"NodeAddr=(\S+)", ask("scontrol", "show", "node", "-o", node))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((found[1] if found else node, 0))
        return True
    except OSError:
        return False


def _gpus(resources: str) -> int:
    """e.g. 'gpu:a100:8(S:0-1),nvme:1' -> 8."""
    return sum(int(n) for n in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", resources))
