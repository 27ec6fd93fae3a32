"""Where importers write: links, mount points, folders of others, and kills at any point."""

from __future__ import annotations

import fcntl
import os
import tarfile
from pathlib import Path

import pytest
from kit.data import add, encode, picture
from kit.importing import call, contents, files, keys, run, tree

from scaletrain.data.errors import DataError
from scaletrain.data.format import index
from scaletrain.importers import journal as partial


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tree(tmp_path / "src", {"a": 10, "b": 10})


@pytest.mark.parametrize("there", ["folder", "nothing"])
def test_a_link_stays_and_its_target_has_the_data(tmp_path: Path, source: Path, there: str) -> None:
    (tmp_path / "disk").mkdir()
    target, out = tmp_path / "disk" / "big", tmp_path / "out"
    if there == "folder":
        target.mkdir()
    out.symlink_to(target)
    (source / "b" / "im.3.png").write_bytes(b"")
    run("folder", source, out, "--per-shard", 4, fails="--max-bad")
    kept = [p.name for p in (tmp_path / "disk").iterdir() if p.name != "big"]
    assert kept in ([], ["big.partial"])  # never on the link's own disk
    run("folder", source, out, "--per-shard", 4, "--max-bad", 1)
    assert out.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out", "src"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["big"]
    assert len(contents(target)) == 19
    run("folder", source, out, "--per-shard", 4, fails=f"{target} exists already")
    run("folder", source, out, "--per-shard", 5, "--max-bad", 1, "--force")
    assert out.is_symlink()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["big"]


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that can be filled and not be renamed, with what a file system has in its root."""
    folder = tmp_path / "mount"
    for name in ("lost+found", ".Trash-0"):
        (folder / name).mkdir(parents=True)
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        assert folder not in (path, Path(target)), "EBUSY"
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    return folder


def test_a_mount_point_receives_the_data_inside(tmp_path: Path, source: Path, mount: Path) -> None:
    run("folder", source, tmp_path / "whole", "--per-shard", 6)
    run("folder", source, mount, "--per-shard", 6)
    assert files(mount) == files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mount", "src", "whole"]
    run("folder", source, mount, fails="exists already")
    assert not (mount / ".partial").exists()
    run("folder", source, mount, "--per-shard", 20, "--force")
    assert len(list(mount.glob("*.tar"))) == 1
    assert sorted(p.name for p in mount.iterdir() if p.is_dir()) == [".Trash-0", "lost+found"]
    (mount / "thesis.doc").write_text("precious")
    run("folder", source, mount, "--force", fails="holds more than shards (thesis.doc)")
    assert (mount / "thesis.doc").read_text() == "precious"
    link = tmp_path / "link"
    link.symlink_to(mount)
    (mount / "thesis.doc").unlink()
    run("folder", source, link, "--per-shard", 6, "--force")
    assert files(mount) == files(tmp_path / "whole")
    assert link.is_symlink()


def test_what_another_import_is_moving_is_not_touched(source: Path, mount: Path) -> None:
    (mount / ".partial").mkdir()
    (mount / ".partial" / partial.MOVED).write_text('["s.tar"]')
    (mount / "s.tar").write_bytes(b"x")
    handle = os.open(mount / ".partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    run("folder", source, mount, "--force", fails="another import is writing")
    assert (mount / "s.tar").exists()
    os.close(handle)


class Kill(BaseException):
    pass


@pytest.mark.parametrize("splits", [("",), ("train", "test")])
def test_a_kill_while_a_mount_point_is_filled_loses_nothing(
    tmp_path: Path, mount: Path, monkeypatch: pytest.MonkeyPatch, splits: tuple[str, ...]
) -> None:
    """At every one of its steps; the same import goes on, and until then readers are told that
    shards are missing.
    """
    head = {"splits": list(splits)}

    def filled(force: bool = False) -> None:
        with partial.replacing(mount, head, force) as job:
            for split in splits:
                journal = partial.Journal(job.partial / split, map)
                for n in range(len(journal.lines), 2):
                    path = job.partial / split / f"s-{n}.tar"
                    with tarfile.open(path, "w") as tar:
                        add(tar, f"{n}.png", encode(picture(n)))
                    journal.add(path, [])
                journal.finish(())

    real, left = Path.rename, 10**6

    def rename(path: Path, target: Path) -> Path:
        nonlocal left
        left -= path.parent == mount / ".partial"
        if left < 0:
            raise Kill
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    filled()
    whole = files(mount)
    for step in range(len(list(mount.iterdir())) - 2):
        left = step
        with pytest.raises(Kill):
            filled(force=True)
        if not splits[0]:
            with pytest.raises(
                DataError, match=r"holds no \.tar|is in scaletrain-index.json but not in the folder"
            ):
                index.load(mount, lambda text: None)
        left = 10**6
        with partial.replacing(mount, head, force=True) as job:
            assert job.resumed
            for split in splits:
                journal = partial.Journal(job.partial / split, map)
                assert len(journal.lines) == 2  # nothing is written again
                journal.finish(())
        assert files(mount) == whole


def test_the_working_directory_and_folders_of_others_are_filled(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("folder", source, tmp_path / "whole")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inode = Path().stat().st_ino
    run("folder", source, ".")
    assert Path().stat().st_ino == inode  # who stands in it still does
    assert files(tmp_path / "here") == files(tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs" / "mine").mkdir(parents=True)
    right = os.access
    monkeypatch.setattr(
        "os.access", lambda path, mode: Path(path) != tmp_path / "theirs" and right(path, mode)
    )
    run("folder", source, tmp_path / "theirs" / "mine")
    assert files(tmp_path / "theirs" / "mine") == files(tmp_path / "whole")
    assert [p.name for p in (tmp_path / "theirs").iterdir()] == ["mine"]


def test_advice_is_true(tmp_path: Path, source: Path) -> None:
    """Complete shards are promised only where there are some, and the same command resumes from
    them.
    """
    out, kept = tmp_path / "out", tmp_path / "out.partial"
    run("folder", source, tmp_path / "whole", "--per-shard", 5)
    order = [sorted(source.rglob("*.png"))[int(key[:9])] for key in keys(tmp_path / "whole")]

    def failed(path: Path) -> str:
        good = path.read_bytes()
        path.write_bytes(b"")
        done = call("folder", source, out, "--per-shard", 5)
        path.write_bytes(good)
        assert str(done.exception).startswith(f"{path}: not a JPEG")
        return done.stderr

    assert "complete shards stay" not in failed(order[2])
    assert not kept.exists()
    assert f"complete shards stay in {kept}: rerun the same command to resume" in failed(order[17])
    shards = {
        p.name: p.stat().st_mtime_ns
        for p in kept.glob("*.tar")
        if (kept / f"{p.name}.stidx").exists()
    }
    assert len(shards) >= 2
    assert f"resuming from {kept}" in run("folder", source, out, "--per-shard", 5)
    assert files(out) == files(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in list(shards)[:2]} == dict(
        list(shards.items())[:2]
    )
