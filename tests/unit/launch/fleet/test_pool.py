"""Processes of this machine: how many, with which devices, and that none outlives the fleet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scaletrain.launch.fleet import pool as pools
from scaletrain.launch.fleet.pool import Pool

ROOT = Path(__file__).parents[4]
NAMES = ("RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SCALETRAIN_STOPPED_FILE")
WORKER = f"""
import json, os, signal, sys, time
from scaletrain.cli.main import _follow_launcher
_follow_launcher()
wish, place = sys.argv[1:3]
if wish == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(place + ".draft", "w") as file:
    json.dump([os.getpid(), {{name: os.environ.get(name) for name in {NAMES}}}], file)
os.rename(place + ".draft", place)
print("error: said by", wish)
if wish.startswith("exit"):
    sys.exit(int(wish[4:]))
time.sleep(100)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, from which `python -m scaletrain` is the stub, all else real."""
    (tmp_path / "scaletrain").mkdir()
    real = str(ROOT / "scaletrain")
    (tmp_path / "scaletrain" / "__init__.py").write_text(f"__path__.append({real!r})\n")
    (tmp_path / "scaletrain" / "__main__.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wait_for(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "zombie" in status.read_text()


def test_a_bounded_number_with_a_device_each(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SCALETRAIN_STOPPED_FILE"):
        monkeypatch.setenv(name, "of an outer job")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    pool, logs = Pool(2, ["4", "GPU-b"]), [place / "logs" / f"{n}.log" for n in range(3)]
    for n in range(2):
        assert pool.room == 2 - n
        pool.start(["sleep", str(place / f"{n}")], logs[n])
    assert pool.room == 0
    wait_for(lambda: all((place / f"{n}").exists() for n in range(2)))
    seen = [json.loads((place / f"{n}").read_text()) for n in range(2)]
    assert [actual["CUDA_VISIBLE_DEVICES"] for _, actual in seen] == ["4", "GPU-b"]
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [actual["OMP_NUM_THREADS"] for _, actual in seen] == [share, share]
    assert {actual[name] for _, actual in seen for name in NAMES if "_" not in name} == {None}
    assert {actual["SCALETRAIN_STOPPED_FILE"] for _, actual in seen} == {None}

    os.kill(seen[0][0], signal.SIGKILL)
    wait_for(pool.sweep)
    assert (pool.running(logs[0]), pool.running(logs[1])) == (False, True)
    pool.start(["exit7", str(place / "2")], logs[2])
    wait_for(pool.sweep)
    assert json.loads((place / "2").read_text())[1]["CUDA_VISIBLE_DEVICES"] == "4"
    assert [pool.code(log) for log in logs] == [-9, None, 7]
    assert pool.code(logs[0]) is None, "a code is handed out once"
    assert logs[2].read_text() == "error: said by exit7\n"
    pool.stop()
    assert gone(seen[1][0])


def test_stopping_asks_and_then_insists(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "GRACE", 0.3)
    pool = Pool(1)
    pool.start(["deaf", str(place / "0")], place / "0.log")
    wait_for((place / "0").exists)
    pool.stop()
    assert pool.room == 1
    assert gone(json.loads((place / "0").read_text())[0])


def test_a_killed_fleet_takes_its_processes_with_it(place: Path) -> None:
    script = (
        "import time; from pathlib import Path; from scaletrain.launch.fleet.pool import Pool\n"
        f"Pool(1).start(['sleep', {str(place / '0')!r}], Path('0.log')); time.sleep(100)"
    )
    fleet = subprocess.Popen([sys.executable, "-c", script])
    wait_for((place / "0").exists)
    fleet.kill()
    fleet.wait()
    wait_for(lambda: gone(json.loads((place / "0").read_text())[0]))
