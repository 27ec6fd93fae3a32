"""Checkpoint files with checksums: sealed JSON and safetensors. Loading them cannot run code.

Safetensors are written here and read by the official library, whose writer needs twice the memory
of the file, hides errno (disk full) and cannot hash while the disk works.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scaletrain import exit_codes
from scaletrain.runtime.durable import flush, replacing

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}  # the container's names
CODES = {dtype: code for code, dtype in DTYPES.items()}
# The tensor name that the format reserves.
RESERVED = "__metadata__"
# Largest header of a safetensors file: some 100,000 tensors.
HEADER_BYTES = 16 << 20
# Largest sealed JSON file: a step of 1,000 ranks with parts of 700 tensors each.
SEALED_BYTES = 128 << 20
_SUM = "scaletrain.sha256"
_HEAD, _JOINT = b'{"sha256":"', b'","body":'


class CheckpointError(ValueError):
    """A checkpoint or weight file that cannot be written or read; the text names the file, what is
    wrong, and the fix.
    """

    def __init__(self, text: str, exit_code: int = exit_codes.INVALID) -> None:
        super().__init__(text)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[str, int]]:
        return CheckpointError, (str(self), self.exit_code)


# --- sealed JSON ----------------------------------------------------------------------------------


def seal(body: str) -> bytes:
    """Wrap JSON text in a JSON object with the sha256 of its bytes."""
    raw = body.encode()
    return _HEAD + hashlib.sha256(raw).hexdigest().encode() + _JOINT + raw + b"}\n"


def unseal(path: Path) -> bytes:
    """The body of a sealed file. Raises FileNotFoundError, or CheckpointError if a byte has
    changed.
    """
    with path.open("rb") as file:
        raw = file.read(SEALED_BYTES + 1)

    if len(raw) > SEALED_BYTES:
        raise CheckpointError(f"{path} is damaged: it has more than {SEALED_BYTES:,} bytes")

    start = len(_HEAD) + 64 + len(_JOINT)
    body = raw[start:-2]
    if raw != _HEAD + hashlib.sha256(body).hexdigest().encode() + _JOINT + body + b"}\n":
        raise CheckpointError(
            f"{path} is damaged: its text does not match the sha256 that it carries"
        )

    return body


# --- safetensors ----------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], meta: Mapping[str, str]
) -> tuple[int, str]:
    """Write CPU tensors as safetensors; returns the size and the sha256 of what was meant to be
    written.

    A second thread hashes the memory while this one waits for the disk. Wide types come first, so
    that every tensor is aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {RESERVED: dict(meta)}
    offset = 0

    for name in order:
        end = offset + tensors[name].numel() * tensors[name].element_size()
        shape, code = list(tensors[name].shape), CODES[tensors[name].dtype]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end

    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = [
        memoryview(len(text).to_bytes(8, "little") + text),
        *(_bytes(tensors[name]) for name in order),
    ]

    def digest() -> str:
        state = hashlib.sha256()
        for part in parts:
            state.update(part)
        return state.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        total = pool.submit(digest)
        for part in parts:
            file.write(part)
        flush(file)
        return sum(len(part) for part in parts), total.result()


def write_new(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """As write_tensors, to a new file, which must not exist."""
    with path.open("xb") as file:
        return write_tensors(file, tensors, {"format": "pt"})


def compare(path: Path, size: int, sha256: str) -> None:
    """Raise CheckpointError, naming the file and the difference, unless its content is the same."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise CheckpointError(f"{path} is damaged: {found} bytes, should be {size}")
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise CheckpointError(
                    f"{path} is damaged: its sha256 is not the one in the manifest"
                )
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", exit_codes.of(error)
        ) from None


# --- one file of weights --------------------------------------------------------------------------


def fingerprint(tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> str:
    """sha256 of names, types, shapes, values and metadata, whatever their order in the file."""
    state = hashlib.sha256(json.dumps(sorted(meta.items())).encode())
    for name in sorted(tensors):
        state.update(
            json.dumps(
                [name, CODES.get(tensors[name].dtype, "?"), list(tensors[name].shape)]
            ).encode()
        )
        state.update(_bytes(tensors[name]))

    return state.hexdigest()


def export(tensors: Mapping[str, Tensor], path: Path, meta: Mapping[str, str]) -> None:
    """Write tensors of any device to one safetensors file, atomically. For one rank."""
    unknown = [
        name for name, tensor in tensors.items() if tensor.dtype not in CODES or name == RESERVED
    ]

    if unknown:
        raise CheckpointError(
            f"cannot export tensor {unknown[0]!r} of type {tensors[unknown[0]].dtype}"
        )

    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    head = {"format": "pt", **meta}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            write_tensors(file, host, head | {_SUM: fingerprint(host, head)})
    except OSError as error:
        text = f"cannot write {path}: {error.strerror}. Choose another file name or free the disk"
        raise CheckpointError(text, exit_codes.of(error)) from None


def _fix(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)

    # An intact file may begin with the same bytes (the length of its header), so this is for broken
    # ones only.
    if start == b"PK\x03\x04" or (
        start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    ):
        return (
            "It looks like a pickle, which can run code when loaded, and is refused. If you trust "
            "its source, convert it once: "
            'python -c "import torch, safetensors.torch as s; '
            "s.save_file(torch.load('IN.pt', weights_only=True), 'OUT.safetensors')\""
        )

    return "It was cut short or is of another kind; copy or export it again"


def load_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """CPU tensors and metadata of any safetensors file; a checksum of scaletrain's is verified.

    A pickle (.pt, .pth) is refused, since loading one can run code.
    """
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder; give one .safetensors file (`scaletrain export RUN FILE` makes "
            "one)"
        )
    if path.exists() and not path.is_file():
        raise CheckpointError(
            f"{path} is a pipe or a device and not a file; give one .safetensors file"
        )

    try:
        _check_header(path)
        with safe_open(path, "pt", device="cpu") as handle:
            meta: dict[str, str] = dict(handle.metadata() or {})
            tensors: dict[str, Tensor] = {
                name: handle.get_tensor(name).clone()
                for name in handle.keys()  # noqa: SIM118
            }
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}. Check the path", exit_codes.of(error)
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}). {_fix(path)}"
        ) from None

    expected = meta.pop(_SUM, None)
    if expected is not None and expected != fingerprint(tensors, meta):
        raise CheckpointError(
            f"{path} is damaged: its contents do not match the sha256 that it carries. Export it "
            "again"
        )

    return tensors, meta


def _check_header(path: Path) -> None:
    """Refuse a header that would take minutes and gigabytes to read; networks have a few thousand
    tensors.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")

    # A larger size is not a header at all; the library reports that.
    if HEADER_BYTES < size < path.stat().st_size:
        raise CheckpointError(
            f"{path}: its header has {size:,} bytes, more than the {HEADER_BYTES:,} that are read"
        )
