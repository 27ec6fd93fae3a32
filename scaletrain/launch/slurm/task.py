"""What each process of a SLURM job does: SLURM's variables to torchrun's, then it becomes `python
-m scaletrain ...`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from scaletrain import dist, exit_codes, rng
from scaletrain.runtime.durable import replacing
from scaletrain.runtime.signals import PROGRESS_FILE, STOPPED_FILE

# in the folder of a launch: what each element of the array runs, in order
TASKS = "tasks.json"
# below what the kernel hands out to outgoing connections
PORTS = range(10_000, 32_000)
# exit code: a later start may succeed (EX_TEMPFAIL of sysexits.h)
PORT_TAKEN = exit_codes.RETRY


@dataclass(frozen=True)
class Task:
    """One job, or one element of an array: `arguments` of the command line, e.g. ("train",
    "recipe.yaml"); its run folder.
    """

    arguments: list[str]
    run: str


def write(folder: Path, tasks: Sequence[Task]) -> None:
    with replacing(folder / TASKS, "draft") as file:
        file.write(json.dumps([asdict(task) for task in tasks], indent=1).encode())


def read(folder: Path) -> list[Task]:
    return [Task(**item) for item in json.loads((folder / TASKS).read_bytes())]


def main(folder: Path) -> NoReturn:
    """Signals are blocked, and stay so until the command handles them."""
    task = read(folder)[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]
    variables = environment(os.environ, str(folder))
    if variables["RANK"] == "0" and (
        problem := dist.port_problem("", int(variables["MASTER_PORT"]))
    ):
        print(
            f"error: port {variables['MASTER_PORT']} on "
            f"{os.environ.get('SLURMD_NODENAME', 'this node')}: {problem}. "
            "Each restart of the job takes another one",
            file=sys.stderr,
            flush=True,
        )
        os._exit(PORT_TAKEN)

    os.execve(
        sys.executable,
        [sys.executable, "-m", "scaletrain", *task.arguments],
        {**os.environ, **variables},
    )


def environment(slurm: Mapping[str, str], folder: str) -> dict[str, str]:
    """torchrun's variables, and ours, from SLURM's."""
    job, restart = slurm["SLURM_JOB_ID"], int(slurm.get("SLURM_RESTART_COUNT", "0"))
    start = f"{folder}/{job}.{restart}"
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(
            tasks_per_node(slurm["SLURM_STEP_TASKS_PER_NODE"])[int(slurm["SLURM_NODEID"])]
        ),
        # an address, since the names of nodes need not resolve; srun starts on the node of rank 0
        "MASTER_ADDR": slurm["SLURM_LAUNCH_NODE_IPADDR"],
        "MASTER_PORT": str(port(job, restart)),
        "OMP_NUM_THREADS": slurm.get("SLURM_CPUS_PER_TASK", "1"),
        "SCALETRAIN_ERROR_FILE": f"{start}.failure",
        STOPPED_FILE: f"{start}.stopped",
        # of all starts of the job
        PROGRESS_FILE: f"{folder}/{job}.progress",
    }


def port(job: str, restart: int) -> int:
    """Of a job's start. It changes with every restart: what has taken the last one may still be
    there.
    """
    return PORTS[int(rng.hash64(job, restart)) % len(PORTS)]


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form, e.g. '8(x3),4' -> [8, 8, 8, 4]."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(m[1]) for m in found if m for _ in range(int(m[2] or 1))]
