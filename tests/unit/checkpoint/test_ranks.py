"""Real process groups: any world size restores what any other wrote, and all ranks take the same
step.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as c10d

from scaletrain.checkpoint.files import CheckpointError
from scaletrain.checkpoint.reader import SavedStep, latest
from scaletrain.checkpoint.writer import Writer
from scaletrain.core import Piece

SIZE = 101


def value(step: int) -> torch.Tensor:
    return torch.arange(SIZE, dtype=torch.float64) + 1000 * step


def save(root: Path, step: int, rank: int = 0, world: int = 1) -> None:
    low, high = rank * SIZE // world, (rank + 1) * SIZE // world
    writer = Writer(root, keep_last=9, timeout=30)
    writer.save(
        step, {"w": Piece(value(step)[low:high], low, (SIZE,))}, {"step": step, "rank": rank}
    )
    writer.close()


def check(saved: SavedStep | None, step: int, rank: int = 0, world: int = 1) -> None:
    assert saved is not None
    assert (saved.step, saved.meta) == (step, {"step": step, "rank": 0})
    low, high = rank * SIZE // world, (rank + 1) * SIZE // world
    assert torch.equal(saved.read("w", low, high), value(step)[low:high])


def grouped(
    rank: int, world: int, store: Path, work: Callable[[int, int], None], log: Path
) -> None:
    torch.set_num_threads(1)  # the thread pool does not survive a fork
    try:
        c10d.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        work(rank, world)
        c10d.destroy_process_group()
    except BaseException:
        log.write_text(traceback.format_exc())
        raise


def on_ranks(world: int, store: Path, work: Callable[[int, int], None]) -> None:
    """Run `work(rank, world)` in real processes joined by gloo; forked, so that torch is imported
    once.
    """
    fork = multiprocessing.get_context("fork")
    logs = [store.with_suffix(f".log{rank}") for rank in range(world)]
    ranks = [
        fork.Process(target=grouped, args=(rank, world, store, work, logs[rank]))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * world, "\n".join(
        log.read_text() for log in logs if log.exists()
    )


def test_any_world_restores_from_any_other(tmp_path: Path) -> None:
    root = tmp_path / "run"

    def work(step: int, rank: int, world: int) -> None:
        if step > 1:
            check(latest(root), step - 1, rank, world)  # written by another world
        save(root, step, rank, world)
        c10d.barrier()  # rank 0 has committed
        check(latest(root), step, rank, world)

    for step, world in enumerate((2, 3, 1, 2), start=1):
        on_ranks(world, tmp_path / f"store{step}", partial(work, step))
        check(latest(root), step)


def test_all_ranks_take_the_same_step(tmp_path: Path) -> None:
    """Only rank 0 hashes; its decision, and its error, reach every rank."""
    root = tmp_path / "run"
    save(root, 1)
    save(root, 2)
    (file,) = (root / "step-00000002").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])

    def work(rank: int, world: int) -> None:
        check(latest(root), 1, rank, world)
        c10d.barrier()
        if rank == 0:
            (root / "step-00000001" / "manifest.json").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"no step in .* is whole"):
            latest(root)
        assert latest(root / "none") is None

    on_ranks(2, tmp_path / "store", work)
