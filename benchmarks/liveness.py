"""Does every loader worker that is lost end the run by name? `python -m benchmarks.liveness WORK
[--parallel 2]`

Each trial is a training run of its own, of SimCLR with a tiny ResNet-18 on made-up images of 16
pixels, in which one of two loader workers per process is killed or stopped at a random moment of
its first seconds: from before the first batch on, in whatever it does. A trial is good when the run
ends with exit code 75 and the number and pid of that worker within LIMIT seconds, and leaves no
process behind.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

ROOT = Path(__file__).parents[1]
LAUNCHER = str(ROOT / "launchers" / "local.py")
SHM = Path("/dev/shm")
IMAGES, LIFE, LIMIT, PATIENCE = 512, 4.0, 30.0, 120.0
HEAD = (
    "| signal | good | named | exit code 75 | seconds to the end: median, longest | processes "
    "left |\n|---|---|---|---|---|---|"
)
RECIPE = """
base: {root}/configs/simclr_r18_cifar10.yaml
batch: 16
steps: 1000000
optim: {{warmup_epochs: 0}}
model: {{width: 0.0625}}
checkpoint: {{every_steps: 20}}
data: {{path: {shards}, lanes: 8, workers: 2, views: [{{size: 16, count: 2}}]}}
"""


class Trial(NamedTuple):
    launcher: tuple[str, ...]
    how: signal.Signals
    number: int


class Outcome(NamedTuple):
    trial: Trial
    moment: float  # seconds after the first worker was there
    code: int | None  # None: did not end
    named: bool
    seconds: float  # from the signal to the end
    left: int  # processes

    @property
    def good(self) -> bool:
        return self.named and self.code == 75 and self.seconds <= LIMIT and not self.left


class Process(NamedTuple):
    pid: int
    parent: int
    command: bytes


def processes() -> Iterator[Process]:
    """Those that run."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue

        if state != "Z":
            yield Process(int(path.name), int(parent), command)


def below(pid: int) -> list[Process]:
    """All that a process has started, and what these have."""
    found, everything = [pid], list(processes())
    for above in found:
        found += [process.pid for process in everything if process.parent == above]
    return [process for process in everything if process.pid in found[1:]]


def workers(main: int) -> list[int]:
    """Forked, so with the command of the process above; a program that is about to start looks so
    for a moment.
    """

    def forked() -> list[int]:
        commands = {process.pid: process.command for process in processes()}
        return [
            p.pid
            for p in below(main)
            if commands.get(p.parent) == p.command and b"\0train\0" in p.command
        ]

    before = forked()
    return [pid for pid in forked() if pid in before]


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random_pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 24, 24, 3), np.uint8)
    with tarfile.open(folder / "images.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, pixels in enumerate(random_pixels):
            data = cv2.imencode(".png", pixels)[1].tobytes()
            info = tarfile.TarInfo(f"{number:05d}.png")
            info.size = len(data)
            tar.addfile(info, BytesIO(data))

    return folder


def until(true: Callable[[], object], seconds: float) -> float:
    """Seconds until it held, or that it did not."""
    begin = time.monotonic()
    while not true() and time.monotonic() - begin < seconds:
        time.sleep(0.02)
    return time.monotonic() - begin


def run(trial: Trial, work: Path) -> Outcome:
    chance = random.Random(str(trial))
    place = (
        work
        / f"{'launched' if LAUNCHER in trial.launcher else 'alone'}-{trial.how.name}-{trial.number}"
    )
    place.mkdir(parents=True, exist_ok=True)
    command = [*trial.launcher, str(work / "recipe.yaml"), "--run", str(place / "run")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    with (place / "log").open("w") as log:
        main = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    until(lambda: workers(main.pid), PATIENCE)
    moment = chance.uniform(0, LIFE)
    time.sleep(moment)
    victim, everyone = (
        chance.choice(workers(main.pid)),
        [process.pid for process in below(main.pid)],
    )

    os.kill(victim, trial.how)
    seconds = until(lambda: main.poll() is not None, PATIENCE)

    ours = {*everyone, *(process.pid for process in below(main.pid))}
    until(lambda: not any(process.pid in ours for process in processes()), 5.0)
    left = [process.pid for process in processes() if process.pid in ours]
    for pid in (*left, *([] if main.poll() is not None else [main.pid])):
        os.kill(pid, signal.SIGKILL)

    code = main.poll()
    named = re.search(
        rf"^error: loader worker [01] \(pid {victim}\)", (place / "log").read_text(), re.MULTILINE
    )
    return Outcome(trial, moment, code, bool(named), seconds, len(left))


def row(what: str, found: list[Outcome]) -> str:
    seconds = sorted(o.seconds for o in found)
    cells = (
        what,
        f"{sum(o.good for o in found)} of {len(found)}",
        sum(o.named for o in found),
        sum(o.code == 75 for o in found),
        f"{seconds[len(seconds) // 2]:.1f}, {seconds[-1]:.1f}",
        sum(o.left for o in found),
    )

    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="an empty folder")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stops", type=int, default=40)
    parser.add_argument(
        "--launched",
        type=int,
        default=10,
        help="further kills, and as many stops, with two processes",
    )

    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    work: Path = options.work.absolute()
    shards = write(work / "shards")
    (work / "recipe.yaml").write_text(RECIPE.format(root=ROOT, shards=shards))
    alone = (sys.executable, "-m", "scaletrain", "train")
    launched = (sys.executable, LAUNCHER, "--procs", "2")
    plan = (
        ("SIGKILL", alone, signal.SIGKILL, options.kills),
        ("SIGSTOP", alone, signal.SIGSTOP, options.stops),
        ("SIGKILL, two processes", launched, signal.SIGKILL, options.launched),
        ("SIGSTOP, two processes", launched, signal.SIGSTOP, options.launched),
    )

    before = set(os.listdir(SHM))  # noqa: PTH208
    print(HEAD)
    bad: list[Outcome] = []
    with ThreadPoolExecutor(options.parallel) as pool:
        for what, launcher, how, count in plan:
            trials = [Trial(launcher, how, number) for number in range(count)]
            found = list(pool.map(lambda trial: run(trial, work), trials))
            bad += [outcome for outcome in found if not outcome.good]
            if found:
                print(row(what, found), flush=True)

    print(f"\nleft in {SHM}: {sorted(set(os.listdir(SHM)) - before) or 'nothing'}")  # noqa: PTH208
    for outcome in bad:
        print(f"not good: {outcome}", file=sys.stderr)

    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
