"""Between the ranks: who they are, how far their clocks are apart, and what their collectives
deliver.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from scaletrain import dist
from scaletrain.doctor.disk import PREFIX, existing
from scaletrain.doctor.page import Finding, limit, measured
from scaletrain.runtime.tables import plural

KIB, MIB = 2**10, 2**20
# bytes, repetitions
SIZES = ((4 * KIB, 30), (MIB, 10), (16 * MIB, 3))
# seconds beyond which logs and file times of different nodes contradict each other
SKEW = 1.0
ROUNDS = 10
# seconds: kernels stamp files by a clock that moves in steps of up to this
TICK = 0.01
# ms; slower than that, small collectives such as batch norm's dominate a step
LATE = {"gloo": 20.0, "NCCL": 1.0}
# GB/s
SLOW = {"gloo": 0.05, "NCCL": 1.0}

Interval = tuple[float, float]


def places() -> list[Finding]:
    """Nodes by name with their number of ranks."""
    nodes = Counter(dist.gather_objects(platform.node()))
    shown = ", ".join(f"{node} ({count})" for node, count in list(nodes.items())[:16])
    more = f" and {len(nodes) - 16} more" if len(nodes) > 16 else ""
    return [
        Finding("ok", "ranks", f"{dist.world()} on {plural(len(nodes), 'node')}: {shown}{more}")
    ]


def clocks(run: Path) -> list[Finding]:
    """Clocks of the ranks against rank 0's, and of the run folder's file system against the nodes'.
    Every rank calls it.
    """
    values, findings = measured(
        "clocks", lambda: _file_clock(run), "choose a folder that can be written with --run"
    )

    if dist.world() > 1:
        skews = _rank_clocks()
        worst = max(range(1, len(skews)), key=lambda rank: abs(sum(skews[rank])))
        findings.append(_skew(f"rank {worst} against rank 0, the worst", skews[worst]))

    if values:
        pairs = list(zip(values["low"], values["high"], strict=True))
        findings.append(
            _skew(
                "run folder's file system against a node, the worst",
                max(pairs, key=lambda pair: abs(sum(pair))),
            )
        )

    return findings


def _skew(what: str, interval: Interval) -> Finding:
    low, high = interval
    text = (
        f"{what}: {1000 * (low + high) / 2:+.2f} ms, give or take {1000 * (high - low) / 2:.2f} ms"
    )
    fix = (
        "set the clocks by NTP (chrony): the age of files and the order of log lines are wrong "
        "between nodes"
    )

    return limit(distance(interval) > SKEW, "clocks", text, fix)


def distance(interval: Interval) -> float:
    """The least skew that an interval admits, in seconds."""
    return max(interval[0], -interval[1], 0.0)


def _rank_clocks() -> list[Interval]:
    """For each rank, an interval that surely holds its clock minus rank 0's, in seconds.

    Every rank stamps its clock between two collectives. That is after rank 0 has entered the first
    (which no rank leaves before) and before rank 0 leaves the second (which waits for all), as in
    Cristian's algorithm.
    """
    best = [(-float("inf"), float("inf"))] * dist.world()

    for _ in range(ROUNDS):
        enter = time.time()
        dist.gather_nograd(torch.zeros(1))
        stamps = dist.gather_nograd(torch.tensor([time.time()], dtype=torch.float64)).tolist()
        leave = time.time()

        for rank, stamp in enumerate(stamps):
            low, high = best[rank]
            best[rank] = max(low, stamp - leave), min(high, stamp - enter)

    best[0] = 0.0, 0.0
    found: list[Interval] = dist.broadcast_object(best)
    return found


def _file_clock(run: Path) -> dict[str, float]:
    """Bounds of the file system's clock minus this node's, in seconds."""
    low, high = -float("inf"), float("inf")
    with tempfile.NamedTemporaryFile(dir=existing(run), prefix=PREFIX) as file:
        for _ in range(ROUNDS):
            before = time.time()
            os.write(file.fileno(), b"0")
            # where a server keeps the time, this asks it
            stamp = os.fstat(file.fileno()).st_mtime
            low, high = max(low, stamp - time.time()), min(high, stamp + TICK - before)

    return {"low": low, "high": high}


def collectives(device: torch.device) -> list[Finding]:
    """Time of all_reduce and all_gather, as training calls them, over gloo and on a GPU over NCCL.
    Every rank calls it.

    Algorithm bandwidth: bytes of the reduced buffer, or of the whole gathered one, by the time of
    the slowest rank, in 10^9 bytes/s; allocating or copying the result, which training does too, is
    included.
    """
    if dist.world() == 1:
        return [
            Finding(
                "skip",
                "collectives",
                "one process: not run (torchrun --nproc-per-node 2 -m scaletrain doctor)",
            )
        ]

    kinds = [("gloo", torch.device("cpu")), *([("NCCL", device)] if device.type == "cuda" else [])]
    functions = (
        ("all_reduce", dist.sum_nograd, 1),
        ("all_gather", dist.gather_nograd, dist.world()),
    )
    found = []

    for kind, where in kinds:
        for name, function, share in functions:
            times = [_seconds(function, size // share, times, where) for size, times in SIZES]
            speeds = [
                size // share * share / t / 1e9 for (size, _), t in zip(SIZES, times, strict=True)
            ]
            late = 1000 * times[0]
            text = (
                f"{kind} {name}: {late:.3g} ms at 4 KiB; {speeds[1]:.3g} GB/s at 1 MiB, "
                f"{speeds[2]:.3g} GB/s at 16 MiB"
            )

            fix = (
                f"{'NCCL_DEBUG=INFO shows' if kind == 'NCCL' else 'GLOO_SOCKET_IFNAME chooses'} "
                "the network that is used"
            )
            fix += "; other work on the same cores slows it too"
            found.append(
                limit(late > LATE[kind] or speeds[2] < SLOW[kind], "collectives", text, fix)
            )

    return [
        *found,
        Finding(
            "ok",
            "collectives",
            "GB/s: size of the reduced or of the gathered buffer / time of the slowest rank",
        ),
    ]


def _seconds(
    function: Callable[[torch.Tensor], torch.Tensor], size: int, times: int, device: torch.device
) -> float:
    """Median time of one call on `size` bytes per rank, of the slowest rank."""
    x = torch.zeros(max(1, size // 4), device=device)
    took = []
    for _ in range(times + 1):
        # so that all start together
        dist.sum_nograd(torch.zeros(1, device=device))
        _wait(device)
        start = time.perf_counter()
        function(x)
        _wait(device)
        took.append(time.perf_counter() - start)

    # the first call also connects
    return max(_floats(statistics.median(took[1:])))


def _floats(own: float) -> Sequence[float]:
    everyone: list[float] = dist.gather_objects(own)
    return everyone


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
