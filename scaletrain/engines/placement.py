"""Where named tensors lie on a rank, and how a checkpoint is written from there and read back,
whatever the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scaletrain import dist
from scaletrain.core import Piece


class TrainingError(ValueError):
    """Training cannot go on; the text says why and what to look at."""


class Saved(Protocol):
    """A checkpoint to restore from, whatever engine and world size wrote it."""

    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Shard:
    """What this rank holds of a named tensor: elements [start, start + numel) of the whole in
    row-major order.

    `tensor` may have any shape and memory layout of so many elements, and none at all where nothing
    lies here. Of the `copies` ranks that hold this same range it is number `copy`: one of them
    writes it to a checkpoint.
    """

    tensor: Tensor
    start: int
    # of the whole
    shape: tuple[int, ...]
    copy: int = 0
    copies: int = 1

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()

    @torch.no_grad()
    def fill(self, part: Tensor) -> None:
        """Write this rank's elements, given in their order."""
        self.tensor.copy_(part.view(self.tensor.shape))


def replica(tensor: Tensor) -> Shard:
    """What every rank holds in full."""
    return Shard(tensor, 0, tuple(tensor.shape), dist.rank(), dist.world())


def rows_of(tensor: Tensor, start: int, rows: int) -> Shard:
    """What holds its rows from `start` on of a whole of so many."""
    width = tensor[0].numel() if len(tensor) else 1
    return Shard(tensor, start * width, (rows, *tensor.shape[1:]))


@torch.no_grad()
def whole(shard: Shard) -> Tensor:
    """The whole tensor on every rank. All ranks call it together."""
    flat = shard.tensor.new_zeros(torch.Size(shard.shape).numel())
    # the other ranks add zeros there, which is exact
    if shard.copy == 0:
        flat[shard.start : shard.stop] = shard.tensor.reshape(-1)

    return dist.sum_nograd(flat).view(shard.shape)


def pieces(placed: Mapping[str, Shard]) -> dict[str, Piece]:
    """What this rank writes to a checkpoint; over all ranks the pieces tile every tensor
    exactly.
    """
    size = {
        name: torch.Size(shard.shape).numel() * shard.tensor.itemsize
        for name, shard in placed.items()
    }
    total, seen, found = max(1, sum(size.values())), 0, {}

    # copies are written once, each by one rank, evenly by bytes
    for name, shard in placed.items():
        if seen * shard.copies // total == shard.copy:
            found[name] = Piece(shard.tensor.detach().reshape(-1), shard.start, shard.shape)
        seen += size[name]

    return found


def fill(placed: Mapping[str, Shard], saved: Saved) -> None:
    """Read everything from a checkpoint of the same tensors. Raises TrainingError for one of
    others.
    """
    there = set(saved.names())

    for name, shard in placed.items():
        if name not in there or tuple(saved.shape(name)) != shard.shape:
            what = f"has shape {tuple(saved.shape(name))}" if name in there else "is missing"
            raise TrainingError(
                f"this checkpoint belongs to another model: {name} {what} and must have shape "
                f"{shard.shape}"
            )

        if shard.tensor.numel():
            shard.fill(saved.read(name, shard.start, shard.stop))

    if extra := sorted(there - set(placed)):
        raise TrainingError(
            f"this checkpoint belongs to another model: it also holds {', '.join(extra[:3])}"
        )
