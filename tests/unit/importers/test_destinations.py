"""Where importers write and what they find: links, mount points, kills at any point; hidden files,
odd names, pipes, loops.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from kit.data import add, encode, picture
from kit.importing import contents, files, keys, run, script, tree
from typer.testing import CliRunner

from scaletrain.data.errors import DataError
from scaletrain.data.format import index
from scaletrain.data.reading.reader import Shards
from scaletrain.importers import journal as partial


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tree(tmp_path / "src", {"a": 10, "b": 10})


# --- destinations ---------------------------------------------------------------------------------


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
    """Complete shards are promised only where there are some, and the same command goes on with
    them.
    """
    out, kept = tmp_path / "out", tmp_path / "out.partial"
    run("folder", source, tmp_path / "whole", "--per-shard", 5)
    order = [sorted(source.rglob("*.png"))[int(key[:9])] for key in keys(tmp_path / "whole")]

    def failed(path: Path) -> str:
        good = path.read_bytes()
        path.write_bytes(b"")
        app = typer.Typer()
        app.command()(script("folder").main)
        done = CliRunner().invoke(app, [str(source), str(out), "--per-shard", "5"])
        path.write_bytes(good)
        assert str(done.exception).startswith(f"{path}: not a JPEG")
        return done.stderr

    assert "complete shards stay" not in failed(order[2])
    assert not kept.exists()
    assert f"complete shards stay in {kept}: the same command goes on with them" in failed(
        order[17]
    )
    shards = {
        p.name: p.stat().st_mtime_ns
        for p in kept.glob("*.tar")
        if (kept / f"{p.name}.stidx").exists()
    }
    assert len(shards) >= 2
    assert f"going on with {kept}" in run("folder", source, out, "--per-shard", 5)
    assert files(out) == files(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in list(shards)[:2]} == dict(
        list(shards.items())[:2]
    )


# --- names and kinds of files ---------------------------------------------------------------------

MAC = b"\0\5\26\7\0\2\0\0Mac OS X        "


def litter(folder: Path) -> None:
    """What macOS and Windows leave, and hidden things."""
    (folder / "__MACOSX" / "x").mkdir(parents=True)
    for name in (
        "__MACOSX/x/._im.png",
        "__MACOSX/im.png",
        "._im.0.png",
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        ".hidden.png",
    ):
        (folder / name).write_bytes(MAC)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "im.png").write_bytes(MAC)


def test_litter_is_no_class_and_no_image(tmp_path: Path, source: Path) -> None:
    run("folder", source, tmp_path / "clean")
    litter(source)
    litter(source / "a")
    (source / "b" / "notes.txt").write_text("x")
    said = run("folder", source, tmp_path / "out")
    assert "20 images in 2 classes" in said
    told = re.search(r"not images, ignored: (.*)", said)[1].split(", ")
    assert set(told) == {
        *(
            f"2 x {name}"
            for name in (
                "._*",
                ".DS_Store",
                "Thumbs.db",
                "desktop.ini",
                ".hidden.png",
                "__MACOSX",
                ".cache",
            )
        ),
        "1 x .txt",
    }
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def test_litter_is_ignored_by_every_importer(tmp_path: Path) -> None:
    wnid = "n01440764"
    folders, tars, cifar = tmp_path / "folders", tmp_path / "tars", tmp_path / "cifar"
    jpeg = encode(picture(1), ".jpg")
    for split in ("train", "val"):
        (folders / split / wnid).mkdir(parents=True)
        (folders / split / wnid / f"{wnid}_1.JPEG").write_bytes(jpeg)
        litter(folders / split)
        litter(folders / split / wnid)
    for split in ("train", "test"):
        tree(cifar / split, {"cat": 2, "dog": 2})
        litter(cifar / split)
    tars.mkdir()
    with tarfile.open(tars / "inner.tar", "w") as inner:
        for name, data in (
            (f"{wnid}_1.JPEG", jpeg),
            (f"._{wnid}_1.JPEG", MAC),
            ("__MACOSX/x.JPEG", MAC),
            ("./.x.jpg", MAC),
        ):
            add(inner, name, data)
    with tarfile.open(tars / "ILSVRC2012_img_train.tar", "w") as outer:
        add(outer, f"__MACOSX/._{wnid}.tar", MAC)
        add(outer, f"./{wnid}.tar", (tars / "inner.tar").read_bytes())
    with tarfile.open(tars / "ILSVRC2012_img_val.tar", "w") as tar:
        add(tar, "._ILSVRC2012_val_00000001.JPEG", MAC)
        add(tar, "./ILSVRC2012_val_00000001.JPEG", jpeg)
        add(tar, "Thumbs.db", MAC)
    (tmp_path / "truth").write_text(f"{wnid}\n")
    for name, place, options in (
        ("folders", folders, ()),
        ("tars", tars, ("--val-labels", tmp_path / "truth")),
    ):
        said = run("imagenet", place, tmp_path / f"out_{name}", *options)
        assert said.count("1 image in 1 class, 1 shard") == 2
        assert said.count("ignored: ") == 2
        assert "._*" in said
        assert contents(tmp_path / f"out_{name}" / "val") == {jpeg: 0}
    assert run("cifar10", cifar, tmp_path / "out_cifar").count("4 images in 2 classes") == 2
    rows = ["a/0.png", "__MACOSX/a/0.png", "a/._0.png", "./a/1.png", ".cache/2.png"]
    for name in (*rows[:1], *rows[3:]):
        (tmp_path / "l" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "l" / name).write_bytes(encode(picture(len(name))))
    (tmp_path / "l" / "list.csv").write_text("path\n" + "\n".join(rows))
    (tmp_path / "l" / "._list.csv").write_bytes(MAC)
    said = run("listing", tmp_path / "l", tmp_path / "out_listing", "--keep-copies")
    assert "3 images without labels" in said
    assert "not images, ignored: 1 x __MACOSX, 1 x ._*" in said
    litter(cifar / "train" / "cat")
    fails = "torchvision takes the folder __MACOSX for a class; remove it, or use shards/folder.py"
    shutil.rmtree(cifar / "train" / ".cache")
    run("from_torchvision", "ImageFolder", cifar / "train", tmp_path / "more", fails=fails)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for n, name in enumerate((b"caf\xe9/a.png", b"ok/na\xefve.png", b"ok/b.png")):
        path = tmp_path / "src" / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(n)))
    out = tmp_path / "out"
    said = run("folder", tmp_path / "src", out)
    assert "3 images in 2 classes" in said
    assert json.loads((out / "classes.json").read_bytes()) == ["caf\\xe9", "ok"]
    assert contents(out) == {encode(picture(n)): min(n, 1) for n in range(3)}
    assert all(key.isascii() for key in keys(out))
    assert "sound" in run("verify", out)
    bad = tmp_path / "src" / os.fsdecode(b"ok/b\xe9.png")
    bad.write_bytes(b"junk")
    run(
        "folder",
        tmp_path / "src",
        tmp_path / "x",
        fails=f"{tmp_path}/src/ok/b\\xe9.png: not a JPEG",
    )
    run("folder", tmp_path / "src", tmp_path / "x", "--max-bad", 1)
    assert (
        json.loads((tmp_path / "x" / "quarantine.jsonl").read_bytes())["path"]
        == f"{tmp_path}/src/ok/b\\xe9.png"
    )
    bad.unlink()
    tree(tmp_path / "src", {"caf\\xe9": 1})
    run(
        "folder",
        tmp_path / "src",
        tmp_path / "y",
        fails="two class folders whose names become 'caf\\xe9' as UTF-8; rename one",
    )


def test_pipes_and_sockets_among_images_are_bad_images(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(source / "a" / "pipe.png")
    run(
        "folder",
        source,
        tmp_path / "out",
        fails=f"{source}/a/pipe.png: cannot be read: it is a pipe and not a file; --max-bad",
    )
    monkeypatch.chdir(source / "b")  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        (source / "b" / "zero.png").symlink_to("/dev/zero")
        said = run("folder", source, tmp_path / "out", "--max-bad", 3)
    assert "20 images in 2 classes, 1 shard; left out as bad: 3" in said
    reasons = [
        json.loads(line)["reason"]
        for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert sorted(reasons) == [
        f"cannot be read: it is a {kind} and not a file" for kind in ("device", "pipe", "socket")
    ]


LOOPS: dict[str, Callable[[Path], str]] = {
    "up": lambda a: (a / "loop").symlink_to("..") or "a/loop",
    "self": lambda a: (a / "loop").symlink_to(".") or "a/loop",
    "pair": lambda a: (
        (a / "x").symlink_to("../b") or (a.parent / "b" / "y").symlink_to("../a") or "a/x/y"
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_of_links_are_named(tmp_path: Path, source: Path, loop: str) -> None:
    place = LOOPS[loop](source / "a")
    run(
        "folder",
        source,
        tmp_path / "out",
        fails=f"{source}/{place} is a link to a folder around it; remove it",
    )


def test_links_to_other_folders_are_followed(tmp_path: Path, source: Path) -> None:
    other = tree(tmp_path / "other", {"deep": 3})
    (source / "c").symlink_to(other)
    (source / "a" / "more").symlink_to(other / "deep")
    run("folder", source, tmp_path / "out")
    assert Counter(Shards(tmp_path / "out").labels().tolist()) == {0: 13, 1: 10, 2: 3}
