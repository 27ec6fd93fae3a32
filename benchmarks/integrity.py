"""The share of the loader's CPU time that checking every byte takes: `python -m
benchmarks.integrity FOLDER_OF_SHARDS`.

The time in crc32 and in the check of the header is divided by the time that batches of 4 x 224 +
2 x 96 views take in one process, from the page cache. Reading the clock counts as checking.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from statistics import median
from time import process_time
from unittest.mock import patch

import cv2
import torch

from benchmarks.rows import HEAD, Row, spread
from scaletrain.config.schema import DataConfig, View
from scaletrain.data.format.tar import header_fault
from scaletrain.data.loading.dataset import Failure, Images
from scaletrain.data.reading.reader import Shards
from scaletrain.data.sampling.plan import Plan

PAIRS, STEPS, ROWS, LIMIT = 9, 4, 16, 0.03


class Timed:
    """Wraps a function and sums the CPU seconds spent in it."""

    def __init__(self, function: object) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, data: bytes) -> object:
        begin = process_time()
        result = self.function(data)  # type: ignore[operator]
        self.seconds += process_time() - begin
        return result


def rows(folder: str) -> Iterator[Row]:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    views = (View(size=224, count=4), View(size=96, count=2, scale=(0.05, 0.14)))
    shards = Shards(folder)
    plan = Plan(shards.counts, seed=0, batch=ROWS, lanes=ROWS, window=16)
    dataset = Images(DataConfig(path=folder, views=views), shards, plan, 0, ROWS)

    def seconds() -> float:
        begin = process_time()
        for step in range(min(STEPS, plan.steps_per_epoch)):
            if isinstance(batch := dataset[(0, step)], Failure):
                raise batch.error
        return process_time() - begin

    seconds()  # opens files, fills tables and caches
    shares, totals = [], []
    for _ in range(PAIRS):
        crc, header = Timed(zlib.crc32), Timed(header_fault)
        with (
            patch("scaletrain.data.reading.reader.zlib.crc32", crc),
            patch("scaletrain.data.reading.reader.header_fault", header),
        ):
            total = seconds()

        shares.append((crc.seconds + header.seconds) / total)
        totals.append(total)

    images = ROWS * min(STEPS, plan.steps_per_epoch)
    yield Row(
        "integrity checks, of the loader's CPU time",
        f"{1000 * median(totals) / images:.2f} ms/image in all",
        "-",
        "-",
        spread(shares, ".2%"),
        f"{LIMIT:.0%}",
        median(shares) <= LIMIT,
    )


if __name__ == "__main__":
    print(HEAD, *rows(sys.argv[1]), sep="\n")
