"""What the GPU and the host do during a training step, from PyTorch's profiler."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu.report import Settings

# steps that are profiled
STEPS = 2
# kernels that are listed
LONGEST = 10


def profiled(settings: Settings, step: Callable[[], None]) -> str:
    """Launches a step, the share of time in which a kernel runs, the shares of batch norm and of
    joining tensors, and where the host waits. The longest kernels are printed to the log.
    """
    if not settings.cuda:
        return ""

    intervals, microseconds = kernels(settings, step)
    total = sum(microseconds.values()) or 1.0
    for name, spent in microseconds.most_common(LONGEST):
        per_step = spent / 1000 / STEPS
        print(f"      {per_step:9.2f} ms/step {spent / total:6.1%}  {name}")

    norm, joins = (
        sum(spent for name, spent in microseconds.items() if word in name) / total
        for word in ("batch_norm", "Cat")
    )
    waits = host_waits(step)
    return (
        f"{len(intervals) // STEPS} launches, busy {busy_share(intervals):.0%}, "
        f"batch norm {norm:.0%}, cat {joins:.0%}, waits {waits.total()} {dict(waits)}"
    )


def kernels(
    settings: Settings, step: Callable[[], None]
) -> tuple[list[tuple[float, float]], Counter[str]]:
    """Begin and end of every kernel of some steps, and microseconds by kernel."""
    intervals: list[tuple[float, float]] = []
    microseconds: Counter[str] = Counter()
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cuda], acc_events=True) as profiler:
        for _ in range(STEPS):
            step()
        settings.synchronize()

    for event in profiler.events():
        on_gpu = event.device_type == torch._C._autograd.DeviceType.CUDA
        if on_gpu and not getattr(event, "is_user_annotation", False):
            intervals.append((event.time_range.start, event.time_range.end))
            microseconds[event.name[:90]] += event.time_range.end - event.time_range.start

    return intervals, microseconds


def busy_share(intervals: Sequence[tuple[float, float]]) -> float:
    """Share of the time from the first begin to the last end that lies in at least one interval."""
    if not intervals:
        return 0.0

    busy, last = 0.0, -math.inf
    for begin, end in sorted(intervals):
        busy += max(0.0, end - max(begin, last))
        last = max(last, end)

    return busy / (last - min(begin for begin, _ in intervals))


def host_waits(step: Callable[[], None]) -> Counter[str]:
    """How often the host waits for the GPU in one step, by file and line."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    return Counter(
        f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message)
    )
