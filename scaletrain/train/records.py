"""Reading RUN/metrics.jsonl, also while the run writes it.

A line is the record of a step, or that of a start of the run: `{"start": {...}}`. A run that
resumes replaces the file by one without the steps that it makes again. What follows the last end of
a line is being written, or was cut short by a crash.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path

from pydantic import (
    BaseModel,
    ConfigDict,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from scaletrain.config import validation
from scaletrain.config.recipe import ConfigError
from scaletrain.runtime import local_files
from scaletrain.runtime.durable import START

FILE = "metrics.jsonl"
# how the line of a start begins
_START = f'{{"{START}":'.encode()


class StepRecord(BaseModel):
    """A recorded step. What earlier versions did not record is None."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, FiniteFloat | None]

    # optimizer steps before this one
    step: NonNegativeInt
    epoch: NonNegativeInt | None = None
    steps_per_epoch: PositiveInt | None = None
    # passes over the data and samples drawn by the end of the step
    epochs: FiniteFloat | None = None
    samples: NonNegativeInt | None = None
    # Unix time
    time: FiniteFloat | None = None

    @property
    def scalars(self) -> Mapping[str, float | None]:
        """What was measured, such as train/loss; None for a number that was not finite."""
        return self.__pydantic_extra__


class StartRecord(BaseModel):
    """A start of the run, the first one or one that resumes it."""

    model_config = ConfigDict(frozen=True)

    # optimizer steps of the run before this start
    step: NonNegativeInt
    # Unix time
    time: FiniteFloat
    # processes
    world: PositiveInt
    # their number by the name of the device
    devices: dict[str, PositiveInt]
    # of rank 0, and of all ranks
    host: str
    hosts: tuple[str, ...]
    # of SLURM; "" outside it
    job: str
    # of scaletrain, python, torch and the engine's library
    versions: dict[str, str]
    # commit of the source tree, see runtime.versions.commit
    git: str


class _StartLine(BaseModel):
    start: StartRecord


class Metrics:
    """The records of a run as of the last `refresh`, which reads only what is new."""

    def __init__(self, run: Path) -> None:
        self.path = run / FILE
        self._reset()

    def _reset(self) -> None:
        # ascending by step
        self.steps: list[StepRecord] = []
        self.starts: list[StartRecord] = []
        # what is wrong with lines that are neither
        self.damaged: list[str] = []
        self._file: tuple[int, int] | None = None
        self._lines = self._offset = 0
        # the last line that was read
        self._tail = b""

    def refresh(self) -> None:
        """Read the lines that were added since the last call, or all where the file is another
        one. Raises OSError for a file that cannot be read.
        """
        try:
            file = local_files.reader(self.path)
        except FileNotFoundError:
            self._reset()
            return

        with file:
            state = os.fstat(file.fileno())
            place = state.st_dev, state.st_ino
            if place != self._file or not self._continues(file):
                self._reset()
                self._file = place

            file.seek(self._offset)
            new = file.read()

        *lines, rest = new.split(b"\n")
        for line in lines:
            self._add(line)

        self._offset += len(new) - len(rest)
        self._tail = lines[-1] + b"\n" if lines else self._tail

    def _continues(self, file: BufferedReader) -> bool:
        """Whether the last line that was read is still in its place: the number of a deleted file
        may be given to its successor, and a line may be taken back on a full disk.
        """
        file.seek(self._offset - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _add(self, line: bytes) -> None:
        self._lines += 1
        try:
            if line.startswith(_START):
                self.starts.append(_StartLine.model_validate_json(line).start)
            else:
                self.steps.append(StepRecord.model_validate_json(line))
        except ValidationError as error:
            self.damaged.append(
                f"{self.path}, line {self._lines}, is not a record of a run "
                f"({validation.first(error)})"
            )

    def check(self) -> None:
        """Raise ConfigError where a line is damaged."""
        if self.damaged:
            raise ConfigError(self.damaged[0])


def read(run: Path) -> Metrics:
    """The records of a run as they are now; none where nothing has been recorded."""
    metrics = Metrics(run)
    metrics.refresh()
    return metrics
