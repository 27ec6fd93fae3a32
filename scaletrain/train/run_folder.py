"""The run folder: its access rights, its lock, and the configuration that is saved in it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import pwd
import secrets
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from scaletrain import dist, exit_codes
from scaletrain.config import load, recipe
from scaletrain.config.fields import PATHS
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config
from scaletrain.runtime import durable, locks

CONFIG, LOCK, LEASE, CHANGES = "config.yaml", ".lock", ".lease", "changes.jsonl"
# Seconds between heartbeats of a lease.
BEAT = 5.0


class BusyError(ConfigError):
    """Another process trains in the run folder."""

    exit_code = exit_codes.RETRY


class RunFolderError(ConfigError):
    """The run folder cannot be written."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[RunFolderError], tuple[str, int]]:
        return RunFolderError, (str(self), self.exit_code)


def on_main(work: Callable[[], None]) -> None:
    """Call `work` on rank 0; every rank raises its error. An OSError becomes a RunFolderError."""
    problem: Exception | None = None

    if dist.main():
        try:
            work()
        except ConfigError as error:
            problem = error
        except OSError as error:
            text = f"cannot write the run folder: {error}; choose another with --run"
            problem = RunFolderError(text, exit_codes.of(error))

    if problem := dist.broadcast_object(problem):
        raise problem


# --- access ---------------------------------------------------------------------------------------


def restrict(run: Path, umask: str | None, until: contextlib.ExitStack) -> None:
    """Set the umask of this process until the stack is closed: files are private by default.

    umask: octal, e.g. 027. By default an existing run folder keeps its access rights.
    """
    if umask is None:
        mask = 0o777 & ~stat.S_IMODE(run.stat().st_mode) if run.is_dir() else 0o077
        until.callback(os.umask, os.umask(mask & 0o077))
        return

    try:
        mask = int(umask, 8)
    except ValueError:
        mask = -1

    if not 0 <= mask <= 0o777 or mask & 0o700:
        raise ConfigError(
            f"--umask {umask}: give an octal number that leaves you all rights, e.g. 027 for your "
            "group to read"
        )

    until.callback(os.umask, os.umask(mask))


def check_owner(run: Path) -> None:
    """Refuse another user's run folder, and warn if every user can change it."""
    state = run.stat()
    if state.st_uid != os.getuid():
        raise ConfigError(
            f"{run} belongs to {_user(state.st_uid)}, and you are {_user(os.getuid())}: train in a "
            "folder of your own, "
            "e.g. in a copy of it (evaluation and export read other users' runs)"
        )

    warn_if_open(run)


def warn_if_open(path: Path) -> None:
    """Warn if every user of the machine can change a file or folder."""
    with contextlib.suppress(OSError):
        state = path.stat()
        if state.st_mode & stat.S_IWOTH and not state.st_mode & stat.S_ISVTX:
            print(f"warning: every user can change {path}: chmod o-w {path}", file=sys.stderr)


def _user(number: int) -> str:
    with contextlib.suppress(KeyError):
        return f"user {pwd.getpwuid(number).pw_name}"
    return f"user {number}"


# --- configuration --------------------------------------------------------------------------------


def claim(run: Path, config: Config, change: bool, until: contextlib.ExitStack) -> None:
    """Make and lock the run folder; refuse one of another configuration or that another process
    trains in.
    """
    run.mkdir(parents=True, exist_ok=True)
    check_owner(run)
    _hold(run, until)

    if (found := differences(run, config)) and not change:
        listed = "\n".join(f"  {key}: {old} -> {new}" for key, old, new in found)
        raise ConfigError(
            f"{run} was started with a different configuration:\n{listed}\n"
            "Use another --run, or --change to resume with this configuration"
        )


def differences(run: Path, config: Config) -> list[tuple[str, object, object]]:
    """The keys in which a configuration differs from that of the run folder, with both values."""
    path = run / CONFIG
    # Without a checkpoint there is nothing to protect: a refused start leaves only its
    # configuration.
    if not path.exists() or not any((run / "checkpoints").glob("step-*")):
        return []

    return [item for item in load.diff(load.load(path), config) if not _one_place(*item)]


def _one_place(key: str, old: object, new: object) -> bool:
    """Whether two values of a key are the same file or folder."""
    place = key.rpartition(".")[2] in PATHS and isinstance(old, str) and isinstance(new, str)
    real = [list(map(os.path.realpath, recipe.listed(str(value)))) for value in (old, new)]

    return place and bool(old) and real[0] == real[1]


def write_config(run: Path, config: Config) -> None:
    durable.write(run / CONFIG, load.dump(config))


def log_change(run: Path, step: int, what: list[str]) -> None:
    """Append what --change has accepted to RUN/changes.jsonl."""
    with (run / CHANGES).open("a") as file:
        file.write(json.dumps({"time": time.time(), "step": step, "changes": what}) + "\n")


# --- one process at a time ------------------------------------------------------------------------


def _hold(run: Path, until: contextlib.ExitStack) -> None:
    """Lock the run folder until the stack is closed or this process ends. Raises BusyError."""
    lock = until.enter_context((run / LOCK).open("a+"))

    # A predecessor that is being killed may take a moment; one on a lost node, until the file
    # system releases its lock.
    for patience in range(240 if "SLURM_RESTART_COUNT" in os.environ else 20, -1, -1):
        try:
            # Of the process: a loader worker that outlives it must not keep the lock.
            if locks.acquire(lock.fileno(), wait=False, of_process=True):
                break
        except OSError:
            # The file system has no locks.
            Lease(run).hold(until)
            return

        if not patience:
            raise BusyError(f"{run} is being trained by {_holder(lock)}")

        time.sleep(0.25)

    lock.truncate(0)
    lock.write(f"{_myself()}\n")
    lock.flush()


def _holder(lock: TextIO) -> str:
    lock.seek(0)
    return lock.read(200).strip() or "another process"


def _myself() -> str:
    return (
        f"process {os.getpid()} on {platform.node()}, job {os.environ.get('SLURM_JOB_ID', 'none')}"
    )


class Lease:
    """A replacement for locks on file systems without them: a file that its owner rewrites every
    few seconds.

    The owner of a file that has not changed for three heartbeats is dead. Clocks of different
    machines are never compared.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._path = run, run / LEASE
        self._token, self._beats = secrets.token_hex(8), 0
        self._ended = threading.Event()

    def hold(self, until: contextlib.ExitStack) -> None:
        """Take the lease until the stack is closed. Raises BusyError if another process has it."""
        before = self._read()
        if before:
            what = "waiting to see whether another process trains there"
            print(
                f"{self._run} is on a file system without locks: {what} ({3 * BEAT:g} s)",
                flush=True,
            )

            for _ in range(12):
                time.sleep(BEAT / 4)
                self._refuse_if(self._read() not in (before, ""))

        self._beat()
        # Of two processes that take it at once, the later one keeps it.
        time.sleep(BEAT)
        self._refuse_if(not self._mine())
        threading.Thread(target=self._go_on, name="lease", daemon=True).start()
        until.callback(self._release)

    def beats(self) -> bool:
        """Whether a process holds the lease, by watching whether it changes."""
        before = self._read()
        for _ in range(12 if before else 0):
            time.sleep(BEAT / 4)
            if (now := self._read()) != before:
                return bool(now)

        return False

    def _refuse_if(self, taken: bool) -> None:
        if taken:
            raise BusyError(f"{self._run} is being trained by {self._read().partition(';')[0]}")

    def _read(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._path.read_text(errors="replace")[:500]
        return ""

    def _mine(self) -> bool:
        """Whether no other process has taken it."""
        found = self._read()
        return not found or self._token in found

    def _beat(self) -> None:
        self._beats += 1
        draft = self._path.with_name(f"{LEASE}.{self._token}")
        draft.write_text(f"{_myself()}; {self._token} {self._beats}\n")
        draft.replace(self._path)

    def _go_on(self) -> None:
        while not self._ended.wait(BEAT):
            # Storage may fail for a moment.
            with contextlib.suppress(OSError):
                if not self._mine():
                    print(
                        f"error: another process has taken over {self._run}; this one exits",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(exit_codes.RETRY)

                self._beat()

    def _release(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            if self._mine():
                self._path.unlink()
