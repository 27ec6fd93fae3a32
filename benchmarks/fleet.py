"""Fleets on a local SLURM cluster, killed at random: nothing may be missing, measured twice or read
half-written, and the training must not be disturbed.

    PYTHONPATH=.:tests python -m benchmarks.fleet WORK [--kills 200] [--seed 0]

In each round a job trains, two fleets follow it, and three checkpoints are evaluated under three
benchmarks, until all of it is done. Meanwhile fleets, evaluations with or without their batch
scripts, and the training are killed, and some jobs are stopped on request or cancelled. Then the
results are compared with those of an undisturbed training, evaluated without a fleet. Prints a line
for each round; the exit code is 1 where anything differs. Needs SLURM's programs; WORK is a folder
to be made.
"""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from kit import fleets  # type: ignore[import-not-found]
from kit.slurm_cluster import Cluster  # type: ignore[import-not-found]
from kit.slurm_jobs import launch  # type: ignore[import-not-found]

BENCHMARKS = ("knn", "linear", "svm")
STEPS, EVERY = 240, 80
# Seconds between two disturbances, of a fleet's life before it may be killed, and of a round.
PAUSE, LIFE, LIMIT = (0.2, 3.0), (0.0, 25.0), 1800.0


class Round:
    """A training, its two fleets, and who disturbs them."""

    def __init__(
        self, cluster: Cluster, scene: fleets.Scene, run: Path, draw: random.Random
    ) -> None:
        self.cluster, self.scene, self.run, self.draw = cluster, scene, run, draw
        self.counts: Counter[str] = Counter()
        self._fleets: dict[int, subprocess.Popen[bytes]] = {}
        # when each may be killed
        self._mortal = [0.0, 0.0]

    def drive(self, kills: int) -> None:
        """Until both fleets have ended by themselves; at most so many kills."""
        launch(
            self.cluster, self.scene.recipe, self.run, "--cpus-per-task", "1", "--restarts", "99"
        )
        deadline = time.monotonic() + LIMIT

        while True:
            for number in (0, 1):
                self._keep(number)
            if all(fleet.poll() == 0 for fleet in self._fleets.values()):
                return
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.run} does not come to an end; its logs are next to it")

            time.sleep(self.draw.uniform(*PAUSE))
            if self.killed < kills:
                self._disturb()

    @property
    def killed(self) -> int:
        return sum(count for what, count in self.counts.items() if what.startswith("killed"))

    def _keep(self, number: int) -> None:
        """Start a fleet that has been killed again; one that failed is an error."""
        fleet = self._fleets.get(number)
        if fleet is None or fleet.poll() == -9:
            log = self.run.with_name(f"{self.run.name}-fleet-{number}.log")
            options = ("--retries", "999", "--throttle", "3")
            self._mortal[number] = time.monotonic() + self.draw.uniform(*LIFE)
            self._fleets[number] = self.scene.fleet(self.cluster, self.run, log, *options)
        elif fleet.poll() not in (None, 0):
            raise SystemExit(f"a fleet of {self.run} failed with exit code {fleet.poll()}")

    def _disturb(self) -> None:
        ways: list[Callable[[], str]] = [
            self._kill_fleet,
            lambda: self._kill_job(script=False),
            lambda: self._kill_job(script=True),
            self._kill_training,
            lambda: self._ask("--signal=USR2", "stopped"),
            lambda: self._ask("", "cancelled"),
        ]
        (way,) = self.draw.choices(ways, (4, 6, 3, 1, 1, 1))
        if what := way():
            self.counts[what] += 1

    def _kill_fleet(self) -> str:
        number = self.draw.randrange(2)
        fleet = self._fleets[number]
        if fleet.poll() is not None or time.monotonic() < self._mortal[number]:
            return ""
        fleet.kill()
        fleet.wait()
        return "killed fleet"

    def _kill_job(self, *, script: bool) -> str:
        job = self._evaluation()
        find = fleets.processes if script else fleets.evaluating
        done = job and fleets.kill(find(self.cluster, job))
        return f"killed evaluation{' and script' if script else ''}" if done else ""

    def _kill_training(self) -> str:
        lines = self.cluster.run("squeue -h -t running -o %A|%k").splitlines()
        jobs = [line.partition("|")[0] for line in lines if line.endswith(f"|{self.run}")]
        done = jobs and fleets.kill(fleets.commands(self.cluster, jobs[0], "train"))
        return "killed training" if done else ""

    def _ask(self, option: str, what: str) -> str:
        if job := self._evaluation():
            self.cluster.run(f"scancel {option} {job}")
            return f"{what} evaluation"
        return ""

    def _evaluation(self) -> str:
        running = fleets.running(self.cluster, self.run)
        return self.draw.choice(running) if running else ""


def main(
    work: Path,
    kills: Annotated[int, typer.Option(help="In all rounds together.")] = 200,
    seed: Annotated[int, typer.Option(help="Of who is killed when.")] = 0,
) -> None:
    """Run rounds until there were enough kills."""
    work.mkdir()
    scene = fleets.prepare(work / "data", STEPS, EVERY, BENCHMARKS)
    expected = scene.undisturbed(work / "undisturbed")
    draw, total, faults, begun = random.Random(seed), Counter[str](), 0, time.monotonic()

    (work / "cluster").mkdir()
    with Cluster(work / "cluster") as cluster:
        cluster.env["PYTHONPATH"] = str(fleets.ROOT)
        while (killed := sum(n for what, n in total.items() if what.startswith("killed"))) < kills:
            number = len(list(work.glob("run-*-fleet-0.log")))
            disturbed = Round(cluster, scene, work / f"run-{number}", draw)
            disturbed.drive(kills - killed)
            total += disturbed.counts

            counted = check(disturbed.run, work / "undisturbed", expected)
            faults += sum(count for what, count in counted.items() if what != "superfluous jobs")
            said = ", ".join(f"{count} {what}" for what, count in counted.items())
            print(f"round {number}: {disturbed.killed} kills; {said}", flush=True)

        left = cluster.processes

    faults += len(left())
    counts = ", ".join(f"{count} {what}" for what, count in sorted(total.items()))
    print(f"{counts}; {len(left())} processes left; {time.monotonic() - begun:.0f} s")
    print("FAILED" if faults else "0 missing, 0 double, 0 half-written, training bit-equal")
    raise typer.Exit(1 if faults else 0)


def check(run: Path, undisturbed: Path, expected: dict[str, dict[str, float]]) -> dict[str, int]:
    """What is wrong with a round, counted."""
    results, measured = fleets.metrics(run), fleets.measured(run)
    steps = sorted(fleets.saved(run))
    return {
        "missing": len(expected.keys() - results.keys()),
        "unexpected": len(results.keys() - expected.keys()),
        "different": sum(results[name] != expected[name] for name in results.keys() & expected),
        "double": sum(count > 1 for count in measured.values()),
        "errors": len(fleets.errors(run)),
        "complaints of fleets": sum(map(complaints, run.parent.glob(f"{run.name}-fleet-*.log"))),
        "claims left": len(list((run / "evals" / "claims").glob("*.json"))),
        "wrong curves": sum(counted != steps for counted in fleets.curves(run).values()),
        "other bits": int(not fleets.equal(run, undisturbed)),
        "superfluous jobs": fleets.log(run).count("measured before"),
    }


def complaints(log: Path) -> int:
    """Lines of a fleet that tell neither of the progress of an evaluation nor of its result."""
    odd = r"^(error|warning|Traceback|\S+ step )|; trying again$"
    return len(re.findall(odd, log.read_text(errors="replace"), re.MULTILINE))


if __name__ == "__main__":
    typer.run(main)
