"""The reference run: CIFAR-10 images to an evaluated encoder, killed in the middle and resumed, kNN
at every epoch.

    python benchmarks/cifar10.py IMAGES WORK

IMAGES holds train/CLASS/*.jpg and test/CLASS/*.jpg.

Prints the table of benchmarks/RESULTS.md: kNN of the raw pixels, the untrained encoder and each
epoch, seconds per epoch.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import typer

from scaletrain.config import load
from scaletrain.data.reading.reader import Shards
from scaletrain.evals import run as evals
from scaletrain.evals.encoders.targets import EncoderKind
from scaletrain.train import records

HERE = Path(__file__).parent
SETTINGS = ((200, 0.1), (20, 0.07))  # (k, temperature)


def main(
    images: Path,
    work: Path,
    recipe: Path = HERE / "simclr_cifar10.yaml",
    overrides: list[str] | None = None,
) -> None:
    """Write shards, train with one kill -9 in mid-epoch, judge every epoch."""
    shards, run = work / "shards", work / "run"
    if not (shards / "train").exists():
        subprocess.run(
            [sys.executable, str(HERE.parent / "shards" / "cifar10.py"), str(images), str(shards)],
            check=True,
        )

    settings = [f"data.path={shards / 'train'}", *(overrides or [])]
    samples = len(Shards(shards / "train"))
    recipe_config = load.load(recipe, settings)
    per_epoch = samples // recipe_config.batch
    settings += [f"checkpoint.keep_every={per_epoch}"]
    command = [
        sys.executable,
        "-m",
        "scaletrain",
        "train",
        str(recipe),
        *settings,
        "--run",
        str(run),
    ]

    begun = time.monotonic()
    train_and_kill(command, run, round((recipe_config.epochs / 2 + 0.4) * per_epoch))
    subprocess.run(command, check=True)
    typer.echo(
        f"training took {time.monotonic() - begun:.0f} s, start-up and the repeated part of an "
        "epoch included"
    )
    typer.echo(
        "| epoch | "
        + " | ".join(f"kNN k={k} T={t}" for k, t in SETTINGS)
        + " | training seconds of the epoch |"
    )

    typer.echo("|---|" + "---|" * (len(SETTINGS) + 1))
    baselines: tuple[EncoderKind, ...] = ("pixels", "untrained")
    for name in baselines:
        show(name, score(run, shards, name), "")

    seconds = seconds_per_epoch(run)
    for folder in sorted((run / "checkpoints").glob("step-*")):
        epoch = int(folder.name.removeprefix("step-")) // per_epoch
        show(
            str(epoch),
            score(folder, shards, "trained"),
            f"{seconds.get(epoch - 1, float('nan')):.0f}",
        )


def train_and_kill(command: list[str], run: Path, step: int) -> None:
    """Start training and kill it without warning when it has recorded `step`."""
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            if any(m["step"] >= step for m in metrics(run)):
                process.send_signal(signal.SIGKILL)
            time.sleep(1)


def metrics(run: Path) -> list[dict[str, float]]:
    return [record.model_dump() for record in records.read(run).steps]


def seconds_per_epoch(run: Path) -> dict[int, float]:
    """From the recorded images per second; what was repeated after the kill counts once."""
    rates: dict[int, list[float]] = {}
    for line in metrics(run):
        rates.setdefault(int(line["epoch"]), []).append(1 / line["speed/images_per_second"])

    settings = load.load(run / "config.yaml")
    samples = len(Shards(settings.data.path))
    return {epoch: samples * sum(values) / len(values) for epoch, values in rates.items()}


def score(target: Path, shards: Path, encoder: EncoderKind) -> list[float]:
    scores = []
    for k, t in SETTINGS:
        (result,) = evals.run(
            target,
            ["knn"],
            train=shards / "train",
            test=shards / "test",
            overrides=[f"knn.ks=[{k}]", f"knn.temperature={t}"],
            encoder=encoder,
        )
        scores.append(float(result["metrics"][f"knn_{k}"]))

    return scores


def show(name: str, scores: list[float], seconds: str) -> None:
    typer.echo(f"| {name} | " + " | ".join(f"{s:.1f}" for s in scores) + f" | {seconds} |")


if __name__ == "__main__":
    typer.run(main)
