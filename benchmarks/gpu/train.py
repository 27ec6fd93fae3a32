"""Trains CIFAR-10 recipes for a few minutes and evaluates the encoders with nearest neighbours."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import shards
from benchmarks.gpu.report import Settings, attempt, check, python, say
from benchmarks.gpu.speed import BF16, recipe_row
from scaletrain.train import records

# of an epoch
SAMPLES = 50_000
# seconds of a method besides its training: start, evaluation
OVERHEAD = 40
# asks a run to save and stop, as SLURM does
STOP = signal.SIGUSR2
# first and last value are printed
WATCHED = ("train/loss", "embedding/std_ratio", "embedding/effective_rank", "grad_norm")


class Case(NamedTuple):
    """A method, the batch that its speed is measured with, and its share of the time."""

    method: str
    batch: int
    share: float

    @property
    def recipe(self) -> str:
        return f"{self.method}_r18_cifar10"


CASES = (Case("byol", 256, 0.5), Case("simclr", 512, 0.25), Case("relicv2", 256, 0.25))


def run(settings: Settings) -> None:
    shards.run(settings)
    seconds = settings.seconds - OVERHEAD * len(CASES)
    for case in CASES[:1] if settings.tiny else CASES:
        limit = max(5.0, seconds * case.share)
        attempt(f"train {case.method}", lambda: train(settings, case, limit))  # noqa: B023


def train(settings: Settings, case: Case, limit: float) -> None:
    """One method for at most `limit` seconds, as many epochs as fit."""
    folder = settings.work / f"run-{case.method}"
    data = shards.folder_of(settings, shards.CIFAR10)
    options = [f"data.path={data / 'train'}", f"data.workers={workers(settings)}"]
    if settings.tiny:
        options += ["model.width=0.125", "batch=64", "steps=4", "optim.warmup_epochs=0"]
    else:
        epochs = epochs_within(settings, case, 0.85 * limit)
        options += [BF16, f"epochs={epochs}", f"optim.warmup_epochs={epochs / 10:g}"]

    begin = time.perf_counter()
    words = ["-m", "scaletrain", "train", f"configs/{case.recipe}.yaml", *options]
    code, text = python([*words, "--run", str(folder)], limit + 25, stop=STOP)
    if code not in (0, 128 + STOP):
        raise RuntimeError(f"training ended with {code}: {text.strip().splitlines()[-1:]}")

    curves(case, folder, time.perf_counter() - begin, stopped=code != 0)
    evaluate(settings, case, folder, data / "test", "trained")
    if case == CASES[0]:
        evaluate(settings, case, folder, data / "test", "untrained")


def epochs_within(settings: Settings, case: Case, seconds: float) -> int:
    row = recipe_row(settings, case.recipe, case.batch, 15, BF16)
    epochs = max(1, int(seconds * row.rate / SAMPLES))
    say(f"{case.method}: {row.rate:.0f} images/s without the loader, {epochs} epochs are trained")
    return epochs


def workers(settings: Settings) -> int:
    return 1 if settings.tiny else max(1, len(os.sched_getaffinity(0)) - 2)


def curves(case: Case, folder: Path, seconds: float, *, stopped: bool) -> None:
    """Print how far a run came, what it looked like at its ends, and how fast it was."""
    lines = [record.model_dump() for record in records.read(folder).steps]
    first, last = lines[0], lines[-1]
    ends = {
        key: [round(line[key], 3) for line in (first, last)]
        for key in WATCHED
        if first.get(key) is not None and last.get(key) is not None
    }
    speeds = {
        key: round(value, 1)
        for key, value in last.items()
        if key.startswith(("speed/", "time/", "memory/")) and value is not None
    }

    reached = f"step {last['step'] + 1} reached in {seconds:.0f} s{' (stopped)' if stopped else ''}"
    say(f"{case.method}: {reached}; first and last {ends}; {speeds}")


def evaluate(settings: Settings, case: Case, folder: Path, test: Path, encoder: str) -> None:
    """Print the accuracy of nearest neighbours."""
    words = ["-m", "scaletrain", "eval", str(folder), "knn", "--encoder", encoder]
    words += ["--set", f"features.workers={workers(settings)}", "--set", "features.batch=512"]
    code, _ = python([*words, "--test", str(test)], settings.seconds)

    results = sorted((folder / "evals").glob("knn-*.json"), key=lambda path: path.stat().st_mtime)
    if code or not results:
        check(False, f"eval {case.method} {encoder}: exit code {code}")
        return

    result: dict[str, Any] = json.loads(results[-1].read_text())
    accuracy = {key: round(result["metrics"][key], 2) for key in ("knn_20", "knn_200")}
    say(f"{case.method} {encoder}: kNN {accuracy} % in {result['seconds']:.0f} s")
