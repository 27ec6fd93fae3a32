"""Reads the checkpoints of other trainers, as data only: nothing in them is called."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scaletrain.checkpoint import files
from scaletrain.data.errors import printable
from scaletrain.evals.errors import EvalError
from scaletrain.runtime import local_files

# Largest file; a ResNet-200 of double width with its optimizer has 3 GB.
MAX_BYTES = 64 << 30
# Most entries of an archive; one for each tensor.
_ENTRIES = 1_000_000


def read(path: Path) -> Mapping[str, Any]:
    """The dictionary that a .safetensors file or a file of torch.save holds, on the CPU. Raises
    EvalError or CheckpointError.

    Of an archive only the tensors that are used are read into memory.
    """
    if path.suffix == ".safetensors":
        return files.load_file(path)[0]

    _check(path)
    archive = zipfile.is_zipfile(path)
    try:
        if archive:
            _check_archive(path)
        with warnings.catch_warnings():
            # of storages in files of old versions
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except EvalError:
        raise
    # A file of others can make its reader fail in any way.
    except Exception as error:
        raise EvalError(f"{path} {_reason(error)}") from None

    if not isinstance(content, Mapping):
        raise EvalError(f"{path} has no table of tensors, but a {type(content).__name__}")

    return content


def _check(path: Path) -> None:
    try:
        with local_files.reader(path) as file:
            size = file.seek(0, 2)
    except OSError as error:
        raise EvalError(f"{path} cannot be read: {error.strerror}") from None

    if size > MAX_BYTES:
        raise EvalError(f"{path} has {size:,} bytes, more than the {MAX_BYTES:,} that are read")


def _check_archive(path: Path) -> None:
    """Refuse archives that would need more memory than their size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()

    if len(entries) > _ENTRIES:
        raise EvalError(f"{path} has {len(entries):,} entries, more than the {_ENTRIES:,} allowed")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise EvalError(
                f"{path}: its entry {printable(entry.filename)!r} is compressed, which torch.save "
                "never does: refused"
            )


def _reason(error: Exception) -> str:
    if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"holds an object of {name[1]}, which cannot be read without running code: refused. If "
            "you trust the file, keep only its tensors: "
            'python -c "import torch; '
            "c = torch.load('IN', map_location='cpu', weights_only=False); "
            "torch.save(c['state_dict'], 'OUT.pth')\", with the keys that lead to them in place of "
            "state_dict where it has others"
        )

    first = printable((str(error).splitlines() or [""])[0])[:200]
    return f"is no whole file of torch.save ({type(error).__name__}: {first}); fetch it again"
