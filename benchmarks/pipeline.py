"""A pipeline on real images, from one command: pretraining by rotation, fine-tuning on 10 % of the
labels, evaluation. It runs once undisturbed and once killed in three of its stages; both must end
with the same bits.

    python -m benchmarks.pipeline IMAGES WORK

IMAGES holds train/CLASS/*.jpg and test/CLASS/*.jpg of CIFAR-10. Prints a line for each kill and the
comparison; the exit code is 1 where anything differs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

from scaletrain.checkpoint import reader
from scaletrain.train import records

PIPELINE = "rotation_finetune_cifar10"
# a quarter of the width and a few hundred steps: minutes on two cores
CHANGES = (
    *(f"{stage}.model.width=0.25" for stage in ("pretrain", "finetune")),
    *(f"{stage}.data.workers=1" for stage in ("pretrain", "finetune")),
    *(f"{stage}.monitor.every=1" for stage in ("pretrain", "finetune")),
    *(f"{stage}.checkpoint.every_steps=20" for stage in ("pretrain", "finetune")),
    "pretrain.steps=150",
    "pretrain.optim.schedule=cosine",
    "pretrain.optim.milestones=[]",
    "finetune.steps=100",
)


def main(images: Path, work: Path) -> None:
    """Write shards, run the pipeline undisturbed and killed, compare."""
    for split in ("train", "test"):
        if not (work / "shards" / split).exists():
            source, target = images / split, work / "shards" / split
            subprocess.run(
                [sys.executable, "-m", "scaletrain", "shards", "folder", source, target], check=True
            )

    undisturbed, killed = work / "undisturbed", work / "killed"
    before = time.monotonic()
    if code := _start(work, undisturbed).wait():
        raise SystemExit(code)
    print(f"undisturbed: {time.monotonic() - before:.0f} s")

    _kill(work, killed, "pretrain", lambda: _steps(killed / "pretrain") >= 50)
    _kill(work, killed, "finetune", lambda: _steps(killed / "finetune") >= 50)
    _kill(work, killed, "scores", (killed / ".scores.partial").exists)
    if code := _start(work, killed).wait():
        raise SystemExit(code)

    differing = [
        *(f"{run}: {name}" for run in ("pretrain", "finetune") for name in _differing(work, run)),
        *([] if _scores(undisturbed) == _scores(killed) else ["scores"]),
    ]
    for metrics in _scores(undisturbed):
        print(", ".join(f"{name} {value:.2f}" for name, value in sorted(metrics.items())))

    print(f"different after three kills: {differing or 'nothing'}")
    raise SystemExit(1 if differing else 0)


def _start(work: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "scaletrain", "pipeline", PIPELINE, "--work", str(folder)]
    options = ["--procs", "2", f"data={work / 'shards' / 'train'}"]
    log = (work / f"{folder.name}.log").open("a")
    return subprocess.Popen(
        [*command, *options, *CHANGES], stdout=log, stderr=log, start_new_session=True
    )


def _kill(work: Path, folder: Path, stage: str, when: Callable[[], object]) -> None:
    """Start the pipeline and kill every process of it once `when` is true."""
    process = _start(work, folder)
    while not when():
        if process.poll() is not None:
            raise SystemExit(f"error: it ended before it could be killed in {stage}")
        time.sleep(0.01)

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    print(f"killed in {stage}")


def _steps(run: Path) -> int:
    return len(records.read(run).steps)


def _differing(work: Path, run: str) -> list[str]:
    """Names of the tensors that are not the same in both newest checkpoints of a run."""
    pair = [reader.latest(work / kind / run / "checkpoints") for kind in ("undisturbed", "killed")]
    one, two = pair
    assert one is not None
    assert two is not None
    if one.step != two.step or one.names() != two.names():
        return [f"step {one.step} and step {two.step}, or their names"]

    return [name for name in sorted(one.names()) if not torch.equal(one.read(name), two.read(name))]


def _scores(folder: Path) -> list[dict[str, Any]]:
    results = json.loads((folder / "scores" / "results.json").read_text())
    return [result["metrics"] for result in results]


if __name__ == "__main__":
    typer.run(main)
