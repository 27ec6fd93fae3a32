"""RUN/status.json: how far a run is and how it ended, for whoever watches it from outside."""

from __future__ import annotations

import logging
import os
import platform
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from scaletrain.runtime import durable, local_files, locks
from scaletrain.train import run_folder

log = logging.getLogger("scaletrain")
FILE = "status.json"
# Larger files are no status.
_BYTES = 1 << 16
# Seconds for which a status of another machine says that the run is alive, where that machine's
# locks cannot be seen.
RECENT = 300.0

State = Literal["running", "stopped", "finished", "failed"]
"""running: training, or killed so that nothing more could be written; see `alive`. stopped: by a
signal, with everything saved that could be. finished: all steps are done and saved. failed: ended
by an error.
"""


class Status(BaseModel):
    """The state of a run at `time`, in Unix seconds."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    state: State
    # optimizer steps made
    step: NonNegativeInt
    # optimizer steps of the whole run
    total: NonNegativeInt
    # of SLURM; "" outside it
    job: str
    # of rank 0
    host: str
    time: Annotated[float, Field(allow_inf_nan=False)]


class StatusFile:
    """Writes the status of a run; for one rank. A file that cannot be written causes one warning
    and never ends the run.
    """

    def __init__(self, run: Path, total: int) -> None:
        self._path, self._total, self._failed = run / FILE, total, False

    def write(self, state: State, step: int) -> None:
        """Replace the status. While the run is running, a power loss may damage it."""
        status = Status(
            state=state,
            step=step,
            total=self._total,
            job=os.environ.get("SLURM_JOB_ID", ""),
            host=platform.node(),
            time=time.time(),
        )

        try:
            # one name for all, so that a killed process leaves at most one
            with durable.replacing(self._path, "new", flushed=state != "running") as file:
                file.write(f"{status.model_dump_json()}\n".encode())
        except OSError as error:
            if not self._failed:
                log.warning(
                    "%s cannot be written (%s); the run continues and will try again",
                    self._path,
                    error.strerror,
                )
            self._failed = True
        else:
            self._failed = False


def read(run: Path) -> Status | None:
    """The status of a run; None where none was written, or where it is damaged, until the run
    writes it again. Raises OSError for a file that cannot be read.
    """
    try:
        return Status.model_validate_json(local_files.read(run / FILE, _BYTES))
    except (FileNotFoundError, ValidationError):
        return None


def alive(run: Path) -> bool:
    """Whether a process trains in the run folder now, whatever its status says; to be asked before
    the status is read, since the run may end in between. Raises OSError for a folder that cannot be
    read.

    By the lock of the folder; where the file system has none, by the lease in its place, which
    takes up to 15 seconds for a dead run. Where locks are not seen from machine to machine, a run
    of another machine counts as alive until its status is 5 minutes old. Not for the process that
    trains, see locks.taken.
    """
    try:
        if locks.taken(run / run_folder.LOCK):
            return True
    except OSError:
        return run_folder.Lease(run).beats()

    status = read(run)
    return (
        status is not None
        and status.state == "running"
        and status.host != platform.node()
        and time.time() - status.time < RECENT
    )
