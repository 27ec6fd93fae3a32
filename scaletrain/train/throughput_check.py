"""The throughput check, a run on synthetic data: time by part of a step, memory, and the loader
speed that the run needs.
"""

from __future__ import annotations

import itertools
import json
import operator
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from scaletrain import dist
from scaletrain.config.schema import Config
from scaletrain.data.loading.sources import SYNTHETIC
from scaletrain.runtime import durable, tables, timing
from scaletrain.runtime.tables import plural
from scaletrain.runtime.timing import BACKWARD, COPY, FORWARD, UPDATE, WAIT
from scaletrain.train import monitor
from scaletrain.train.progress import number

FILE = "throughput_check.json"
# Agreement of the ranks, gradient norm, monitor, checkpoints.
REST = "the rest"
PARTS = (WAIT, COPY, FORWARD, BACKWARD, UPDATE, REST)
# Steps at the start that are not measured; at most half of all.
WARM_UP = 10
# Latest steps that are kept, which bounds the memory of a long run.
KEPT = 1000


class Timer:
    """Divides steps into named parts that add up to the step: each moment belongs to the innermost
    open span.

    `stamp()` records a moment, which may lie in the future as with CUDA events; `seconds(b, a)`,
    the time from a to b, is called by read() only.
    """

    def __init__(
        self, stamp: Callable[[], Any], seconds: Callable[[Any, Any], float], skip: int = 0
    ) -> None:
        self._stamp, self._seconds, self._skip = stamp, seconds, skip
        self._steps: deque[list[tuple[Any, str]]] = deque(maxlen=KEPT)
        self._open = [REST]
        self._cuts = [(stamp(), REST)]

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self._open.append(name)
        self._cuts.append((self._stamp(), name))
        try:
            yield
        finally:
            self._open.pop()
            self._cuts.append((self._stamp(), self._open[-1]))

    def step(self) -> None:
        """End a step and begin the next."""
        self._cuts.append((self._stamp(), self._open[-1]))
        if self._skip:
            self._skip -= 1
        else:
            self._steps.append(self._cuts)

        self._cuts = [self._cuts[-1]]

    def read(self) -> list[dict[str, float]]:
        """Seconds by part, for every measured step."""
        result = []
        for cuts in self._steps:
            parts: dict[str, float] = defaultdict(float)
            for (start, name), (stop, _) in itertools.pairwise(cuts):
                parts[name] += self._seconds(stop, start)
            result.append(dict(parts))

        return result


@contextmanager
def measuring(
    config: Config, run: Path, steps: int, device: torch.device
) -> Iterator[monitor.StepObserver]:
    """Time the next `steps` of a run on synthetic data, and report them; other runs are not timed.

    On CUDA the parts are divided by events on the device's time line, for which the host never
    waits.
    """
    if config.data.path != SYNTHETIC:
        yield monitor.NullObserver()
        return

    stamp, seconds = (
        (_event, _between) if device.type == "cuda" else (time.perf_counter, operator.sub)
    )
    timer = Timer(stamp, seconds, skip=min(WARM_UP, steps // 2))

    with timing.listening(timer.span):
        yield timer

    if device.type == "cuda":
        torch.cuda.synchronize()

    measured = timer.read()
    everyone = dist.gather_objects(
        {**summary(measured), "memory": monitor.memory()} if measured else None
    )

    if dist.main() and measured:
        result = report(config, everyone, len(measured))
        durable.write(run / FILE, json.dumps(result, indent=1) + "\n")
        show(result, run)


def summary(steps: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Milliseconds of one rank: median and 95th percentile of the steps, and the mean of each part
    over the middle half of them.

    The middle half by duration excludes steps that write a checkpoint or record scalars.
    """
    ordered = sorted(steps, key=lambda parts: sum(parts.values()))
    totals = [1000 * sum(parts.values()) for parts in ordered]
    middle = ordered[len(steps) // 4 : len(steps) - len(steps) // 4]

    return {
        "median": statistics.median(totals),
        "p95": totals[int(0.95 * (len(totals) - 1))],
        "parts": {
            name: 1000 * statistics.fmean(parts.get(name, 0.0) for parts in middle)
            for name in PARTS
        },
    }


def report(config: Config, ranks: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """The content of RUN/throughput_check.json, from the summaries of all ranks."""
    world, local = len(ranks), dist.local_world()
    # Milliseconds; ranks step together.
    step = statistics.fmean(r["median"] for r in ranks)
    parts = {name: statistics.fmean(r["parts"][name] for r in ranks) for name in PARTS}
    busy = sum(parts.values()) - parts[WAIT]
    needed = 1000 * config.batch / world / busy
    memory = {
        name.removeprefix("memory/"): max(r["memory"][name] for r in ranks)
        for name in ranks[0]["memory"]
    }

    views = sum(view.count for view in config.data.views)
    return {
        "batch": config.batch,
        "processes": world,
        "processes_per_node": local,
        "steps_measured": steps,
        "images_per_second": 1000 * config.batch / step,
        "views_per_second": 1000 * config.batch * views / step,
        "step_ms": {"median": step, "p95": max(r["p95"] for r in ranks)},
        "parts_ms": parts,
        "parts_ms_slowest": {name: max(r["parts"][name] for r in ranks) for name in PARTS},
        "memory": memory,
        "loader_images_per_second": {"process": needed, "node": needed * local},
    }


def show(result: Mapping[str, Any], run: Path) -> None:
    """Print the report as text with a table of the parts of a step."""
    speed, loader, memory = result["step_ms"], result["loader_images_per_second"], result["memory"]
    parts, slowest = result["parts_ms"], result["parts_ms_slowest"]
    whole, columns = sum(parts.values()), ["part", "ms", "share"]
    rows = [[name, f"{ms:.2f}", f"{ms / whole:.1%}"] for name, ms in parts.items()]
    rows.append(["step", f"{whole:.2f}", "100%"])

    if result["processes"] > 1:
        columns.append("ms, slowest rank")
        rows = [[*row, f"{slowest[row[0]]:.2f}" if row[0] in slowest else ""] for row in rows]

    check = (
        f"throughput check: {number(result['images_per_second'])} images/s, "
        f"{number(result['views_per_second'])} views/s; batch {result['batch']} on "
        f"{plural(result['processes'], 'process')}, {plural(result['steps_measured'], 'step')} "
        f"measured after the warm-up"
    )
    step = (
        f"step: median {number(speed['median'])} ms, 95 % below {number(speed['p95'])} ms; "
        "by part, mean over the middle half:"
    )
    device = (
        f"; CUDA {memory['cuda_peak_mb']:.0f} MB allocated, {memory['cuda_reserved_mb']:.0f} MB "
        "reserved"
        if "cuda_peak_mb" in memory
        else ""
    )
    notes = (
        f"memory: peak of the largest process {memory['rss_peak_mb']:.0f} MB without its loader "
        f"workers{device}",
        f"loader: this run needs {number(loader['process'])} images/s per process, "
        f"{number(loader['node'])} per node; `scaletrain doctor --run {run} --data FOLDER` "
        "reports how many cores that takes",
    )

    print(tables.wrap(check, tables.width()))
    tables.show(columns, rows, title=step, notes=notes)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(stop: torch.cuda.Event, start: torch.cuda.Event) -> float:
    return float(start.elapsed_time(stop)) / 1000
