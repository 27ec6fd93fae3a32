"""A small training with labelled data, the fleets that follow it on a cluster, and what they must
leave.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kit import evals, pipelines, ranks
from kit.slurm_cluster import Cluster
from scaletrain.checkpoint import reader
from scaletrain.evals import results
from scaletrain.evals.request import Request
from scaletrain.evals.run import Evaluation

ROOT = Path(__file__).parents[2]
SETTINGS = ("features.workers=0", "linear.augment=false", "linear.epochs=2")


@dataclass(frozen=True)
class Scene:
    """A recipe that saves at `steps`, and the benchmarks of its evaluation."""

    recipe: Path
    steps: tuple[int, ...]
    benchmarks: tuple[str, ...]

    def fleet(
        self, cluster: Cluster, run: Path, log: Path, *options: str
    ) -> subprocess.Popen[bytes]:
        """Start a fleet that follows."""
        command = [
            *(sys.executable, str(ROOT / "launchers" / "fleet.py"), str(run)),
            *("--benchmarks", ",".join(self.benchmarks), "--follow", "--interval", "1"),
            *("--cpus-per-task", "1", *options, *_set(self.benchmarks)),
        ]
        with log.open("ab") as out:
            return subprocess.Popen(command, env=cluster.env, stdout=out, stderr=out)

    def undisturbed(self, run: Path) -> dict[str, dict[str, float]]:
        """Train and evaluate without a cluster: metrics by the name of the result."""
        ranks.train(1, self.recipe, run)
        overrides = [one for one in SETTINGS if _concerns(one, self.benchmarks)]
        wanted = Request(self.benchmarks, overrides=tuple(overrides))
        for step in self.steps:
            evaluation = Evaluation(run / "checkpoints" / f"step-{step:08d}", wanted)
            for name in self.benchmarks:
                evaluation.result(name, notice=lambda text: None)

        return metrics(run)


def prepare(folder: Path, steps: int, every: int, benchmarks: Sequence[str]) -> Scene:
    """Write the data and the recipe."""
    train = evals.shards(folder / "train", [n % 6 for n in range(48)])
    evals.shards(folder / "test", [n % 6 for n in range(24)], seed=1)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        pipelines.RECIPE.replace("steps: 6", f"steps: {steps}")
        .replace("every_steps: 2", f"every_steps: {every}")
        .replace("data: {", f"data: {{path: '{train}', ")
    )
    return Scene(recipe, tuple(range(every, steps + 1, every)), tuple(benchmarks))


def metrics(run: Path) -> dict[str, dict[str, float]]:
    """Of all results of a run, by their names; each is read with its checks."""
    matches = {path.stem: results.parse(path)[0] for path in (run / "evals").glob("*.json")}
    assert all((run / "evals" / f"{name}.npz").is_file() for name in matches)
    return {name: result.metrics for name, result in matches.items()}


def curves(run: Path) -> dict[str, list[int]]:
    """The steps of the main metric of each curve in TensorBoard, by benchmark."""
    matches = {}
    for folder in (run / "tensorboard" / "evals").iterdir():
        board = EventAccumulator(str(folder))
        board.Reload()
        name = folder.name.partition("@")[0]
        tag = next(tag for tag in board.Tags()["scalars"] if tag.startswith(f"eval/{name}"))
        matches[name] = [event.step for event in board.Scalars(tag)]
    return matches


def measured(run: Path) -> Counter[str]:
    """How often each result was measured, by what its jobs said."""
    texts = [path.read_text() for path in (run / "evals" / "launches").glob("*/*_0_log.out")]
    return Counter(
        Path(path).stem
        for text in texts
        if "measured before" not in text
        for path in re.findall(r"^result: (\S+)$", text, re.MULTILINE)
    )


def errors(run: Path) -> list[str]:
    """What jobs have complained of, besides that they were killed."""
    bad = [line for line in log(run).splitlines() if line.startswith(("error: ", "Traceback"))]
    return [line for line in bad if not re.match(r"error: [\d_]+ failed ", line)]


def equal(run: Path, other: Path) -> bool:
    """Whether two runs have saved the same bits last."""
    a, b = pipelines.tensors(run), pipelines.tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def running(cluster: Cluster, run: Path) -> list[str]:
    """The evaluations of a run at work, as the numbers that their processes know."""
    lines = cluster.run("squeue -h -r -t running -o %A|%k").splitlines()
    return [line.split("|")[0] for line in lines if line.partition("|")[2].startswith(f"{run}#")]


def log(run: Path) -> str:
    """What all jobs have said."""
    logs = sorted((run / "evals" / "launches").glob("*/*_log.*"))
    return "".join(path.read_text(errors="replace") for path in logs)


def evaluating(cluster: Cluster, job: str) -> list[int]:
    """The processes of a job that evaluate."""
    return commands(cluster, job, "eval")


def commands(cluster: Cluster, job: str, command: str) -> list[int]:
    """The processes of a job that run a command of scaletrain."""
    mark, matches = f"\0scaletrain\0{command}\0".encode(), []
    for pid in processes(cluster, job):
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{pid}/cmdline").read_bytes():
                matches.append(pid)
    return matches


def saved(run: Path) -> list[int]:
    """The steps that are on disk."""
    return [step for step, whole in reader.steps(run / "checkpoints").items() if whole]


def processes(cluster: Cluster, job: str) -> list[int]:
    """All processes of a job, its batch script among them."""
    mark, matches = f"SLURM_JOB_ID={job}".encode(), []
    for pid in cluster.processes():
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                matches.append(pid)
    return matches


def kill(pids: Sequence[int]) -> bool:
    """Kill processes; whether there was any."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return bool(pids)


def _concerns(override: str, benchmarks: Sequence[str]) -> bool:
    return override.partition(".")[0] in ("features", *benchmarks)


def _set(benchmarks: Sequence[str]) -> list[str]:
    return [word for one in SETTINGS if _concerns(one, benchmarks) for word in ("--set", one)]
