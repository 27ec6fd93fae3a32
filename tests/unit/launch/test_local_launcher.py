"""The local launcher over stub workers: exit codes, environment, and that nothing is left
running.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
WORKER = """
import json, os, signal, sys, time
from scaletrain.cli.main import _follow_launcher
_follow_launcher()
signal.signal(signal.SIGINT, lambda *_: os._exit(130))
rank = os.environ["RANK"]
names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
with open(f"rank{rank}.jsonl", "a") as file:
    found = {n: os.environ[n] for n in names}
    file.write(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], **found}) + "\\n")
# a failure is to find the other at work
while not all(os.path.exists(f"rank{r}.jsonl") for r in range(2)):
    time.sleep(0.02)
wish = sys.argv[-1]
def wait_for_the_failure():
    while not os.path.exists("failed"):
        time.sleep(0.02)
    time.sleep(0.5)
    sys.exit(75)
if wish in ("sleep", "exit7") and rank != "1" or wish == "sleep":
    time.sleep(120)
elif wish.startswith("exit"):
    open("failed", "w").close() if rank == "1" else wait_for_the_failure()
    sys.exit(int(wish[4:]))
elif wish == "die":
    wait_for_the_failure() if rank != "0" else open("failed", "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
elif wish == "once" and not os.path.exists("over"):
    wait_for_the_failure() if rank != "0" else open("failed", "w").close()
    open("over", "w").close()
    sys.exit(1)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder from which `python -m scaletrain` is the stub, and all else of the package real."""
    (tmp_path / "scaletrain").mkdir()
    real = str(ROOT / "scaletrain")
    (tmp_path / "scaletrain" / "__init__.py").write_text(f"__path__.append({real!r})\n")
    (tmp_path / "scaletrain" / "__main__.py").write_text(WORKER)
    return tmp_path


def start(place: Path, *arguments: str, threads: str | None = None) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | (
        {"OMP_NUM_THREADS": threads} if threads else {}
    )
    command = [sys.executable, str(ROOT / "launchers" / "local.py"), *arguments]
    return subprocess.Popen(
        command,
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


def workers(place: Path, count: int = 2) -> list[dict[str, str | int | list[str]]]:
    paths = [place / f"rank{rank}.jsonl" for rank in range(count)]
    limit = time.monotonic() + 60
    while not all(path.exists() and path.read_text().endswith("\n") for path in paths):
        assert time.monotonic() < limit, "workers did not start"
        time.sleep(0.05)
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def assert_gone(place: Path) -> None:
    limit = time.monotonic() + 10
    for worker in workers(place):
        status = Path(f"/proc/{worker['pid']}/status")
        while status.exists() and "zombie" not in status.read_text():
            assert time.monotonic() < limit, f"process {worker['pid']} was left running"
            time.sleep(0.05)


def test_workers_get_the_arguments_and_a_meeting_place(place: Path) -> None:
    assert finish(
        start(place, "--procs", "2", "r.yaml", "a=1", "--run", "x", "--profile", "ok")
    ) == (0, "")
    found = workers(place)
    assert [w["argv"] for w in found] == [
        ["train", "r.yaml", "a=1", "--run", "x", "--profile", "ok"]
    ] * 2
    assert [(w["WORLD_SIZE"], w["LOCAL_RANK"], w["MASTER_ADDR"]) for w in found] == [
        ("2", "0", "127.0.0.1"),
        ("2", "1", "127.0.0.1"),
    ]
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"]
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {w["OMP_NUM_THREADS"] for w in found} == {share}


def test_port_in_use_is_one_error(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, errors = finish(start(place, "--port", str(port), "--procs", "2", "ok"))
    assert code == 2
    assert (
        errors
        == f"error: port {port} on 127.0.0.1: Address already in use; choose another --port or "
        "leave it out\n"
    )


def test_first_failure_ends_all_at_the_chosen_port(place: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    process = start(place, "--port", port, "--procs", "2", "exit7", threads="3")
    assert finish(process) == (7, "process 1 failed with exit code 7\n")
    assert {(w["MASTER_PORT"], w["OMP_NUM_THREADS"]) for w in workers(place)} == {(port, "3")}
    assert_gone(place)


def test_killed_worker_is_named(place: Path) -> None:
    text = "process 0 was ended by SIGKILL, which the system sends when memory runs out\n"
    assert finish(start(place, "--procs", "2", "die")) == (137, text)
    assert_gone(place)


def test_restart_goes_on_after_a_failure_but_not_after_a_refusal(place: Path) -> None:
    code, errors = finish(start(place, "--procs", "2", "--restarts", "2", "once"))
    assert (code, errors) == (
        0,
        "process 0 failed with exit code 1\nstarting again, 2 restarts left\n",
    )
    assert len(workers(place)) == 4
    for name in ("rank1.jsonl", "failed"):
        (place / name).unlink()
    assert finish(start(place, "--procs", "2", "--restarts", "2", "exit2")) == (2, "")
    assert len((place / "rank1.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_workers_end_with_the_launcher(place: Path, number: signal.Signals, code: int) -> None:
    process = start(place, "--procs", "2", "sleep")
    workers(place)
    process.send_signal(number)
    assert finish(process) == (code, "")
    assert_gone(place)


def test_real_command_reports_a_bad_recipe_once(tmp_path: Path) -> None:
    command = [sys.executable, "launchers/local.py", "--procs", "2", str(tmp_path / "no.yaml")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'no.yaml'}: no such recipe\n"
