"""Reading checkpoints: the folders of steps, the manifest and its checks, and ranges of tensors
from any number of files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scaletrain import dist, exit_codes
from scaletrain.checkpoint import files
from scaletrain.checkpoint.files import CheckpointError
from scaletrain.config import validation
from scaletrain.config.schema import Frozen, Natural
from scaletrain.runtime import durable

log = logging.getLogger("scaletrain")
MANIFEST = "manifest.json"
# Seconds before each further attempt where storage fails.
PAUSES = (1.0, 5.0)
T = TypeVar("T")

# A plain name, which cannot lead out of the folder.
FileName = Annotated[
    str, Field(pattern=r"^rank-[0-9]{5,}-of-[0-9]{5,}\.[0-9a-f]{16}\.safetensors$")
]
Code = Literal["BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"]


class StoredRange(Frozen):
    """Elements [start, stop) of a flattened tensor, stored in `file` under the tensor's name."""

    file: FileName
    start: Natural
    stop: Natural


class StoredTensor(Frozen):
    """A tensor: its type, its shape, and the files with its ranges."""

    dtype: Code
    shape: tuple[Natural, ...]
    pieces: tuple[StoredRange, ...]

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


class StoredFile(Frozen):
    """Size and checksum of a file."""

    bytes: Natural
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StepManifest(Frozen):
    """The content of a step. A rank's done file is the manifest of what that rank wrote."""

    format: Literal[1] = 1
    step: Natural
    meta: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: dict[FileName, StoredFile]

    def part(self, prefix: str) -> StepManifest:
        """Only the tensors whose names start with `prefix`, and the files that hold them."""
        tensors = {name: e for name, e in self.tensors.items() if name.startswith(prefix)}
        holding = {piece.file for entry in tensors.values() for piece in entry.pieces}
        listed = {name: file for name, file in self.files.items() if name in holding}
        return self.model_copy(update={"tensors": tensors, "files": listed})

    @property
    def digest(self) -> str:
        """Of the content of all files, whatever their names: saving the same again gives the
        same.
        """
        content = sorted(file.sha256 for file in self.files.values())
        return hashlib.sha256("".join(content).encode()).hexdigest()


def read_manifest(path: Path) -> StepManifest:
    try:
        return StepManifest.model_validate_json(files.unseal(path))
    except ValidationError as error:
        raise CheckpointError(
            f"{path} cannot be used: {validation.first(error)}; was it written by another version?"
        ) from None


def merge(step: int, meta: dict[str, Any], parts: Iterable[StepManifest]) -> StepManifest:
    """The manifest of a step from those of all ranks."""
    first: dict[str, StoredTensor] = {}
    pieces: dict[str, list[StoredRange]] = {}
    listed: dict[str, StoredFile] = {}

    for part in parts:
        listed |= part.files
        for name, new in part.tensors.items():
            old = first.setdefault(name, new)
            if (old.dtype, old.shape) != (new.dtype, new.shape):
                raise CheckpointError(
                    f"ranks disagree on {name}: {old.dtype} {old.shape} and {new.dtype} {new.shape}"
                )

            pieces.setdefault(name, []).extend(new.pieces)

    whole = (
        (name, entry.model_copy(update={"pieces": tuple(pieces[name])}))
        for name, entry in first.items()
    )
    return StepManifest(step=step, meta=meta, tensors=dict(map(_tiled, whole)), files=listed)


def _tiled(item: tuple[str, StoredTensor]) -> tuple[str, StoredTensor]:
    """Sort the pieces of a tensor and drop empty ones; CheckpointError unless they cover it exactly
    once.
    """
    name, entry = item
    pieces = sorted(
        (piece for piece in entry.pieces if piece.start != piece.stop),
        key=lambda piece: piece.start,
    )
    end = 0

    for piece in pieces:
        if piece.start != end or piece.stop < piece.start:
            fault = "overlap" if piece.start < end else "leave a gap"
            raise CheckpointError(
                f"pieces of {name} {fault} at {end}: {piece.file} has [{piece.start}, {piece.stop})"
            )

        end = piece.stop

    if end != entry.numel:
        raise CheckpointError(
            f"pieces of {name} end at {end}, but shape {entry.shape} has {entry.numel} elements"
        )

    return name, entry.model_copy(update={"pieces": tuple(pieces)})


# --- folders --------------------------------------------------------------------------------------


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def steps(root: Path) -> dict[int, bool]:
    """The steps with a folder, ascending, and whether each is committed (has a manifest)."""
    try:
        matches = [
            (re.fullmatch(r"step-([0-9]{8}|[1-9][0-9]{8,})", path.name), path)
            for path in root.iterdir()
        ]
        found = {int(match[1]): (path / MANIFEST).is_file() for match, path in matches if match}
    except FileNotFoundError:
        return {}
    except OSError as error:
        # Not the same as "no checkpoints", which would start the run from the beginning.
        text = f"cannot list checkpoints: {error}. Check the path and its permissions"
        raise CheckpointError(text, exit_codes.of(error)) from None

    return dict(sorted(found.items()))


def delete(folder: Path) -> None:
    """Delete a step, its manifest first, so that a half-deleted step does not count."""
    (folder / MANIFEST).unlink(missing_ok=True)
    durable.sync(folder)
    shutil.rmtree(folder)


# --- reading --------------------------------------------------------------------------------------


class SavedStep:
    """A verified checkpoint or a part of it, read by ranges of flattened tensors, at any world size
    and with any engine.
    """

    def __init__(self, path: Path, manifest: StepManifest) -> None:
        self.path, self._manifest = path, manifest
        self._open: dict[str, Any] = {}

    @property
    def step(self) -> int:
        return self._manifest.step

    @property
    def meta(self) -> dict[str, Any]:
        return self._manifest.meta

    @property
    def digest(self) -> str:
        """Of the content of the files that were opened."""
        return self._manifest.digest

    def names(self) -> list[str]:
        return sorted(self._manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return files.DTYPES[self._entry(name).dtype]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A range of a flattened tensor: [stop - start] on the CPU, read from all files that have
        parts of it.
        """
        entry = self._entry(name)
        stop = entry.numel if stop is None else stop
        if not 0 <= start <= stop <= entry.numel:
            raise CheckpointError(
                f"{self.path}: {name} has {entry.numel} elements; [{start}, {stop}) is not "
                "a range of it"
            )

        out = torch.empty(stop - start, dtype=self.dtype(name))
        for piece in entry.pieces:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                out[low - start : high - start] = self._slice(
                    piece.file, name, low - piece.start, high - piece.start
                )

        return out

    def _entry(self, name: str) -> StoredTensor:
        try:
            return self._manifest.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path} has no tensor {name}; it belongs to another model or method"
            ) from None

    def _slice(self, file: str, name: str, start: int, stop: int) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, "pt", device="cpu")
            part: Tensor = self._open[file].get_slice(name)[start:stop]
        except (OSError, SafetensorError) as error:
            text = (
                f"{self.path / file}: cannot read {name}: {error}. Was the step pruned meanwhile?"
            )
            raise CheckpointError(text, exit_codes.of(error)) from None

        if (len(part), part.dtype) != (stop - start, self.dtype(name)):
            raise CheckpointError(f"{self.path / file}: {name} is not what the manifest says")

        return part


def _verify(folder: Path, prefix: str) -> StepManifest:
    """The manifest of a step, once every byte is known to be as written; else CheckpointError.

    prefix: only of the tensors with such names and of the files that hold them.
    """
    try:
        manifest = read_manifest(folder / MANIFEST)
    except OSError as error:
        raise CheckpointError(
            f"{folder / MANIFEST} cannot be read: {error.strerror}", exit_codes.of(error)
        ) from None

    for name, entry in map(_tiled, manifest.tensors.items()):
        if strange := {piece.file for piece in entry.pieces} - manifest.files.keys():
            raise CheckpointError(
                f"{folder / MANIFEST} places {name} in {min(strange)}, which it does not list"
            )

    # Without a prefix, files without any tensor are verified too.
    manifest = manifest.part(prefix) if prefix else manifest
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(
            pool.map(
                lambda item: files.compare(folder / item[0], item[1].bytes, item[1].sha256),
                manifest.files.items(),
            )
        )

    return manifest


def _patiently(folder: Path, prefix: str) -> StepManifest:
    """As _verify, with further attempts: a transient failure of storage is not damage, and resuming
    from an older step would lose work.
    """
    for pause in PAUSES:
        try:
            return _verify(folder, prefix)
        except CheckpointError as error:
            if error.exit_code != exit_codes.RETRY:
                raise
            log.warning("%s; the next attempt is in %g s", error, pause)
            time.sleep(pause)

    return _verify(folder, prefix)


def _newest(root: Path, prefix: str) -> tuple[Path, StepManifest] | None:
    known, refused = steps(root), ""
    for step in reversed(known):
        folder = folder_of(root, step)
        if not known[step]:
            log.warning("%s was never committed and is ignored", folder)
            continue

        try:
            manifest = _patiently(folder, prefix)
            if manifest.step != step:
                raise CheckpointError(
                    f"{folder} contains step {manifest.step}: the folder was renamed"
                )

            return folder, manifest
        except CheckpointError as error:
            log.warning("step %d is refused: %s", step, error)
            refused = str(error)

    if refused:
        raise CheckpointError(
            f"no step in {root} is whole ({refused}). Restore one from a copy, or move the folder "
            "away"
        )

    return None


def agreed(decide: Callable[[], T]) -> T:
    """Rank 0's result or ValueError on every rank, so that all ranks use the same step and files
    are hashed once. Every rank calls it.
    """
    answer: tuple[T | None, ValueError | None] = (None, None)

    if dist.main():
        try:
            answer = (decide(), None)
        except ValueError as error:
            answer = (None, error)

    value, fault = dist.broadcast_object(answer)
    if fault is not None:
        raise fault

    return value  # type: ignore[no-any-return]


def latest(root: Path, prefix: str = "") -> SavedStep | None:
    """The newest intact step; None if no step was ever committed. Every rank calls it.

    A damaged step is named in the log and the one before it is used; CheckpointError if all are
    damaged. prefix: as in open_step.
    """
    found = agreed(lambda: _newest(root, prefix))

    return None if found is None else SavedStep(*found)


def open_step(path: Path, prefix: str = "") -> SavedStep:
    """Open and verify the folder of a step. Raises CheckpointError. Every rank calls it.

    prefix: open only the tensors with such names, and verify only the files that hold them.
    """
    return SavedStep(path, agreed(lambda: _verify(path, prefix)))


def open_alone(path: Path, prefix: str = "") -> SavedStep:
    """As open_step, for one rank by itself."""
    return SavedStep(path, _verify(path, prefix))
