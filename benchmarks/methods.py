"""Does every method learn? Each CIFAR-10 recipe's method in one small set-up, and kNN after the
last epoch of a small budget.

    python -m benchmarks.methods IMAGES WORK

IMAGES holds train/CLASS/*.jpg and test/CLASS/*.jpg.

Prints the table of benchmarks/RESULTS.md, best first. Network, views and optimizer are
simclr_cifar10.yaml's; method and auxiliaries the recipes'; what a run of minutes must change in
them stands in methods.yaml. It checks that learning works and ranks nothing: the budget and the
common set-up suit some methods better than others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cifar10 import HERE, score
from scaletrain.config import recipe

CONFIGS = HERE.parent / "configs"
LABELS = "labels.json"
PARTS = ("method", "auxiliaries")


def main(
    images: Path,
    work: Path,
    only: Annotated[
        list[str] | None, typer.Option(help="These recipes, such as byol_rotation.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Trainings at once; they share the cores.")] = 2,
    per_class: Annotated[
        int, typer.Option(help="Training images of each class; a fifth of it are tested.")
    ] = 1000,
) -> None:
    """Train and judge; what WORK holds already is not trained again. Exit code 1 if a training
    failed.
    """
    settings = recipe.read(HERE / "methods.yaml")
    recipes = {
        path.stem.removesuffix("_r18_cifar10") for path in CONFIGS.glob("*_r18_cifar10.yaml")
    }

    if strange := settings.keys() - {"all"} - recipes:
        raise typer.BadParameter(
            f"benchmarks/methods.yaml has settings for {', '.join(sorted(strange))}, but configs/ "
            "has no such recipe"
        )

    shards = write_shards(images, work, per_class)

    threads = max(1, (os.cpu_count() or 1) // jobs)

    def check(name: str) -> tuple[float, str]:
        """What sorts it, and its row."""
        changes = {**settings["all"], **settings.get(name, {})}
        if not train(name, changes, shards, work / name, threads):
            return 0, f"| {name} | failed: {work / name}.log | | |"

        trained, untrained = (
            score(work / name, shards, "trained"),
            score(work / name, shards, "untrained"),
        )
        pairs = (
            f"{after:.1f} ({before:.1f})" for after, before in zip(trained, untrained, strict=True)
        )
        row = f"| {name} | {' | '.join(pairs)} | {changes['epochs']} |"

        typer.echo(row, err=True)
        return trained[1], row

    names = only or sorted(recipes)
    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(check, names))

    pixels = score(work / names[0], shards, "pixels")
    rows.append((pixels[1], f"| raw pixels | {' | '.join(f'{value:.1f}' for value in pixels)} | |"))
    typer.echo(
        "| recipe | kNN k=200 T=.1 (untrained) | kNN k=20 T=.07 (untrained) | epochs "
        "|\n|---|---|---|---|"
    )

    for _, row in sorted(rows, reverse=True):
        typer.echo(row)

    if any(not found for found, _ in rows):
        raise typer.Exit(1)


def write_shards(images: Path, work: Path, per_class: int) -> Path:
    """The first images of each class, and a label file of a tenth of those that train."""
    shards = work / "shards"
    if not (shards / LABELS).exists():
        for split, count in (("train", per_class), ("test", per_class // 5)):
            for folder in sorted((images / split).iterdir()):
                chosen = work / "images" / split / folder.name
                chosen.mkdir(parents=True, exist_ok=True)
                for image in sorted(folder.iterdir())[:count]:
                    (chosen / image.name).symlink_to(image.resolve())

        run("cifar10.py", work / "images", shards)
        run("subset.py", shards / "train", shards / LABELS, "--share", "10")

    return shards


def run(script: str, *arguments: Path | str) -> None:
    subprocess.run(
        [sys.executable, HERE.parent / "shards" / script, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def train(name: str, settings: dict[str, Any], shards: Path, folder: Path, threads: int) -> bool:
    """Whether it went well; settings are overrides."""
    published = recipe.read(CONFIGS / f"{name}_r18_cifar10.yaml")
    raw = {
        "base": str(HERE / "simclr_cifar10.yaml"),
        **{key: published[key] for key in PARTS if key in published},
    }

    if "suncet" in name:
        raw["data"] = {"support": {**published["data"]["support"], "labels": str(shards / LABELS)}}

    written = folder.with_suffix(".yaml")
    written.write_text(json.dumps(raw))
    command = [sys.executable, "-m", "scaletrain", "train", str(written), "--run", str(folder)]
    command += [
        f"{field}={value}" for field, value in {"data.path": shards / "train", **settings}.items()
    ]

    with folder.with_suffix(".log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        return not subprocess.run(command, stdout=log, stderr=log, env=environment).returncode


if __name__ == "__main__":
    typer.run(main)
