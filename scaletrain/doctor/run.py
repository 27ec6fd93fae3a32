"""`scaletrain doctor`: a report on this installation, machine, disk and network, with a fix for
every problem.

Checks are functions that return findings. Local ones run on every rank and are merged; the others
communicate with other ranks, so every rank calls them in the same order. No check needs the
internet, and all files are removed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from scaletrain import dist, environment
from scaletrain.doctor import disk, feed, machine, network, parity, software
from scaletrain.doctor.page import Finding, guarded, lines, merged
from scaletrain.runtime.tables import plural

# Seconds to wait for another rank.
PATIENCE = 60.0


def examine(run: Path, data: Path | None, *, require_gpu: bool = False) -> int:
    """Print the report on rank 0, section by section; returns the number of failures. Every rank
    calls it.
    """
    found: list[Finding] = []
    speaks = environment.rank() == 0

    def tell(findings: Sequence[Finding]) -> None:
        found.extend(findings)
        if speaks and findings:
            print(lines(findings), flush=True)

    if speaks:
        print(f"scaletrain doctor, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC")

    try:
        _sections(run, data, require_gpu, tell)
    except (
        dist.LaunchError,
        RuntimeError,
    ) as error:  # what torch raises for a rank that does not answer
        fix = (
            f"all ranks must run this command and reach each other within {PATIENCE:.0f} s; the "
            "page ends here"
        )
        tell([Finding("fail", "ranks", " ".join(str(error).split())[:300], fix)])

    counts = {status: sum(f.status == status for f in found) for status in ("warn", "fail")}
    if speaks:
        print(f"{plural(counts['warn'], 'warning')}, {plural(counts['fail'], 'failure')}")

    return counts["fail"]


def _sections(
    run: Path, data: Path | None, require_gpu: bool, tell: Callable[[Sequence[Finding]], None]
) -> None:
    local = [
        *guarded("versions", software.versions),
        *guarded("devices", lambda: software.devices(require_gpu)),
        *guarded("machine", machine.limits),
    ]

    try:
        device = dist.init(PATIENCE)
    except dist.LaunchError:
        # the page is needed most now
        tell(local)
        raise

    if device.type == "cpu":
        dist.keep_freed_memory()

    tell(merged([*local, *machine.cpus()]))
    tell(network.places())
    tell(disk.run_folder(run))
    tell(merged(disk.shared(run)))
    tell(disk.data_folder(data) if data else [Finding("skip", "data folder", "no --data: not run")])
    tell(feed.loader(data, run) if data else [])
    tell(parity.parity(device))
    tell(network.clocks(run))
    tell(network.collectives(device))

    dist.shutdown()
