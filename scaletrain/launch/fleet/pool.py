"""Evaluations as processes of this machine, a bounded number at a time. They die with the fleet,
however that ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from scaletrain import exit_codes
from scaletrain.runtime.signals import PROGRESS_FILE, STOPPED_FILE

# Seconds in which evaluations that were asked to end may clean up.
GRACE = 10.0
# What an outer job or launcher says of its own processes.
_FOREIGN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    exit_codes.ERROR_FILE,
    STOPPED_FILE,
    PROGRESS_FILE,
)


class Pool:
    """At most `size` processes, each with one of `devices` (GPUs by number or name) in turn."""

    def __init__(self, size: int, devices: Sequence[str] = ()) -> None:
        self._size, self._devices = size, devices
        # by slot: the log and the process
        self._slots: dict[int, tuple[Path, subprocess.Popen[bytes]]] = {}
        self._codes: dict[Path, int] = {}

    @property
    def room(self) -> int:
        """How many more processes may start."""
        return self._size - len(self._slots)

    def start(self, arguments: Sequence[str], log: Path) -> None:
        """Start `python -m scaletrain ARGUMENTS`; its output is added to `log`, which also names
        it.
        """
        slot = next(n for n in range(self._size) if n not in self._slots)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self._slots[slot] = log, self._process(arguments, self._environment(slot), out)

    def sweep(self) -> bool:
        """Note which processes have ended; whether any has."""
        codes = {slot: process.poll() for slot, (_, process) in self._slots.items()}
        ended = {slot: code for slot, code in codes.items() if code is not None}
        self._codes |= {self._slots.pop(slot)[0]: code for slot, code in ended.items()}
        return bool(ended)

    def running(self, log: Path) -> bool:
        """Whether a process was started, and not yet noted to have ended."""
        return any(log == other for other, _ in self._slots.values())

    def code(self, log: Path) -> int | None:
        """The exit code of a process that has ended, negative for a signal that killed it. It is
        handed out once.
        """
        return self._codes.pop(log, None)

    def stop(self) -> None:
        """End all processes: by request, and after a while by force."""
        processes = [process for _, process in self._slots.values()]
        for process in processes:
            process.terminate()

        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            time.sleep(0.05)

        for process in processes:
            process.kill()
            process.wait()

        self._slots.clear()

    def _environment(self, slot: int) -> Mapping[str, str]:
        threads = str(max(1, len(os.sched_getaffinity(0)) // self._size))
        device = self._devices[slot % len(self._devices)] if self._devices else None
        return {
            "OMP_NUM_THREADS": threads,
            **{key: value for key, value in os.environ.items() if key not in _FOREIGN},
            "SCALETRAIN_LAUNCHER": str(os.getpid()),
            **({} if device is None else {"CUDA_VISIBLE_DEVICES": device}),
        }

    @staticmethod
    def _process(
        arguments: Sequence[str], environment: Mapping[str, str], out: BinaryIO
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "scaletrain", *arguments]
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )


def devices() -> list[str]:
    """The GPUs that processes of this one may use."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(n) for n in range(count)]
