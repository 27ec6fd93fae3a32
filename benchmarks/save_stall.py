"""How long a step waits for a checkpoint: `python benchmarks/save_stall.py [FOLDER]`, FOLDER on the
disk to be measured.

The whole state (parameters, targets, momentum, statistics) of BYOL on a ResNet-50 in one process.
Each repeat saves it three ways, in turning order: ours, of which training waits only for the copy
to host memory; ours awaited, so a synchronous save of the same files; and torch.save to one file
that is flushed to disk. Prints a table row: medians and ranges in milliseconds. Without an
accelerator, hashing and writing then share the processor with the next steps; that is not counted.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from scaletrain.checkpoint.writer import Writer
from scaletrain.config import load
from scaletrain.core import Batch, Clock
from scaletrain.engines.base import Engine
from scaletrain.train.build import build

REPEATS, ROWS, PIXELS = 7, 4, 64
RECIPE = Path(__file__).parents[1] / "configs" / "byol_r50_in1k.yaml"


def trained() -> Engine:
    """An engine after one step, when the optimizer has its state too."""
    config = load.load(RECIPE, [f"batch={ROWS}", "data.path=synthetic"])
    engine = build(config, ROWS, 1, torch.device("cpu"))
    views, index = torch.randn(2, ROWS, 3, PIXELS, PIXELS), torch.arange(ROWS)
    engine.step(
        Batch((views,), index, index, torch.tensor([[-2.0] * 3, [2.0] * 3])),
        Clock(0, 10, 0, 1),
        0.1,
        0.1,
    )

    return engine


def ours(engine: Engine, writer: Writer, step: int) -> tuple[float, float]:
    """Seconds until training may go on, and until the step is on disk."""
    begin = time.perf_counter()
    writer.save(step, engine.state(), {})
    free = time.perf_counter()
    writer.wait()

    return free - begin, time.perf_counter() - begin


def plain(engine: Engine, path: Path) -> float:
    """Seconds of torch.save and the flush to disk."""
    begin = time.perf_counter()
    with path.open("wb") as file:
        torch.save({name: piece.data for name, piece in engine.state().items()}, file)
        file.flush()
        os.fsync(file.fileno())

    return time.perf_counter() - begin


def cell(seconds: list[float]) -> str:
    low, middle, high = (1000 * s for s in (min(seconds), median(seconds), max(seconds)))
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def main(folder: str | None = None) -> None:
    engine = trained()
    copied = sum(piece.data.nbytes for piece in engine.state().values())
    with tempfile.TemporaryDirectory(dir=folder) as made:
        root = Path(made)
        writer = Writer(root / "ours", keep_last=1)
        first, _ = ours(engine, writer, 0)  # makes the host memory that later saves use again
        stalls, awaited, others = [], [], []

        for repeat in range(1, REPEATS + 1):
            for turn in sorted(range(3), key=lambda t: (t + repeat) % 3):
                if turn == 0:
                    stalls.append(ours(engine, writer, 3 * repeat)[0])
                elif turn == 1:
                    awaited.append(ours(engine, writer, 3 * repeat + 1)[1])
                else:
                    others.append(plain(engine, root / "plain.pt"))

        writer.close()

    ratio = median(a / s for a, s in zip(awaited, stalls, strict=True))
    print(
        "| bytes copied | first save, ms | later saves, ms | the same awaited, ms | torch.save, ms "
        "| awaited / stall |"
    )
    print("|---|---|---|---|---|---|")
    print(
        f"| {copied:,} | {1000 * first:,.0f} | {cell(stalls)} | {cell(awaited)} | {cell(others)} | "
        f"{ratio:.1f} |"
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
