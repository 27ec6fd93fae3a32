"""The processes of a run on this machine, one per device. They meet on 127.0.0.1, where only this
machine reaches them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from scaletrain import exit_codes
from scaletrain.runtime.tables import plural

# those on which training saves and stops
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
# exit codes of a process that ended on request
ASKED = tuple(128 + number for number in SIGNALS)
# seconds in which the others may end by themselves after a failure: they notice it, and say what
# they know
GRACE = 7.0


def main(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [KEY=VALUE]...",
            help="Passed with all other options to `scaletrain train`, or as `eval ...` or "
            "`doctor ...` to `scaletrain eval` or `doctor`.",
        ),
    ],
    procs: Annotated[
        int, typer.Option(min=1, help="Processes, each with a GPU of its own if there are any.")
    ],
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="On 127.0.0.1, for the processes to meet; 0: any."),
    ] = 0,
    restarts: Annotated[
        int,
        typer.Option(min=0, help="Times to start again from the last checkpoint after a failure."),
    ] = 0,
) -> None:
    """Train on this machine with several processes, for example:

    scaletrain launch local --procs 2 byol_r50_in1k data.path=DATA --run DIR

    The exit code is that of the first process that failed; all others are ended with it, as they
    are when the launcher ends.
    """
    raise typer.Exit(start(arguments, procs, port, restarts))


def start(arguments: Sequence[str], procs: int, port: int, restarts: int) -> int:
    """Run `scaletrain train`, `eval` or `doctor` in `procs` processes; the exit code."""
    others = arguments[:1] in (["doctor"], ["eval"])
    command = arguments if others else ["train", *arguments]
    for left in range(restarts, -1, -1):
        try:
            listener = socket.create_server(("127.0.0.1", port))
        except OSError as error:
            text = (
                f"port {port} on 127.0.0.1: {os.strerror(error.errno or 0)}; choose "
                "another --port or leave it out"
            )
            print(f"error: {text}", file=sys.stderr)

            return exit_codes.INVALID

        with listener, tempfile.TemporaryDirectory() as folder:
            code = Ranks(procs, command, listener, Path(folder)).wait()

        if code in (0, exit_codes.INVALID, *ASKED) or not left:
            return code

        print(f"starting again, {plural(left, 'restart')} left", file=sys.stderr)

    return code


class Ranks:
    """The processes of one start, and the signals passed on to them."""

    def __init__(
        self, procs: int, command: Sequence[str], listener: socket.socket, folder: Path
    ) -> None:
        # the first signal that this launcher was sent
        self._asked = 0
        for number in SIGNALS:
            # as nohup leaves it
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._pass_on)

        threads = str(max(1, len(os.sched_getaffinity(0)) // procs))
        shared = {
            "WORLD_SIZE": str(procs),
            "LOCAL_WORLD_SIZE": str(procs),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "lo"),
            "SCALETRAIN_LAUNCHER": str(os.getpid()),
            exit_codes.ERROR_FILE: str(folder / "first-failure"),
        }

        self._processes = []
        for rank in range(procs):
            own: dict[str, str] = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            kept: tuple[int, ...] = ()
            if rank == 0:
                own["SCALETRAIN_LISTEN_FD"], kept = str(listener.fileno()), (listener.fileno(),)

            environment = {**os.environ, **shared, **own}
            process = subprocess.Popen(
                [sys.executable, "-m", "scaletrain", *command], env=environment, pass_fds=kept
            )
            self._processes.append(process)

        # it lives on in rank 0 alone
        listener.close()
        # while they were being started
        if self._asked:
            self._send(signal.SIGTERM)

    def wait(self) -> int:
        """Until all have ended; the exit code, after a line on stderr unless the failed process has
        said what was wrong.
        """
        # rank and exit code
        failed: tuple[int, int] | None = None
        deadline = float("inf")

        while None in [process.poll() for process in self._processes]:
            if failed is None and (failed := self._failed()):
                deadline = time.monotonic() + (float("inf") if failed[1] in ASKED else GRACE)
            if time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            time.sleep(0.02)

        failed = failed or self._failed()
        if failed is None:
            return 0
        if self._asked and (failed[1] < 0 or failed[1] in ASKED):
            return 128 + self._asked

        return _report(*failed)

    def _failed(self) -> tuple[int, int] | None:
        """Rank and exit code of the process that failed: of several, one that was killed, for the
        others are its victims.
        """
        codes = [
            (rank, process.returncode)
            for rank, process in enumerate(self._processes)
            if process.returncode
        ]

        return min(codes, key=lambda item: item[1] >= 0, default=None)

    def _pass_on(self, number: int, _: Any) -> None:
        """Ask all processes, which may have been asked already: a terminal's Ctrl-C reaches them
        too, and twice means now.
        """
        if number == signal.SIGINT and not self._asked:
            self._send(signal.SIGTERM)
        else:
            self._send(number)

        self._asked = self._asked or number

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


def _report(rank: int, code: int) -> int:
    if code < 0:
        hint = ", which the system sends when memory runs out" if code == -signal.SIGKILL else ""
        print(f"process {rank} was ended by {signal.Signals(-code).name}{hint}", file=sys.stderr)
        return 128 - code

    if code not in (exit_codes.INVALID, exit_codes.RETRY, *ASKED):
        print(f"process {rank} failed with exit code {code}", file=sys.stderr)

    return code
