"""The doctor's checks between ranks, on two real ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from kit import ranks

from scaletrain import dist
from scaletrain.doctor import disk, network
from scaletrain.doctor.page import measured, merged

ROOT = Path(__file__).parents[3]
AHEAD = 5.0  # seconds of rank 1's clock


def check(folder: Path) -> dict[str, torch.Tensor]:
    """On each rank: bounds of the clocks, then flags of the other checks."""
    one = dist.rank() == 1
    real: Callable[[], float] = time.time
    if one:
        time.time = lambda: real() + AHEAD  # type: ignore[method-assign]
    intervals = network._rank_clocks()
    warned = [
        f for f in network.clocks(folder / "both") if f.text.startswith("rank 1 against rank 0")
    ]
    time.time = real  # type: ignore[method-assign]

    def fails_on_one() -> dict[str, float]:
        if one:
            raise OSError("no such disk")
        return {"speed": 3.0}

    values, failures = measured("disk", fails_on_one, "another disk")
    apart = merged(disk.shared(folder / ("one" if one else "both")))
    same = merged(disk.shared(folder / "both"))
    speeds = network.collectives(torch.device("cpu"))
    flags = [
        [f.status for f in warned] == ["warn"],
        values == {"speed": [3.0]},
        [(f.status, f.text) for f in failures] == [("fail", "OSError: no such disk [rank 1]")],
        [(f.status, f.text) for f in apart]
        == [
            ("ok", "the same for all ranks [rank 0]"),
            ("fail", "not the folder that rank 0 sees [rank 1]"),
        ],
        [(f.status, f.text) for f in same] == [("ok", "the same for all ranks")],
        len(speeds) == 3 and all("GB/s" in f.text and f.status != "fail" for f in speeds),
    ]
    return {"clocks": torch.tensor(intervals), "flags": torch.tensor(flags)}


def test_between_ranks(tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    (tmp_path / "one").mkdir()
    first, second = ranks.run(2, check, tmp_path, tmp_path)
    assert first["flags"].tolist() == [True] * 6
    assert second["flags"].tolist() == [True] * 6
    assert torch.equal(first["clocks"], second["clocks"])
    low, high = first["clocks"][1].tolist()
    assert low <= AHEAD <= high
    assert high - low < 2.0
    assert first["clocks"][0].tolist() == [0.0, 0.0]


def test_the_command_on_two_processes(tmp_path: Path) -> None:
    # without the second dash torchrun takes --run for one of its own options
    start = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "--", "scaletrain"]
    command = [sys.executable, *start, "doctor", "--run", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scaletrain doctor, ") == 1
    assert "ok    ranks        2 on 1 node: " in done.stdout
    assert "rank 1 against rank 0" in done.stdout
    assert "gloo all_reduce: " in done.stdout
    assert not list(tmp_path.iterdir())
