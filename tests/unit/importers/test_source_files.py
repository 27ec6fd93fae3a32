"""What importers find in a folder: hidden files, odd names, pipes, sockets, loops of links."""

from __future__ import annotations

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
from kit.data import add, encode, picture
from kit.importing import contents, files, keys, run, tree

from scaletrain.data.reading.reader import Shards


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tree(tmp_path / "src", {"a": 10, "b": 10})


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
    fails = (
        "torchvision takes the folder __MACOSX for a class; remove it, or use `scaletrain shards "
        "folder`"
    )
    shutil.rmtree(cifar / "train" / ".cache")
    run("from-torchvision", "ImageFolder", cifar / "train", tmp_path / "more", fails=fails)


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
