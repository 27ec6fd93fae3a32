"""Checks the project on a machine with a GPU, most important parts first: `make gpu-check`.

Only PyTorch is needed to start: a machine without network gets the other packages, and real images,
from the folder .gpu/ that `make gpu-check-prepare` fills where pip works. Environment
variables change what is run:

    BUDGET    seconds for all parts together, 480; the limit of each part grows with it
    PARTS     names of parts, separated by spaces; all of them
    DEVICE    cuda; `cpu` tries the checks themselves on a machine without a GPU
    TINY      1 for the smallest settings
    OUT       folder of the logs and of summary.txt, .gpu/out
    WORK      folder of shards, runs and caches, gpu-check in the folder of temporary files
    PREPARED  what to use in place of .gpu

The exit code is 1 if a check failed. A part for which no time was left is reported, but is no
failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.report import PREPARED, RESULT, ROOT, WHEELS_PYTHON

Environment = Mapping[str, str]
# seconds between asking a part to stop and ending it
GRACE = 5


class Part(NamedTuple):
    """A module of this package that runs as a process of its own."""

    module: str
    # share of the budget after which it is stopped
    limit: float
    # it is skipped if a smaller share is left
    minimum: float


PARTS = {
    "tests": Part("machine", 0.21, 0.04),
    "parity": Part("parity", 0.23, 0.05),
    "ranks": Part("ranks", 0.13, 0.05),
    "speed": Part("speed", 0.27, 0.08),
    "shards": Part("shards", 0.13, 0.05),
    "train": Part("train", 0.48, 0.19),
    "feed": Part("feed", 0.11, 0.04),
    "compiled": Part("compiled", 0.31, 0.12),
    "launches": Part("launches", 0.13, 0.04),
}


class Log:
    """The output of one part, of which the results are also printed."""

    def __init__(self, folder: Path, name: str) -> None:
        number = list(PARTS).index(name) + 1
        self.name, self.path = name, folder / f"{number}-{name}.log"
        self.path.unlink(missing_ok=True)

    def add(self, result: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{RESULT}{result}\n")

    def results(self) -> list[str]:
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        return [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]


def environment(prepared: Path, work: Path) -> dict[str, str]:
    """The environment of the parts, in which the project and the packages of .gpu/ are found."""
    paths = [*installed_wheels(prepared, work), str(ROOT), str(ROOT / "tests")]
    before = os.environ.get("PYTHONPATH")
    caches = {
        "NUMBA_CACHE_DIR": "numba",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
    }

    return {
        **os.environ,
        **{variable: str(work / folder) for variable, folder in caches.items()},
        "PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])]),
        "PYTHONUNBUFFERED": "1",
    }


def installed_wheels(prepared: Path, work: Path) -> list[str]:
    """The folder that the wheels of .gpu/ were unpacked into; none if this is another Python."""
    wheels = sorted(map(str, (prepared / "whl").glob("*.whl")))
    if not wheels or sys.version_info[:2] != WHEELS_PYTHON:
        return []

    site = work / "site"
    options = ["-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *wheels],
        check=True,
    )
    return [str(site)]


def run(part: Part, log: Log, seconds: float, folders: Sequence[str], env: Environment) -> None:
    """Run one part for at most `seconds`; its results, or why it ended early, go to the log."""
    device, tiny = env.get("DEVICE", "cuda"), env.get("TINY") == "1"
    command = [sys.executable, "-m", "benchmarks.gpu.part", part.module, "--device", device]
    command += [*folders, "--seconds", f"{seconds:.0f}", *(["--tiny"] if tiny else [])]
    begin = time.monotonic()

    with log.path.open("a") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=env, cwd=ROOT, start_new_session=True
        )
        try:
            if code := process.wait(seconds):
                log.add(f"FAIL {log.name}: exit code {code}, see {log.path}")
        except subprocess.TimeoutExpired:
            log.add(f"FAIL {log.name}: stopped after its {seconds:.0f} s")
        finally:
            stop(process)

    log.add(f"{log.name} took {time.monotonic() - begin:.0f} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a part and the processes that it started, if it is still running."""
    if process.poll() is not None:
        return

    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    budget = float(os.environ.get("BUDGET", "480"))
    chosen = os.environ.get("PARTS", " ".join(PARTS)).split()
    if unknown := set(chosen) - set(PARTS):
        print(f"error: PARTS has {sorted(unknown)}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2

    work = Path(os.environ.get("WORK", Path(tempfile.gettempdir()) / "gpu-check")).resolve()
    out = Path(os.environ.get("OUT", PREPARED / "out")).resolve()
    prepared = Path(os.environ.get("PREPARED", PREPARED)).resolve()
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)

    begin = time.monotonic()
    env = environment(prepared, work)
    folders = ["--work", str(work), "--data", str(prepared / "data")]
    logs = []
    for name, part in PARTS.items():
        if name not in chosen:
            continue

        logs.append(log := Log(out, name))
        left = budget - (time.monotonic() - begin)
        if left < part.minimum * budget:
            log.add(f"{name}: skipped, {max(0.0, left):.0f} s left")
        else:
            print(f"=== {name}: {left:.0f} s left", flush=True)
            run(part, log, min(left, part.limit * budget), folders, env)
        print(*log.results(), sep="\n", flush=True)

    return summarise(logs, out / "summary.txt", time.monotonic() - begin)


def summarise(logs: list[Log], path: Path, seconds: float) -> int:
    """Write all results to a file, print those that failed or were skipped; the exit code."""
    path.write_text("".join("\n".join([f"== {log.name}", *log.results(), ""]) for log in logs))

    results = [line for log in logs for line in log.results()]
    failed = [line for line in results if line.startswith("FAIL")]
    skipped = [line for line in results if ": skipped, " in line]
    print("=== failed or skipped", *(failed + skipped or ["nothing"]), sep="\n")
    print(f"=== {len(failed)} checks failed, {seconds:.0f} s; all results: {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
