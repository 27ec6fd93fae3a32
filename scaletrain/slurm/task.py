"""What a SLURM task does: SLURM's variables to torchrun's, then it becomes `python -m scaletrain ...`.

Becoming (exec) and not calling leaves submitit's own signal handlers behind; they would act on rank 0 and in its loader
workers only.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from scaletrain import dist
from scaletrain.interrupt import SIGNALS, STOPPED_FILE

PORTS = range(10_000, 32_000)  # below what the kernel hands out to outgoing connections
PORT_TAKEN = 75  # exit code: a later start may succeed (EX_TEMPFAIL of sysexits.h)


@dataclass(frozen=True)
class Task:
    """One task of the job: `arguments` of the command line, e.g. ("train", "recipe.yaml"); `folder` of the launch."""

    arguments: tuple[str, ...]
    folder: str

    def __call__(self) -> NoReturn:
        # kept pending until training handles them: before that they would kill
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        variables = environment(os.environ, self.folder)
        if variables["RANK"] == "0" and (problem := dist.port_problem("", int(variables["MASTER_PORT"]))):
            print(
                f"error: port {variables['MASTER_PORT']} on {os.environ.get('SLURMD_NODENAME', 'this node')}: {problem}. "
                "Each restart of the job takes another one",
                file=sys.stderr,
                flush=True,
            )
            os._exit(PORT_TAKEN)
        os.execve(sys.executable, [sys.executable, "-m", "scaletrain", *self.arguments], {**os.environ, **variables})


def environment(slurm: Mapping[str, str], folder: str) -> dict[str, str]:
    """torchrun's variables, and ours, from SLURM's."""
    job, restart = slurm["SLURM_JOB_ID"], int(slurm.get("SLURM_RESTART_COUNT", "0"))
    start = f"{folder}/{job}.{restart}"
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(slurm["SLURM_STEP_TASKS_PER_NODE"])[int(slurm["SLURM_NODEID"])]),
        # an address, since the names of nodes need not resolve; srun starts on the node of rank 0
        "MASTER_ADDR": slurm["SLURM_LAUNCH_NODE_IPADDR"],
        "MASTER_PORT": str(port(job, restart)),
        "OMP_NUM_THREADS": slurm.get("SLURM_CPUS_PER_TASK", "1"),
        "SCALETRAIN_ERROR_FILE": f"{start}.failure",
        STOPPED_FILE: f"{start}.stopped",
    }


def port(job: str, restart: int) -> int:
    """Of a job's start. It changes with every restart: what has taken the last one may still be there."""
    return PORTS[int(dist.hash64(job, restart)) % len(PORTS)]


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form, e.g. '8(x3),4' -> [8, 8, 8, 4]."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(m[1]) for m in found if m for _ in range(int(m[2] or 1))]
