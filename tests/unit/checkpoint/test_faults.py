"""Processes that die while they save, and full disks: the newest committed step is always whole."""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scaletrain import dist
from scaletrain.checkpoint.files import CheckpointError
from scaletrain.checkpoint.reader import latest, open_step
from scaletrain.checkpoint.writer import Writer
from scaletrain.core import Piece

SIZE = 101


def value(step: int) -> torch.Tensor:
    return torch.arange(SIZE, dtype=torch.float64) + 1000 * step


def save(root: Path, step: int, rank: int = 0, world: int = 1, timeout: float = 30) -> None:
    low, high = rank * SIZE // world, (rank + 1) * SIZE // world
    state = {
        "w": Piece(value(step)[low:high], low, (SIZE,)),
        f"own{rank}": Piece(torch.ones(1), 0, ()),
    }
    writer = Writer(root, keep_last=2, timeout=timeout)
    writer.save(step, state, {"step": step})
    writer.close()


def whole(root: Path) -> int:
    """The newest step, every value of which is checked; older ones are whole or do not exist."""
    for manifest in root.glob("*/manifest.json"):
        assert open_step(manifest.parent).names()
    saved = latest(root)
    assert saved is not None
    assert saved.meta == {"step": saved.step}
    assert torch.equal(saved.read("w"), value(saved.step))
    return saved.step


def child(work: Callable[[], None], log: Path) -> int:
    """Run in a forked process and return its pid; it leaves 0, or 1 and a traceback in `log`."""
    pid = os.fork()
    if pid:
        return pid
    torch.set_num_threads(1)  # the thread pool does not survive a fork
    try:
        work()
        os._exit(0)
    except BaseException:
        log.write_text(traceback.format_exc())
        os._exit(1)


def ended(pid: int) -> int:
    """Exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Fuse:
    """Kills this process with SIGKILL at the n-th system call that changes the disk; a write is cut
    in half first.
    """

    def __init__(self, n: int) -> None:
        self.n, self.names = n, []  # type: int, list[str]
        opened = io.open

        def fsync(handle: int) -> None:  # without effect: SIGKILL does not lose what the kernel has
            self.burn("fsync")

        def watched(*args: Any, **kwargs: Any) -> Any:
            file = opened(*args, **kwargs)
            return Watched(file, self) if file.writable() and "b" in str(args[1]) else file

        os.fsync, io.open = fsync, watched  # type: ignore[assignment]
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        creates = event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT
        if creates or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            self.burn(event)

    def burn(self, name: str, last: Callable[[], object] = lambda: None) -> None:
        if len(self.names) == self.n:
            last()
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)


class Watched:
    """A file whose writes pass the fuse."""

    def __init__(self, file: Any, fuse: Fuse) -> None:
        self.file, self.fuse = file, fuse

    def write(self, data: Any) -> int:
        def half() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.fuse.burn("write", half)
        return int(self.file.write(data))

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def pose(rank: int, world: int, session: str) -> None:
    """Make this (forked) process one of several ranks of one start, without a process group."""
    dist.rank, dist.world = (lambda: rank), (lambda: world)
    dist.broadcast_object = lambda value: session


def victim(root: Path, step: int, n: int, report: Path) -> Callable[[], None]:
    """A process that dies at call n; with fewer calls it reports them."""

    def work() -> None:
        fuse = Fuse(n)
        save(root, step)
        fuse.n = -1
        report.write_text("\n".join(fuse.names))

    return work


def member(
    root: Path, rank: int, session: str, report: Path, n: int = -1, timeout: float = 30
) -> Callable[[], None]:
    """One of two ranks saving step 3; it dies at call n."""

    def work() -> None:
        pose(rank, 2, session)
        fuse = Fuse(n)
        save(root, 3, rank, 2, timeout)
        fuse.n = -1
        if n >= 0:
            report.write_text("\n".join(fuse.names))

    return work


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run with steps 1 and 2, and debris of an attempt at step 3."""
    root = tmp_path / "begun"
    save(root, 1)
    save(root, 2)
    (root / "step-00000003").mkdir()
    (root / "step-00000003" / "rank-00000-of-00004.00000000000000ff.safetensors").write_bytes(
        b"half"
    )
    return root


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("step", [3, 2], ids=["new step", "same step again"])
def test_kill_at_every_call(
    tmp_path: Path, begun: Path, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    root, report, log = tmp_path / "run", tmp_path / "report", tmp_path / "log"
    for n in range(200):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(begun, root)
        caplog.clear()
        code = ended(child(victim(root, step, n, report), log))
        if code == 0:
            break
        assert code == -signal.SIGKILL, log.read_text()
        committed = (root / f"step-{step:08d}" / "manifest.json").exists()
        assert whole(root) == (step if committed else 2), n
        assert "refused" not in caplog.text, n  # what is half there does not exist
        for again in (3, 4):  # over the debris
            save(root, again)
            assert whole(root) == again
        assert len(list((root / "step-00000003").iterdir())) == 2, n
    calls = report.read_text().split()
    assert n == len(calls) > 15
    assert set(calls) >= {"open", "write", "fsync", "os.rename", "os.remove"}
    assert whole(root) == step


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dead", [0, 1])
def test_kill_one_of_two_ranks_at_every_call(
    tmp_path: Path, begun: Path, caplog: pytest.LogCaptureFixture, dead: int
) -> None:
    root, report = tmp_path / "run", tmp_path / "report"
    logs = [tmp_path / "log0", tmp_path / "log1"]
    for n in range(200):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(begun, root)
        caplog.clear()
        codes = [0, 0]
        if dead == 0:
            pids = [
                child(member(root, r, "0" * 10, report, n if r == 0 else -1), logs[r])
                for r in (0, 1)
            ]
            codes = [ended(pid) for pid in pids]
            assert codes[1] == 0, logs[1].read_text()  # nobody waits for rank 0
        else:  # rank 0 starts when rank 1 is dead already, so that a short patience is enough
            codes[1] = ended(child(member(root, 1, "0" * 10, report, n), logs[1]))
            codes[0] = ended(child(member(root, 0, "0" * 10, report, timeout=0.05), logs[0]))
        if codes == [0, 0]:
            break
        assert codes[dead] == -signal.SIGKILL, logs[dead].read_text()
        committed = (root / "step-00000003" / "manifest.json").exists()
        if dead == 1:
            assert codes[0] == 1 - committed
            assert (
                committed
                or "CheckpointError: step 3 was not saved: rank 1 of 2 did not finish"
                in logs[0].read_text()
            )
        assert whole(root) == (3 if committed else 2), n
        assert "refused" not in caplog.text, n
        pids = [child(member(root, r, "1" * 10, report), logs[r]) for r in (0, 1)]
        assert [ended(pid) for pid in pids] == [0, 0], [
            log.read_text() for log in logs if log.exists()
        ]
        assert whole(root) == 3
        assert len(list((root / "step-00000003").iterdir())) == 3, n
    assert n == len(report.read_text().split()) > 8


# --- no room --------------------------------------------------------------------------------------


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    root, log = tmp_path / "run", tmp_path / "log"
    save(root, 1)

    def work() -> None:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (100_000, 100_000)
        )  # Python ignores SIGXFSZ, so write fails with EFBIG
        writer = Writer(root)
        writer.save(2, {"w": Piece(torch.zeros(100_000), 0, (100_000,))}, {})
        with pytest.raises(
            CheckpointError,
            match=r"step 2 was not saved: .*File too large \([\d,]+ bytes free\); step 1 is",
        ):
            writer.save(3, {"w": Piece(torch.zeros(1), 0, (1,))}, {})

    assert ended(child(work, log)) == 0, log.read_text()
    assert whole(root) == 1
    assert [path.name for path in root.iterdir()] == ["step-00000001"]


def test_a_full_disk(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(root)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip(
            "mounting a small file system needs root; test_a_limit_on_file_size covers the same "
            "path"
        )
    try:
        save(root, 1)
        writer = Writer(root)
        writer.save(2, {"w": Piece(torch.zeros(500_000), 0, (500_000,))}, {})
        text = (
            r"step 2 was not saved: .*step-00000002.*: No space left on device \([\d,]+ bytes "
            r"free\); step 1 is the last"
        )
        with pytest.raises(CheckpointError, match=text):
            writer.close()
        assert [path.name for path in root.iterdir()] == ["step-00000001"]
        assert whole(root) == 1
        save(root, 3)
        assert whole(root) == 3
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)
