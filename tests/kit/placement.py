"""What several ranks would write to a checkpoint, in memory, to restore from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scaletrain.core import Piece


class Written:
    """The pieces of all ranks put together. Every element must have been written exactly once."""

    def __init__(self, parts: Sequence[Mapping[str, Piece]]) -> None:
        self.shapes = {name: piece.shape for part in parts for name, piece in part.items()}
        self.flat: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            pieces = sorted(
                (p[name] for p in parts if name in p and len(p[name].data)),
                key=lambda piece: piece.start,
            )
            ends = [0, *(piece.start + len(piece.data) for piece in pieces)]
            assert [piece.start for piece in pieces] == ends[:-1], f"{name} is not tiled"
            assert ends[-1] == torch.Size(shape).numel()
            self.flat[name] = (
                torch.cat([piece.data for piece in pieces]) if pieces else torch.empty(0)
            )

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.flat[name][start:stop]
