"""Curves of evaluations in a run's TensorBoard: the only writer below RUN/tensorboard/evals.

A benchmark, dataset and protocol have a folder, and so a curve, with one event file of all results,
ascending by step. Its name holds a digest of them. Where there are others by now, a new file takes
its place as a whole, so that a result which comes late is at its step, and none is there twice.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from scaletrain.evals import results
from scaletrain.evals.results import Result

_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.fleet\.(\w+)")


class Curves:
    """The curves of a run; for one process at a time."""

    def __init__(self, run: Path) -> None:
        self._evals, self._board = run / "evals", run / "tensorboard" / "evals"
        # files of the results that were drawn
        self._drawn: frozenset[Path] | None = None
        # results in the curves
        self.results = 0

    def refresh(self) -> None:
        """Bring them up to date with the results. Where they cannot be written, one warning says
        so, and the next results are another occasion.
        """
        there = frozenset(self._evals.glob("*.json"))
        if there == self._drawn:
            return

        self._drawn = there
        try:
            self._draw()
        except OSError as error:
            print(f"warning: {self._board} cannot be written: {error}", file=sys.stderr)

    def _draw(self) -> None:
        curves: dict[str, list[Result]] = {}
        for result in results.read(self._evals):
            curves.setdefault(_curve(result), []).append(result)

        self.results = sum(map(len, curves.values()))
        for name, curve in curves.items():
            folder, wanted = self._board / name, results.digest([one.digest for one in curve])
            files = list(folder.glob("*tfevents*"))
            if [wanted] != [_digest(file) for file in files]:
                _replace(folder, files, curve, wanted, self._evals)

        for folder in self._board.glob("*"):
            if folder.name not in curves:
                shutil.rmtree(folder)


def _curve(result: Result) -> str:
    """The name of a folder."""
    dataset = f"@{result.dataset}" if result.dataset else ""
    baseline = "" if result.encoder == "trained" else f"-{result.encoder}"
    return f"{result.benchmark}{dataset}-{result.protocol}{baseline}"


def _digest(file: Path) -> str:
    """Of the results in an event file; "" where another version has written it."""
    match = _FILE.fullmatch(file.name)
    return match[2] if match else ""


def _replace(
    folder: Path, files: Sequence[Path], curve: Sequence[Result], digest: str, scratch: Path
) -> None:
    """Write an event file and delete the others. TensorBoard reads the files of a folder in the
    order of their names, and forgets what stood before a file that starts the steps again.
    """
    # slow to import
    from torch.utils.tensorboard import SummaryWriter

    numbers = [int(match[1]) for file in files if (match := _FILE.fullmatch(file.name))]
    number = 1 + max(numbers, default=int(time.time()))

    # what killed fleets have left
    for left in scratch.glob(".curve-*"):
        shutil.rmtree(left, ignore_errors=True)

    with tempfile.TemporaryDirectory(prefix=".curve-", dir=scratch) as draft:
        with SummaryWriter(draft, purge_step=0) as writer:
            described = "\n".join(f"- {key}: {value}" for key, value in curve[0].described.items())
            writer.add_text("eval/protocol", described)
            for result in curve:
                for name, value in result.metrics.items():
                    writer.add_scalar(f"eval/{name}", value, result.step)

        (written,) = Path(draft).glob("*tfevents*")
        folder.mkdir(parents=True, exist_ok=True)
        written.replace(folder / f"events.out.tfevents.{number:010d}.fleet.{digest}")

    for file in files:
        file.unlink()
