"""Result files: one for each encoder, protocol and data, named by a digest of all that defines it,
and never changed. The predictions for every test sample are in a file next to it.

The identity of a result is known before anything is measured: `protocol` (benchmark, settings,
transform, content of the data, how classes were matched), `encoder` (kind, step, weights) and the
version of scaletrain. Results are comparable, in a table or on a curve, if they have the same
protocol, which includes the samples that could not be read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, ValidationError, model_validator

from scaletrain.config import validation
from scaletrain.config.recipe import flat
from scaletrain.evals.errors import EvalError
from scaletrain.runtime import durable

FORMAT = 2
# Names become folders, tags and columns.
Name = Annotated[str, Field(pattern=r"^\w+$")]
# Larger files are not results.
_BYTES = 64 << 20


class SkippedSample(BaseModel):
    """A sample that could not be read."""

    sample: NonNegativeInt
    fault: str


class DatasetRecord(BaseModel):
    """A training or test set."""

    path: str
    samples: NonNegativeInt
    sha256: str
    left_out: tuple[SkippedSample, ...] = ()


class SubsetRecord(BaseModel):
    """The label subset that was trained on."""

    file: str


class DataRecord(BaseModel):
    train: DatasetRecord
    test: DatasetRecord
    labels: SubsetRecord | None = None

    @property
    def both(self) -> dict[str, DatasetRecord]:
        return {"train": self.train, "test": self.test}


class Identity(BaseModel, extra="allow"):
    protocol: dict[str, Any]
    encoder: dict[str, Any]


class TrainingRecord(BaseModel):
    """How long the encoder was trained; None where that is not known."""

    samples: NonNegativeInt | None = None
    epochs: FiniteFloat | None = None


class PredictionsRecord(BaseModel):
    """The file of predictions, next to the result."""

    # A plain name, which cannot lead out of the folder.
    file: Annotated[str, Field(pattern=r"^[\w@+-][\w.@+-]*\.npz$")]
    sha256: str


class Result(BaseModel):
    """The content of a result file that tables and curves use.

    Those of format 1, which earlier versions wrote, have neither intervals nor predictions.
    """

    format: Literal[1, 2]
    # of `identity`; the file's name ends with it
    digest: str
    benchmark: Name
    # Name of the dataset; empty in format 1.
    dataset: str = ""
    # Name of an encoder that is no run's; a folder may have results of several.
    name: str = ""
    encoder: Literal["trained", "untrained", "pixels"]
    step: NonNegativeInt
    trained: TrainingRecord = TrainingRecord()
    # when, in UTC
    measured: str
    # The metric that stands for the benchmark where there is room for one.
    main: Name
    # in per cent
    metrics: dict[Name, FiniteFloat]
    # 95 % intervals [low, high] of the metrics
    intervals: dict[Name, tuple[FiniteFloat, FiniteFloat]] = {}
    predictions: PredictionsRecord | None = None
    data: DataRecord
    identity: Identity
    # Where it was read from.
    file: Path = Path()

    @model_validator(mode="before")
    @classmethod
    def _main_of_format_1(cls, content: Any) -> Any:
        """Its first metric was the main one."""
        if isinstance(content, dict) and content.get("format") == 1:
            return {"main": next(iter(content.get("metrics") or {}), ""), **content}
        return content

    @model_validator(mode="after")
    def _complete(self) -> Result:
        if self.main not in self.metrics:
            raise ValueError(f"its main metric '{self.main}' is not among its metrics")
        if self.format > 1 and self.intervals.keys() != self.metrics.keys():
            raise ValueError("its intervals are not those of its metrics")
        return self

    @property
    def protocol(self) -> str:
        """Digest of all but the encoder and its step: comparable results have the same."""
        lost = [[one.sample for one in part.left_out] for part in self.data.both.values()]
        return digest([self.identity.protocol, lost])

    @property
    def described(self) -> dict[str, str]:
        """The protocol by dotted keys: settings as in `--set`, data by name and the first digits of
        its sha256.
        """
        sets: dict[str, Any] = {
            name: f"{Path(part.path).name} ({part.sha256[:6]})"
            for name, part in self.data.both.items()
        }

        if self.data.labels is not None:
            sets["labels"] = f"{self.data.labels.file} ({self.identity.protocol['labels'][:6]})"

        sets["left_out"] = sum(len(part.left_out) for part in self.data.both.values())
        return {key: str(value) for key, value in flat(self.identity.protocol | sets).items()}


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def parse(path: Path) -> tuple[Result, dict[str, Any]]:
    """Read a result file; also returns its full content. Raises EvalError, naming the file, if it
    is invalid or was changed.
    """
    try:
        if not path.is_file() or path.stat().st_size > _BYTES:
            raise ValueError("not a regular file of usual size")

        content = json.loads(path.read_bytes())
        result = Result.model_validate(content).model_copy(update={"file": path})
        if result.digest != digest(content["identity"]):
            raise ValueError("its `digest` is not that of its `identity`")
    except ValidationError as error:
        reason = validation.first(error)
    except (ValueError, RecursionError) as error:
        reason = str(error)
    else:
        return result, content

    # Text from a foreign file must not control the terminal.
    plain = reason.encode("unicode_escape").decode()
    raise EvalError(f"{path} is not a result of this version of `scaletrain eval` ({plain})")


def read(folder: Path) -> list[Result]:
    """The results in RUN/evals or another folder, ascending by step; of several with the same
    encoder, step and protocol the newest.

    Files that are skipped are named on stderr, once in a process.
    """
    newest: dict[tuple[str, str, int, str], Result] = {}

    for path in sorted(folder.glob("*.json")):
        try:
            result = parse(path)[0]
        except EvalError as error:
            _say_once(f"skipped: {error}")
            continue

        key = result.name, result.encoder, result.step, result.protocol
        older, newer = sorted((newest.get(key, result), result), key=lambda one: one.measured)

        if older.file != newer.file:
            _say_once(
                f"skipped: {older.file}: {newer.file.name} has the same step and protocol, and is "
                "not older"
            )

        newest[key] = newer

    return sorted(newest.values(), key=lambda result: result.step)


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def prepare(path: Path) -> None:
    """Make the folder of a result. Raises EvalError if it cannot be written, before time is spent
    on measuring.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvalError(f"cannot write {path}: {error.strerror}") from error

    if not os.access(path.parent, os.W_OK):
        raise EvalError(f"cannot write {path}: the folder is write-protected")


def write(
    path: Path, content: Mapping[str, Any], predictions: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, Any]:
    """Write a result and its predictions, and return the content of the result's file, which
    another process may have written first. Raises EvalError.
    """
    if not path.exists():
        packed = io.BytesIO()
        np.savez_compressed(packed, **predictions)  # type: ignore[arg-type]
        packed_file = path.with_suffix(".npz")
        record = {"file": packed_file.name, "sha256": hashlib.sha256(packed.getvalue()).hexdigest()}
        content = {**content, "predictions": record}
        # For people: tables and curves name it.
        named = {"digest": Result.model_validate(content).protocol}
        content["protocol"] = named | content["protocol"]

        try:
            # First, since a result that exists is complete.
            durable.write(packed_file, packed.getvalue())
            durable.write(path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise EvalError(
                f"cannot write {path}: {error.strerror}; measured were "
                f"{json.dumps(content['metrics'])}"
            ) from error

    return parse(path)[1]
