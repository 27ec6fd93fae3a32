"""Processes of a run notice within seconds that one of them has died, while they wait for something
else.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# three ranks, forked from one process that has imported what they need
RANKS = """
import os, signal, sys, time
from scaletrain import dist, peers
how, folder = sys.argv[1:]
started = []
for rank in range(3):
    started.append(os.fork())
    if not started[-1]:
        break
if all(started):
    print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started))
    sys.exit()
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
os.dup2(os.open(f"{folder}/{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
peers.GRACE = 1.0
dist.init()
dist.barrier()
dist.barrier()  # with the first one the ranks connect, for which rank 0 must still be there
if how == "killed" and rank == 1:
    if os.fork() == 0:  # as a loader worker, which outlives it
        os.closerange(0, 3)
        time.sleep(4)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
if how == "first killed" and rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if how == "collective" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if how == "collective":
    try:
        dist.barrier()
    except RuntimeError as error:
        print(dist.lost_contact(error), file=sys.stderr)
        os._exit(75)
if how == "in order":
    if rank == 2:
        time.sleep(2)
    dist.leave()
    os._exit(0)
time.sleep(60)
"""


def run(how: str, folder: Path) -> list[tuple[int, str]]:
    """Exit code and stderr of three ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }
    shared |= {"OMP_NUM_THREADS": "1", "SCALETRAIN_ERROR_FILE": str(folder / "failure")}
    done = subprocess.run(
        [sys.executable, "-c", RANKS, how, folder],
        env=os.environ | shared,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    errors = [(folder / f"{rank}.err").read_text() for rank in range(3)]
    return list(zip(map(int, done.stdout.split()), errors, strict=True))


@pytest.mark.parametrize(("how", "dead"), [("killed", 1), ("first killed", 0)])
def test_a_dead_process_ends_those_that_wait_elsewhere(how: str, dead: int, tmp_path: Path) -> None:
    begin = time.monotonic()
    ended = run(how, tmp_path)
    assert time.monotonic() - begin < 40  # and not after the minute that they would sleep
    assert [code for code, _ in ended] == [-9 if rank == dead else 75 for rank in range(3)]
    said = [
        line for _, errors in ended for line in errors.splitlines() if line.startswith("error: ")
    ]
    assert len(said) == 1
    assert said[0].startswith(f"error: rank {dead} of 3 (process ")
    assert f" on {platform.node()}) ended unexpectedly" in said[0]


def test_a_collective_that_fails_names_the_dead_process(tmp_path: Path) -> None:
    ended = run("collective", tmp_path)
    assert [code for code, _ in ended] == [75, -9, 75]
    assert any("rank 1 of 3 (process " in errors for _, errors in ended)


def test_a_process_that_ends_in_order_ends_no_other(tmp_path: Path) -> None:
    assert [code for code, _ in run("in order", tmp_path)] == [0, 0, 0]
