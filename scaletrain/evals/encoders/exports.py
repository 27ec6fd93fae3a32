"""Keeps the steps of a run for its evaluation, although training prunes them meanwhile: as hard
links of a step's files, and as one file with the encoder, which all evaluations of the step share.

    RUN/evals/held/step-00000123/                  links, which cost no space while the step exists
    RUN/evals/encoders/step-00000123.safetensors   the encoder, as `scaletrain export` writes it
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from scaletrain import exit_codes
from scaletrain.checkpoint import files, reader
from scaletrain.checkpoint.files import CheckpointError
from scaletrain.config import load
from scaletrain.evals.encoders import targets
from scaletrain.evals.errors import EvalError
from scaletrain.runtime import durable, locks

# Hard links that the file system does not have, or not for files of other users and devices.
_REFUSED = (errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# A step that is saved again while it is linked is linked again.
_ATTEMPTS = 5


class LinksRefusedError(EvalError):
    """The file system refuses hard links."""


def hold(run: Path, step: int) -> Path:
    """Keep a committed step by hard links until `release`; returns the folder of the links, which
    is that of a whole step.

    Where the step was saved again with other content since an earlier call, the new content is
    kept. Raises EvalError where the step is not committed, LinksRefusedError where only `exported`
    can keep it, and CheckpointError where storage fails.
    """
    with _alone(run, step):
        return _hold(run, step)


def release(run: Path, step: int) -> None:
    """Delete the links of a step, if there are any. Raises CheckpointError where storage fails."""
    with _alone(run, step):
        _delete(targets.held(run, step))


def exported(run: Path, step: int) -> Path:
    """The encoder of a step as one file, written if it does not exist yet, or if the step has been
    saved again with other content since. Every rank calls it.

    An existing file is also good when its step is gone. Raises EvalError where the step is not
    committed, and CheckpointError where it is damaged or storage fails.
    """
    return reader.agreed(lambda: _exported(run, step))


def _exported(run: Path, step: int) -> Path:
    path, source = targets.export_of(run, step), _saved(run, step)
    with _alone(run, step):
        if _is_current(run, step):
            return path

        held_before = _manifest(targets.held(run, step)) is not None
        with contextlib.suppress(LinksRefusedError):
            source = _hold(run, step)

        # The optimizer's files are neither needed nor verified.
        saved = reader.open_alone(source, targets.BACKBONE)
        targets.export(run, saved, targets.ENCODER, path)
        if not held_before:
            _delete(targets.held(run, step))

    return path


def _is_current(run: Path, step: int) -> bool:
    """Whether the file of a step exists and is whole, and of the present content of the step if
    that exists.
    """
    try:
        meta = files.load_file(targets.export_of(run, step))[1]
    except CheckpointError:
        return False

    if (manifest := _manifest(_saved(run, step))) is None:
        return True

    wanted = targets.describe(load.load(run / "config.yaml"), step)
    wanted |= {targets.DIGEST: manifest.part(targets.BACKBONE).digest}
    return wanted.items() <= meta.items()


# --- links ----------------------------------------------------------------------------------------


def _hold(run: Path, step: int) -> Path:
    source, kept = _saved(run, step), targets.held(run, step)

    for _ in range(_ATTEMPTS):
        now, before = _manifest(source), _manifest(kept)
        if before is not None and (now is None or now.digest == before.digest):
            return kept
        if now is None:
            raise EvalError(
                f"{source}: there is no such checkpoint, or it is not complete; it may have been "
                "deleted meanwhile, as checkpoint.keep_last and checkpoint.keep_every say"
            )
        if _link(source, kept):
            return kept

    raise EvalError(f"{source} is being saved again and again; evaluate it when the run is over")


def _link(source: Path, kept: Path) -> bool:
    """Make links of a step's files; False where the step changed meanwhile."""
    temporary = kept.with_name(f".{kept.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        os.link(source / reader.MANIFEST, temporary / reader.MANIFEST)
        # The one that was linked: at the source there may be that of a later save by now.
        for name in reader.read_manifest(temporary / reader.MANIFEST).files:
            os.link(source / name, temporary / name)

        durable.sync(temporary)
        _delete(kept)
        temporary.rename(kept)
        durable.sync(kept.parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise LinksRefusedError(f"{kept} refuses hard links: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    return True


def _delete(kept: Path) -> None:
    if kept.is_dir():
        reader.delete(kept)


def _saved(run: Path, step: int) -> Path:
    return reader.folder_of(run / "checkpoints", step)


def _manifest(folder: Path) -> reader.StepManifest | None:
    """The manifest of a committed step; None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return reader.read_manifest(folder / reader.MANIFEST)
    return None


@contextlib.contextmanager
def _alone(run: Path, step: int) -> Iterator[None]:
    """Exclude other processes that hold, release or export the same step. Without locks of the file
    system, two may do the same work; what they write is whole either way.
    """
    kept = targets.held(run, step)
    lock = run / "evals" / "locks" / f"{kept.name}.encoder"
    try:
        with contextlib.ExitStack() as stack:
            lock.parent.mkdir(parents=True, exist_ok=True)
            if _locked(lock, stack):
                _sweep(kept.parent.glob(f".{kept.name}.*"))
                file = targets.export_of(run, step)
                _sweep(file.parent.glob(f".{file.name}.*"))
            yield
    except OSError as error:
        raise CheckpointError(
            f"{run}: step {step} cannot be kept for its evaluation: {error.filename or kept}: "
            f"{error.strerror}. Evaluate RUN/checkpoints/step-N itself, with --results DIR where "
            "RUN/evals cannot be written",
            exit_codes.of(error),
        ) from None


def _sweep(left: Iterable[Path]) -> None:
    """Delete what killed processes have left."""
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _locked(path: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a file until the stack is closed; False where the file system has no locks."""
    try:
        stack.enter_context(locks.locked(path, wait=True))
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False

    return True
