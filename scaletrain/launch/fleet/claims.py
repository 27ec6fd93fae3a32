"""Claims: which evaluation is whose, so that several fleets do nothing twice.

RUN/evals/claims has a file for each result that is being measured, or whose evaluation has failed,
with the name of the result. Fleets read and change these files only while they hold the lock of
the folder, so at most one of them plans at a time. A fleet that dies loses its locks with its
processes, and what it had claimed is free again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from scaletrain import exit_codes
from scaletrain.config import validation
from scaletrain.config.fields import Frozen, Natural
from scaletrain.evals.errors import EvalError
from scaletrain.runtime import durable, locks

# Larger files are not claims.
_BYTES = 1 << 20
# Seconds before another attempt after a failure that may pass, at first and at most.
_PAUSE, _LONGEST = 30.0, 900.0
# What file systems without locks say.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class Holder(Frozen):
    """Who evaluates: a process of a fleet, or a job."""

    fleet: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
    """Name of the fleet that has made the claim, and of its lock."""

    launch: Annotated[str, Field(pattern=r"^\d*$")] = ""
    """Folder in RUN/evals/launches of the array that the job belongs to; "" for a process of the
    fleet.
    """

    element: Natural = 0
    """Number of the job in its array."""

    job: Annotated[str, Field(pattern=r"^[\d_]*$")] = ""
    """Job or element of an array, such as 12_3; "" before sbatch has answered."""


class Claim(Frozen):
    """The content of a file of claims: who evaluates now, and how earlier attempts have ended."""

    format: Literal[1] = 1
    holder: Holder | None = None
    attempts: Natural = 0
    """Attempts that have ended without a result."""

    error: str = ""
    """What the last of them said."""

    refused: bool = False
    """Whether another attempt would be refused too, since the input is invalid."""

    after: Annotated[float, Field(ge=0)] = 0
    """Unix time before which no further attempt is made."""

    def failed(self, error: str, code: int | None, *, give_up: bool = False) -> Claim:
        """After one more attempt without a result, by its exit code; None: not known.

        A failure of storage or network that may pass is given time, more with each attempt. Invalid
        input is not tried again, nor is what `give_up` says.
        """
        pause = min(_PAUSE * 2**self.attempts, _LONGEST) if code == exit_codes.RETRY else 0
        return Claim(
            attempts=self.attempts + 1,
            error=error,
            refused=give_up or code == exit_codes.INVALID,
            after=time.time() + pause if pause else 0,
        )

    def held_by(self, holder: Holder | None) -> Claim:
        return self.model_copy(update={"holder": holder})


class Claims:
    """The claims of one run, as a fleet sees and changes them. Context: the fleet is alive."""

    def __init__(self, run: Path, say: Callable[[str], None] = print) -> None:
        self._folder, self._say = run / "evals" / "claims", say
        self.fleet = re.sub(
            r"[^\w.-]", "-", f"{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
        )
        self._until = contextlib.ExitStack()

    def __enter__(self) -> Claims:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # So that no other fleet finds the file before it is locked.
            with self.alone():
                for path in self._folder.glob("*.fleet"):
                    self.alive(path.stem)
                # what a fleet that was killed had begun to write
                for draft in self._folder.glob(".*.tmp"):
                    draft.unlink()

                self._until.enter_context(locks.locked(self._life(self.fleet), wait=True))
        except OSError as error:
            self._without_locks(error)
            self._say(
                f"warning: {self._folder} is on a file system without locks: let no second fleet "
                "work on this run"
            )

        self._until.callback(self._life(self.fleet).unlink, missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._until.close()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While no other fleet plans for this run."""
        with contextlib.ExitStack() as until:
            try:
                until.enter_context(locks.locked(self._folder / ".lock", wait=True))
            except OSError as error:
                self._without_locks(error)

            yield

    def names(self) -> set[str]:
        """Of all results that have a claim."""
        return {path.stem for path in self._folder.glob("*.json")}

    def read(self, name: str) -> Claim:
        """The claim of a result. Raises EvalError for a file that is none."""
        path = self._path(name)
        try:
            if path.stat().st_size > _BYTES:
                raise EvalError(f"{path} is not a claim of a fleet: it is too large; delete it")
            return Claim.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return Claim()
        except ValidationError as error:
            raise EvalError(
                f"{path} is not a claim of a fleet ({validation.first(error)}); delete it, and the "
                "result counts as not yet attempted"
            ) from None

    def write(self, name: str, claim: Claim) -> None:
        """Replace a claim; one that says nothing has no file."""
        if claim == Claim():
            self._path(name).unlink(missing_ok=True)
        else:
            durable.write(self._path(name), claim.model_dump_json(indent=1) + "\n")

    def alive(self, fleet: str) -> bool:
        """Whether a fleet, by its name, is at work. What a dead one has left is deleted."""
        if fleet == self.fleet:
            return True

        life = self._life(fleet)
        try:
            file = os.open(life, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False

        try:
            if not locks.acquire(file, wait=False):
                return True
        except OSError as error:
            self._without_locks(error)
        finally:
            os.close(file)

        life.unlink(missing_ok=True)
        return False

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _life(self, fleet: str) -> Path:
        """The file that a fleet locks as long as it lives."""
        return self._folder / f"{fleet}.fleet"

    def _without_locks(self, error: OSError) -> None:
        """Nothing for a file system that has no locks. Raises EvalError for other faults."""
        if error.errno not in _NO_LOCKS:
            raise EvalError(f"cannot write {self._folder}: {error.strerror}") from None
