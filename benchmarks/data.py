"""Benchmarks the data pipeline and writes the table benchmarks/DATA.md: `make bench SHARDS=FOLDER`.

FOLDER: shards of real photographs of about 110 KB, as shards/folder.py or shards/imagenet.py write
them. The two peers (lightly and albumentations on webdataset) are installed in folders of their
own. Nothing else should run on the machine at the same time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import integrity, loader, mixing, plan
from benchmarks.rows import HEAD, machine, versions

HERE = Path(__file__).parent


def main(
    shards: Annotated[
        Path,
        typer.Argument(exists=True, file_okay=False, help="A folder of shards of photographs."),
    ],
    lightly: Annotated[str, typer.Option(help="Folder into which pip --target installed it.")],
    albumentations: Annotated[
        str, typer.Option(help="Folder into which pip --target installed it.")
    ],
    pairs: int = 5,
    batches: Annotated[
        int, typer.Option(help="Measured batches of 32 images in each run of the loader.")
    ] = 16,
    out: Annotated[Path, typer.Option(help="File for the table.")] = HERE / "DATA.md",
) -> None:
    """Measure, print each row when it is complete, and write the table. Exit code 1 if a target is
    missed.
    """
    rows, load = [], os.getloadavg()[0]
    print(HEAD, flush=True)

    for source in (
        loader.rows(shards, lightly, albumentations, pairs, batches),
        integrity.rows(str(shards)),
        plan.rows(),
        mixing.rows(),
    ):
        for row in source:
            print(row, flush=True)
            rows.append(row)

    names = (
        "torch",
        "torchvision",
        "opencv-python-headless",
        "numba",
        "webdataset",
        "lightly",
        "albumentations",
    )

    stages = [f"- antialias {wanted}: {loader.stages(shards, wanted)}" for wanted in (True, False)]
    text = [
        "# The data plane, measured",
        "",
        f"By `make bench SHARDS=FOLDER` on {machine()}, load {load:.1f} before it began;",
        f"{versions(names, (lightly, albumentations))}.",
        "What each part counts, and how, stands in its head: [loader](loader.py), "
        "[integrity](integrity.py), [plan](plan.py),",
        f"[mixing](mixing.py). Times are CPU time. Ratio: the peer's by ours, {pairs} pairs of "
        f"{batches} batches, alternating.",
        "",
        HEAD,
        *map(str, rows),
        "",
        "Stages of a source image's 4 x 224 + 2 x 96 views in one process, ms of CPU (the floor: "
        "decoding and resizing alone):",
        "",
        *stages,
    ]

    out.write_text("\n".join(text) + "\n")
    print("\n".join(stages), f"wrote {out}", sep="\n")
    raise typer.Exit(int(not all(row.met for row in rows)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
