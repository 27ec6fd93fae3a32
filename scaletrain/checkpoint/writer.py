"""Writing checkpoints: each rank writes its flat ranges of the tensors; a manifest, written last,
commits the step.

    ROOT/step-00000123/
        rank-00000-of-00002.TOKEN.safetensors  one rank's ranges, each under its tensor's name
        rank-00000-of-00002.TOKEN.json         the same rank's done file; gone after the commit
        manifest.json                          which range of which tensor is where, sizes, sha256

TOKEN identifies one save of one process start, so files of a killed attempt are never mistaken for
those of another. Readers use ranges of the flattened tensors only, so a checkpoint can be restored
at any world size and with any engine. As in torch's distributed checkpoints, chunks are planned by
name and a rename commits; unlike there, no metadata is pickled and no file is overwritten in place.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaletrain import dist, exit_codes
from scaletrain.checkpoint import files
from scaletrain.checkpoint.files import CheckpointError
from scaletrain.checkpoint.reader import (
    MANIFEST,
    StepManifest,
    StoredFile,
    StoredRange,
    StoredTensor,
    delete,
    folder_of,
    merge,
    read_manifest,
    steps,
)
from scaletrain.core import Piece
from scaletrain.runtime import durable
from scaletrain.runtime.signals import note_progress

log = logging.getLogger("scaletrain")
# Seconds before each further attempt where storage fails.
PAUSES = (1.0, 5.0)


@dataclass(frozen=True)
class _Job:
    """The content of one save, in memory that training does not change."""

    step: int
    token: str
    tensors: dict[str, Tensor]
    # name -> (start, shape of the whole)
    ranges: dict[str, tuple[int, tuple[int, ...]]]
    meta: dict[str, Any]


class Writer:
    """Saves checkpoints in the background. Every rank makes one, and calls `save` for the same
    steps.

    The `keep_last` newest steps are kept, and every multiple of `keep_every` (0: none). Rank 0
    waits up to `timeout` seconds for the files of other ranks. A failure in the background is
    raised as CheckpointError by the next check(), save(), wait() or close(). Transient errors of
    storage are retried first; the CheckpointError then has the exit code for "start again".
    """

    def __init__(
        self, root: Path, *, keep_last: int = 2, keep_every: int = 0, timeout: float = 600.0
    ) -> None:
        self._session = str(dist.broadcast_object(secrets.token_hex(5)))
        self._root, self._keep_last, self._keep_every, self._timeout = (
            root,
            max(1, keep_last),
            keep_every,
            timeout,
        )
        self._rank, self._world = dist.rank(), dist.world()
        self._count = 0

        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._host: dict[str, Tensor] = {}
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot make {root}: {error.strerror}. Choose a folder that you may write to"
            ) from None

    def save(self, step: int, state: Mapping[str, Piece], meta: Mapping[str, Any]) -> None:
        """Copy `state` to host memory and return; files are written in the background, once an
        earlier save has finished.

        meta: plain JSON (tuples come back as lists); that of rank 0 is stored.
        """
        self.wait()

        for name, piece in state.items():
            _check(name, piece)

        try:
            plain = json.loads(json.dumps(dict(meta), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"meta of step {step} is not plain JSON: {error}") from None

        ranges = {name: (piece.start, tuple(piece.shape)) for name, piece in state.items()}
        job = _Job(step, f"{self._session}{self._count:06x}", self._copy(state), ranges, plain)
        self._count += 1
        self._thread = threading.Thread(
            target=self._run, args=(job,), name="checkpoint", daemon=True
        )

        self._thread.start()

    def wait(self) -> None:
        """Block until the save in flight is committed (rank 0), or until this rank's part of it is
        on disk (other ranks).
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None

        self.check()

    def check(self) -> None:
        """Raise the CheckpointError of a save that has failed: later steps would not be saved
        either.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Finish the save in flight. A process that ends without this loses that save, never an
        earlier one.
        """
        self.wait()
        self._host.clear()

    def _copy(self, state: Mapping[str, Piece]) -> dict[str, Tensor]:
        """Copy to host memory, which is reused by the next save: new pages and pinning cost more
        than the copy.
        """
        old, self._host = self._host, {}

        for name, piece in state.items():
            data, host = piece.data.detach(), old.get(name)
            if host is None or (host.shape, host.dtype) != (data.shape, data.dtype):
                host = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
            self._host[name] = host.copy_(data, non_blocking=True)

        if any(piece.data.is_cuda for piece in state.values()):
            torch.cuda.current_stream().synchronize()

        return dict(self._host)

    # --- from here on in the background thread: files only, no collectives

    def _run(self, job: _Job) -> None:
        folder = folder_of(self._root, job.step)
        try:
            self._patiently(lambda: self._write(job, folder))
            if self._rank == 0:
                self._patiently(lambda: self._commit(job, folder))
                note_progress(f"step {job.step}")
        except Exception as error:
            self._error = self._explain(job, folder, error)
            self._error.__cause__ = error
            self._discard(job, folder)
            return

        if self._rank == 0:
            try:
                self._tidy(job, folder)
            except (OSError, CheckpointError) as error:
                log.warning(
                    "step %d is saved, but %s could not be tidied: %s", job.step, self._root, error
                )

    def _patiently(self, work: Callable[[], None]) -> None:
        """Retry `work`, which writes files from the start, after transient failures of storage."""
        for pause in PAUSES:
            try:
                work()
                return
            except OSError as error:
                if not exit_codes.passing(error):
                    raise

                log.warning(
                    "a checkpoint's files cannot be written (%s); the next attempt is in %g s",
                    error,
                    pause,
                )
                time.sleep(pause)

        work()

    def _stem(self, rank: int, token: str) -> str:
        return f"rank-{rank:05d}-of-{self._world:05d}.{token}"

    def _write(self, job: _Job, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = self._stem(self._rank, job.token)
        data = f"{stem}.safetensors"
        # of a failed attempt
        (folder / data).unlink(missing_ok=True)
        size, sha256 = files.write_new(folder / data, job.tensors)
        entries = {}

        for name, (start, shape) in job.ranges.items():
            tensor = job.tensors[name]
            part = StoredRange(file=data, start=start, stop=start + len(tensor))
            entries[name] = StoredTensor.model_validate(
                {"dtype": files.CODES[tensor.dtype], "shape": shape, "pieces": (part,)}
            )

        done = StepManifest(
            step=job.step,
            meta={},
            tensors=entries,
            files={data: StoredFile(bytes=size, sha256=sha256)},
        )
        with durable.replacing(folder / f"{stem}.json", job.token) as file:
            file.write(files.seal(done.model_dump_json()))

    def _commit(self, job: _Job, folder: Path) -> None:
        limit = time.monotonic() + self._timeout
        done = [
            self._await(folder / f"{self._stem(rank, job.token)}.json", rank, limit)
            for rank in range(self._world)
        ]
        manifest = merge(job.step, job.meta, done)

        for name, listed in manifest.files.items():
            if (folder / name).stat().st_size != listed.bytes:
                raise CheckpointError(f"{folder / name} does not have the size that was written")

        durable.sync(self._root)
        with durable.replacing(folder / MANIFEST, job.token) as file:
            file.write(files.seal(manifest.model_dump_json()))

    def _await(self, path: Path, rank: int, limit: float) -> StepManifest:
        pause = 0.005
        while True:
            try:
                # Opening by name bypasses the name caches of network file systems.
                return read_manifest(path)
            except FileNotFoundError:
                if time.monotonic() > limit:
                    text = (
                        f"rank {rank} of {self._world} did not finish within {self._timeout:g} "
                        f"s (no {path}); see its log"
                    )
                    raise CheckpointError(text, exit_codes.RETRY) from None

            time.sleep(pause)
            pause = min(0.5, pause * 1.5)

    def _tidy(self, job: _Job, folder: Path) -> None:
        """Delete done files, files of killed attempts, and steps that are no longer kept.

        Only up to this step, since another rank may have begun the next save.
        """
        listed = read_manifest(folder / MANIFEST).files

        for path in folder.iterdir():
            if (
                path.name not in listed
                and path.name != MANIFEST
                and not self._newer(path.name, job.token)
            ):
                path.unlink(missing_ok=True)

        known = {step: done for step, done in steps(self._root).items() if step <= job.step}
        good = [step for step, done in known.items() if done]
        marked = {step for step in good if self._keep_every and step % self._keep_every == 0}
        for step in known.keys() - marked - set(good[-self._keep_last :]):
            delete(folder_of(self._root, step))

    def _discard(self, job: _Job, folder: Path) -> None:
        """Delete the files of a failed save: this rank's, and on rank 0 those of finished ranks.

        The disk may be full or gone, so errors are ignored.
        """
        with contextlib.suppress(OSError):
            if job.token in (folder / MANIFEST).read_text():
                # The failure came after the commit.
                return

        with contextlib.suppress(OSError):
            done = [
                rank
                for rank in range(self._world)
                if (folder / f"{self._stem(rank, job.token)}.json").exists()
            ]

            for rank in {self._rank, *(done if self._rank == 0 else ())}:
                for path in folder.glob(f"{self._stem(rank, job.token)}.*"):
                    path.unlink(missing_ok=True)

            folder.rmdir()

    def _newer(self, name: str, token: str) -> bool:
        """Whether a file belongs to a later save of the same step by this process start."""
        match = re.search(rf"\.({self._session}[0-9a-f]{{6}})\.", name)
        return match is not None and match[1] > token

    def _explain(self, job: _Job, folder: Path, error: Exception) -> CheckpointError:
        what = str(error)
        try:
            good = [step for step, done in steps(self._root).items() if done]
            left = (
                f"step {good[-1]} is the last good one and is untouched"
                if good
                else "no earlier step exists"
            )
            free = f"{shutil.disk_usage(self._root).free:,} bytes free"
        except (OSError, CheckpointError) as second:
            left, free = "earlier steps are untouched", str(second)

        if isinstance(error, OSError):
            what = f"{error.filename or folder}: {error.strerror} ({free})"

        text = f"step {job.step} was not saved: {what}; {left}. Fix that and start again"
        return CheckpointError(text, exit_codes.of(error))


def _check(name: str, piece: Piece) -> None:
    data, whole = piece.data, torch.Size(piece.shape).numel()
    if data.dim() != 1 or piece.start < 0 or piece.start + data.numel() > whole:
        raise CheckpointError(
            f"piece of {name}: {tuple(data.shape)} at {piece.start} is no flat range of shape "
            f"{piece.shape}"
        )
    if data.dtype not in files.CODES or name == files.RESERVED:
        raise CheckpointError(
            f"{name} of type {data.dtype} cannot be stored; types are {', '.join(files.DTYPES)}"
        )
