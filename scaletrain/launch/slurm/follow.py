"""Watches jobs from the login node: their state as it changes, and the log as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from scaletrain.launch.slurm import queue

# seconds between looks at the queue: polite to a controller that serves many
EVERY = 3.0
# looks in a row that may fail
PATIENCE = 40
# lines of each error log that a failed job shows
TAIL = 12


class Tail:
    """What a growing file has gained since the last look."""

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 0

    def new(self) -> str:
        if not self.path.exists() or self.path.stat().st_size <= self._at:
            return ""

        with self.path.open("rb") as file:
            file.seek(self._at)
            data = file.read()

        self._at += len(data)
        return data.decode(errors="replace")


def follow(jobs: Sequence[str], folder: Path, say: Callable[[str], None]) -> dict[str, queue.State]:
    """Until every job has ended. The last states; a single job's log is shown as it grows, of an
    array the states only.
    """
    tails = (
        [Tail(folder / f"{jobs[0]}_0_log.{kind}") for kind in ("out", "err")]
        if len(jobs) == 1
        else []
    )
    before: dict[str, queue.State] = {}

    failures = 0
    while True:
        try:
            states, failures = queue.states(jobs), 0
        except queue.SlurmError as error:  # a busy controller is no reason to leave
            failures += 1
            if failures == PATIENCE:
                raise

            say(f"{time.strftime('%H:%M:%S')} {error}")
            time.sleep(EVERY)
            continue

        for job, state in states.items():
            if before.get(job) != state:
                say(f"{time.strftime('%H:%M:%S')} job {job}: {state}")

        before = states
        for tail in tails:
            for line in tail.new().splitlines():
                say(line)

        if not any(state.live for state in states.values()):
            return states

        time.sleep(EVERY)


def complaints(job: str, folder: Path) -> list[str]:
    """The ends of a failed job's error logs; what to look for where there is none."""
    logs = [path for path in sorted(folder.glob(f"{job}_*_log.err")) if path.stat().st_size]
    if not logs and not list(folder.glob(f"{job}_*_log.out")):
        return [f"job {job} wrote no log: does its node see {folder}?"]

    return [
        f"{path}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-TAIL:])
        for path in logs[:3]
    ]
