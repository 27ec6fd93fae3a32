"""What a fleet works on: one result each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["measured", "running", "pending", "missing", "failed"]


@dataclass(frozen=True)
class Cell:
    """One result: a step of a run under one benchmark."""

    run: Path
    step: int
    benchmark: str
    # of the dataset
    dataset: str
    # arguments of the command line that measures it
    arguments: tuple[str, ...]
    # where the result will be; None where that is not known, since the evaluation is not possible
    result: Path | None
    # of its job, where there are any
    gpus: int = 1
    # whether it needs the whole step, and not the encoder alone
    network: bool = False
    # whether it waits for stored features and does nothing else before
    shares: bool = False
    # why it is not possible
    problem: str = ""

    @property
    def name(self) -> str:
        """Of the result, and of its claim."""
        return self.result.stem if self.result else ""

    @property
    def log(self) -> Path:
        """Of a process that measures it on this machine."""
        return self.run / "evals" / "logs" / f"{self.name}.log"


@dataclass(frozen=True)
class Status:
    """Of one cell. text: the value in per cent, who evaluates, or what went wrong."""

    state: State
    text: str = ""
    # whether an attempt has ended without a result
    tried: bool = False
