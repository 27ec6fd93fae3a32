"""Small checkpoints to write, compare and damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scaletrain import dist
from scaletrain.checkpoint import reader
from scaletrain.checkpoint.writer import Writer
from scaletrain.core import Piece

TYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
TYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def whole(tensor: Tensor) -> Piece:
    return Piece(tensor.reshape(-1), 0, tuple(tensor.shape))


def tensors(step: int) -> dict[str, Tensor]:
    """One of each type, odd lengths so that alignment matters, a scalar and an empty one."""
    g = torch.Generator().manual_seed(step)
    out = {
        str(t).removeprefix("torch."): torch.randint(0, 100, (3, 5), generator=g).to(t)
        for t in TYPES
    }
    return out | {
        "scalar": torch.tensor(step),
        "empty": torch.empty(0, 4),
        "net.weight": torch.randn(7, 11, generator=g),
    }


def save(root: Path, *steps: int, **settings: int) -> None:
    writer = Writer(root, **settings)
    for step in steps:
        writer.save(
            step, {name: whole(t) for name, t in tensors(step).items()}, {"clock": {"step": step}}
        )
    writer.close()


def holds(saved: reader.SavedStep, step: int) -> None:
    want = tensors(step)
    assert (saved.step, saved.meta, saved.names()) == (
        step,
        {"clock": {"step": step}},
        sorted(want),
    )
    for name, tensor in want.items():
        assert (saved.shape(name), saved.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(saved.read(name).view(tensor.shape), tensor), name


def listing(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip(path: Path, place: int) -> None:
    """Flip one bit; calling it again undoes it."""
    raw = bytearray(path.read_bytes())
    raw[place // 8] ^= 1 << place % 8
    path.write_bytes(raw)


def as_rank(
    monkeypatch: pytest.MonkeyPatch, root: Path, rank: int, world: int, **settings: Any
) -> Writer:
    """A writer of one rank of several in this one process, all of session 0123456789."""
    monkeypatch.setattr(dist, "rank", lambda: rank)
    monkeypatch.setattr(dist, "world", lambda: world)
    monkeypatch.setattr(dist, "broadcast_object", lambda value: "0123456789")
    writer = Writer(root, **settings)
    monkeypatch.undo()
    return writer
