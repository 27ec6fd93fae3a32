"""Memories of methods: a FIFO queue that is the same on every rank, a bank with one row per sample
that is sharded by sample index, and a single number.

What the micro-batches of a step stage is joined before it is written, in the order of the global
batch, so that neither their number nor that of the ranks changes a memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain import dist, rng
from scaletrain.core import DeferredState


class Queue(DeferredState):
    """The last `size` rows of the global batches in their order, identical on every rank. [size,
    dim].

    Zeros until written, or with `noise` random directions, so that it can be compared with from the
    first step on.
    """

    rows: Tensor
    written: Tensor

    def __init__(self, size: int, dim: int, *, noise: bool = False) -> None:
        super().__init__()
        # Drawn as the parameters are: by every rank alike, from the seed of the run.
        self.register_buffer(
            "rows", F.normalize(torch.randn(size, dim), dim=1) if noise else torch.zeros(size, dim)
        )
        # rows since the start
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        self.staged: list[Tensor] = []

    def push(self, rows: Tensor) -> None:
        """Stage this rank's rows [b, dim]; after the step the whole global batch replaces the
        oldest rows.
        """
        self.staged.append(rows.detach())

    @property
    def full(self) -> bool:
        return bool(self.written >= len(self.rows))

    def age(self, batch: int) -> Tensor:
        """0-d: steps since the oldest row that training wrote, with `batch` rows in each."""
        return self.written.clamp_max(len(self.rows)) / batch

    @torch.no_grad()
    def commit(self, parts: int = 1) -> None:
        calls = len(self.staged) // parts
        for call in range(calls):
            # A rank's micro-batches are consecutive parts of its slice, and the slices of the
            # global batch.
            new = dist.gather_nograd(torch.cat(self.staged[call::calls]))
            where = (self.written + torch.arange(len(new), device=new.device))[
                -len(self.rows) :
            ] % len(self.rows)
            self.rows.index_copy_(0, where, new[-len(self.rows) :].to(self.rows.dtype))
            self.written.add_(len(new))

        self.staged.clear()

    def discard(self) -> None:
        self.staged.clear()


class Once(DeferredState):
    """A number that the first step fixes; 0-d, infinite before."""

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.full((), float("inf")))
        self.staged: Tensor | None = None

    def forward(self, current: Tensor) -> Tensor:
        """Return the number of the first step: within it, `current`."""
        self.staged = torch.where(self.value.isinf(), current.detach(), self.value)
        return self.staged

    @torch.no_grad()
    def commit(self, parts: int = 1) -> None:
        if self.staged is not None:
            self.value.copy_(self.staged)
        self.staged = None

    def discard(self) -> None:
        self.staged = None


class Bank(DeferredState):
    """One row per sample of the data set. A rank owns the rows of a contiguous range of sample
    indices, whoever saw them.
    """

    rows: Tensor

    def __init__(
        self,
        samples: int,
        dim: int,
        *,
        fill: float = 0.0,
        dtype: torch.dtype = torch.float32,
        noise: int | None = None,
    ) -> None:
        """noise: a seed; every row starts as a random unit vector that depends on it and the
        sample's index alone.
        """
        super().__init__()
        self.samples = samples
        self.start = dist.rank() * samples // dist.world()
        stop = (dist.rank() + 1) * samples // dist.world()
        rows = torch.full((stop - self.start, dim), fill, dtype=dtype)

        if noise is not None:
            # the hashes of all rows at once would take much memory
            for part in torch.arange(len(rows)).split(16384):
                rows[part] = F.normalize(
                    rng.uniform(rng.hash64(noise, self.start + part), "bank", dim) * 2 - 1, dim=1
                )

        self.register_buffer("rows", rows)
        self.staged: list[tuple[Tensor, Tensor]] = []

    def sharded(self) -> Mapping[str, tuple[int, int]]:
        return {"rows": (self.start, self.samples)}

    def stage(self, index: Tensor, rows: Tensor) -> None:
        """index [b] int64, rows [b, dim]: this rank's samples; written to their owners after the
        step.
        """
        self.staged.append((index, rows.detach()))

    @torch.no_grad()
    def write(self, index: Tensor, rows: Tensor) -> None:
        """Write now; all ranks call it together, each with as many rows as it has. Of a sample's
        rows the last of the batch stays.
        """
        longest = int(dist.max_nograd(torch.tensor(len(index), device=index.device)))
        lacking = longest - len(index)
        # no rank owns sample -1
        self._write(F.pad(index, (0, lacking), value=-1), F.pad(rows.detach(), (0, 0, 0, lacking)))

    def _write(self, index: Tensor, rows: Tensor) -> None:
        """The same with equally many rows on every rank."""
        index, rows = dist.gather_nograd(index), dist.gather_nograd(rows.to(self.rows.dtype))
        # A batch may hold a sample twice, and which of two rows an indexed write keeps is undefined
        # on some devices.
        order = index.argsort(stable=True)
        ordered = index[order]
        last = torch.ones_like(ordered, dtype=torch.bool)
        last[:-1] = ordered[1:] != ordered[:-1]
        owned = last & self._owned(ordered)

        self.rows[ordered[owned] - self.start] = rows[order[owned]]

    @torch.no_grad()
    def read(self, index: Tensor) -> Tensor:
        """[b] int64 -> [b, dim]: the rows of this rank's samples, from whoever owns them. All ranks
        call it together.
        """
        return dist.mine(self.read_same(dist.gather_nograd(index)))

    @torch.no_grad()
    def read_same(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, dim]: the same samples' rows on every rank. All ranks call it together
        with equal indices.
        """
        owned = self._owned(index)
        out = self.rows.new_zeros(len(index), self.rows.shape[1])
        out[owned] = self.rows[index[owned] - self.start]

        return dist.sum_nograd(out)

    def _owned(self, index: Tensor) -> Tensor:
        return (index >= self.start) & (index < self.start + len(self.rows))

    @torch.no_grad()
    def commit(self, parts: int = 1) -> None:
        calls = len(self.staged) // parts
        for call in range(calls):
            index, rows = zip(*self.staged[call::calls], strict=True)
            self._write(torch.cat(index), torch.cat(rows))
        self.staged.clear()

    def discard(self) -> None:
        self.staged.clear()


def has_banks(method: nn.Module) -> bool:
    """Whether a method keeps a memory of every sample."""
    return any(isinstance(module, Bank) for module in method.modules())
