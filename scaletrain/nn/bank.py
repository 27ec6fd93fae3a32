"""Memories of embeddings: a FIFO queue that every rank holds, and a bank with one row per sample, sharded by sample index."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scaletrain import dist
from scaletrain.core import Staged


class Queue(Staged):
    """The last `size` rows of the global batches in their order, identical on every rank. [size, dim], zeros until written."""

    rows: Tensor
    written: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # rows since the start
        self.staged: Tensor | None = None

    def push(self, rows: Tensor) -> None:
        """Stage this rank's rows [b, dim]; after the step the whole global batch replaces the oldest rows."""
        self.staged = rows.detach()

    @property
    def full(self) -> bool:
        return bool(self.written >= len(self.rows))

    @torch.no_grad()
    def commit(self, parts: int = 1) -> None:
        if self.staged is None:
            return
        new = dist.gather_nograd(self.staged).to(self.rows.dtype)[-len(self.rows) :]
        where = (self.written + torch.arange(len(new), device=new.device)) % len(self.rows)
        self.rows.index_copy_(0, where, new)
        self.written.add_(len(new))
        self.staged = None

    def discard(self) -> None:
        self.staged = None


class Bank(Staged):
    """One row per sample of the data set. A rank owns the rows of a contiguous range of sample indices, whoever saw them."""

    rows: Tensor

    def __init__(self, samples: int, dim: int, *, fill: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.samples = samples
        self.start = dist.rank() * samples // dist.world()
        stop = (dist.rank() + 1) * samples // dist.world()
        self.register_buffer("rows", torch.full((stop - self.start, dim), fill, dtype=dtype))
        self.staged: list[tuple[Tensor, Tensor]] = []

    def sharded(self) -> Mapping[str, tuple[int, int]]:
        return {"rows": (self.start, self.samples)}

    def stage(self, index: Tensor, rows: Tensor) -> None:
        """index [b] int64, rows [b, dim]: this rank's samples; written to their owners after the step."""
        self.staged.append((index, rows.detach()))

    @torch.no_grad()
    def write(self, index: Tensor, rows: Tensor) -> None:
        """Write now; all ranks call it together with equally many rows."""
        index, rows = dist.gather_nograd(index), dist.gather_nograd(rows.to(self.rows.dtype))
        owned = (index >= self.start) & (index < self.start + len(self.rows))
        self.rows[index[owned] - self.start] = rows[owned]

    @torch.no_grad()
    def read(self, index: Tensor) -> Tensor:
        """[b] int64 -> [b, dim]: the rows of this rank's samples, from whoever owns them. All ranks call it together."""
        wanted = dist.gather_nograd(index)
        owned = (wanted >= self.start) & (wanted < self.start + len(self.rows))
        out = self.rows.new_zeros(len(wanted), self.rows.shape[1])
        out[owned] = self.rows[wanted[owned] - self.start]
        return dist.mine(dist.sum_nograd(out))

    def commit(self, parts: int = 1) -> None:
        for index, rows in self.staged:
            self.write(index, rows)
        self.staged.clear()

    def discard(self) -> None:
        self.staged.clear()
