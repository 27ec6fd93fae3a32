"""Encodes a data set part by part: into memory, or into the store, which one process or job at a
time fills, all its ranks together, with what is missing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor

from scaletrain import dist
from scaletrain.core import Batch
from scaletrain.evals.errors import EvalError
from scaletrain.evals.store import ROWS, Entry, Layout, Stored
from scaletrain.runtime.signals import note_progress

T = TypeVar("T")
# Number of a range [lo, hi) of samples, its features [hi - lo, D] float32, which are 0 where a
# sample is left out, and why it is, by sample.
Part = tuple[int, Tensor, Mapping[int, str]]
# The ranges and the width of features -> each part in turn.
EncodeParts = Callable[[Sequence[tuple[int, int]], int], Iterator[Part]]
# Seconds between two attempts to encode what another process encodes.
POLL = 0.5


def by_part(
    batches: Iterator[Batch],
    parts: Sequence[tuple[int, int]],
    size: int,
    width: int,
    forward: Callable[[Batch], Tensor],
    left_out: Mapping[int, str],
    path: str,
) -> Iterator[Part]:
    """Encode batches of `size`, as eval_batches gives them for these ranges of the samples of
    `path`. What it leaves out is in `left_out` once the batch is there.
    """
    for number, (lo, hi) in enumerate(parts):
        x = torch.zeros(hi - lo, width)

        for at in range(lo, hi, size):
            batch = next(batches)
            index = batch.index.cpu()
            due = [n for n in range(at, min(at + size, hi)) if n not in left_out]
            if index.tolist() != due:
                raise EvalError(
                    f"{path}: the stream gave samples {index.tolist()[:3]} .. where {due[:3]} .. "
                    "were due"
                )
            if due:
                x[index - lo] = forward(batch).cpu()

        yield number, x, {n: left_out[n] for n in range(lo, hi) if n in left_out}


def in_memory(encode: EncodeParts, samples: int, width: int) -> Stored:
    """Encode all samples without the store."""
    x, left_out = torch.empty(samples, width), dict[int, str]()
    parts = [(lo, min(lo + ROWS, samples)) for lo in range(0, samples, ROWS)]
    # filled in place: a list and its concatenation would need twice the memory
    for number, part, bad in encode(parts, width):
        x[slice(*parts[number])] = part
        left_out |= bad

    return Stored(x, left_out)


def fill(
    entry: Entry,
    encode: EncodeParts,
    *,
    width: Callable[[], int],
    rows: int,
    skip: bool,
    rank: int = 0,
    world: int = 1,
) -> Stored | None:
    """Encode what is missing, and open the entry: on rank 0, the others get None.

    `width`: of the features, called only where nothing is stored yet. rows, skip: as in Entry. All
    `world` ranks must call it; an error of one is raised on all.
    """
    with ExitStack() as held:
        stored = on_main(lambda: entry.read(skip) is not None, world)
        if not stored:
            _wait(entry, held, world)
            layout, missing = on_main(lambda: entry.begin(width, rows, skip, world), world)
            mine = missing[rank * len(missing) // world : (rank + 1) * len(missing) // world]
            together(lambda: _write(entry, layout, mine, encode, rank), world)

        return _opened(entry, skip, world)


def _wait(entry: Entry, held: ExitStack, world: int) -> None:
    """Return once rank 0 has the right to encode, which lasts as long as `held`."""

    def mine() -> bool:
        with ExitStack() as attempt:
            if attempt.enter_context(entry.encoding()):
                held.push(attempt.pop_all())
                return True
            return False

    if on_main(mine, world):
        return

    if dist.main():
        print(f"waiting for another process that encodes {entry.folder}", file=sys.stderr)
    while not on_main(mine, world):
        time.sleep(POLL)


def _write(
    entry: Entry, layout: Layout, chunks: Sequence[int], encode: EncodeParts, rank: int
) -> None:
    parts = [layout.part(chunk) for chunk in chunks]
    for number, x, left_out in encode(parts, layout.width):
        entry.write(layout, chunks[number], x, left_out, rank)
        if rank == 0:
            note_progress(f"chunk {chunks[number]} of {entry.folder.name}")


def _opened(entry: Entry, skip: bool, world: int) -> Stored | None:
    found: list[Stored] = []

    def read() -> None:
        stored = entry.read(skip)
        if stored is None:
            raise EvalError(
                f"{entry.folder} does not hold what was just written to it; is its disk damaged?"
            )
        found.append(stored)

    on_main(read, world)
    return found[0] if found else None


def on_main(action: Callable[[], T], world: int) -> T:
    """The action's small value on rank 0, on all of `world` ranks; or its error."""
    if world == 1:
        return action()

    value, failed = dist.broadcast_object(_tried(action) if dist.main() else None)
    if failed is not None:
        raise failed
    return value  # type: ignore[no-any-return]


def together(action: Callable[[], None], world: int) -> None:
    """Run the action on every rank; the first error of a rank is raised on all of them."""
    if world == 1:
        action()
        return

    for _, failed in dist.gather_objects(_tried(action)):
        if failed is not None:
            raise failed


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error
