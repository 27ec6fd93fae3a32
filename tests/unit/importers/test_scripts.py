"""The importers, index and verify, run as a user runs them; webdataset reads what
they write.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kit.data import encode, picture, write_shards
from kit.importing import ROOT, contents, run, tree

from scaletrain.data.format import index
from scaletrain.data.reading.reader import Shards
from scaletrain.data.transforms import image, maps

# --- folder ---------------------------------------------------------------------------------------


def test_folder_of_classes(tmp_path: Path) -> None:
    source = tree(tmp_path / "src", {"dog": 5, "cat": 3, "emu": 4})
    (source / "cat" / "notes.txt").write_text("x")
    said = run("folder", source, tmp_path / "out", "--per-shard", 5)
    assert "12 images in 3 classes, 3 shards" in said
    assert "1 x .txt" in said
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog", "emu"]
    wanted = {
        path.read_bytes(): label
        for label, name in enumerate(("cat", "dog", "emu"))
        for path in (source / name).glob("*.png")
    }
    assert contents(tmp_path / "out") == wanted
    names = [s["name"] for s in index.load(tmp_path / "out")]
    assert names == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert not (tmp_path / "out.partial").exists()


def test_samples_are_shuffled_by_seed_and_bytes_are_reproducible(tmp_path: Path) -> None:
    source = tree(tmp_path / "src", {"a": 20, "b": 20})

    def files(name: str, seed: int) -> list[bytes]:
        run("folder", source, tmp_path / name, "--per-shard", 20, "--seed", seed)
        return [p.read_bytes() for p in sorted((tmp_path / name).iterdir())]

    first = files("one", 0)
    assert files("two", 0) == first
    assert files("three", 1) != first
    shards = Shards(tmp_path / "one")
    labels = [shards.read(i).label for i in range(20)]
    assert 4 <= sum(labels) <= 16  # a shard holds both classes


def test_flat_folder_and_other_kinds_of_images(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for i, suffix in enumerate((".JPG", ".jpeg", ".png", ".webp")):
        (source / f"ünï cödé.{i}{suffix}").write_bytes(encode(picture(i), suffix.lower()))
    (source / "named.jpg").write_bytes(encode(picture(9)))  # a PNG by content
    said = run("folder", source, tmp_path / "out", "--name", "all")
    assert "5 images without labels" in said
    assert set(contents(tmp_path / "out").values()) == {-1}
    assert sorted(image.kind(i) for i in contents(tmp_path / "out")) == [
        "jpg",
        "jpg",
        "png",
        "png",
        "webp",
    ]
    assert not (tmp_path / "out" / "classes.json").exists()
    assert (tmp_path / "out" / "all-000000.tar").exists()


def test_masks_travel_with_their_images(tmp_path: Path) -> None:
    source = tree(tmp_path / "src", {"a": 2, "b": 2}, ".jpg")
    for path in source.rglob("*.jpg"):
        mask = tmp_path / "masks" / path.relative_to(source).with_suffix(".png")
        mask.parent.mkdir(parents=True, exist_ok=True)
        mask.write_bytes(encode(np.full((24, 30), 255, np.uint8)))
    run("folder", source, tmp_path / "out", "--masks", tmp_path / "masks")
    shards = Shards(tmp_path / "out")
    assert all(
        maps.decode(shards.read(i, mask=True).mask, "foreground", 10**6).all() for i in range(4)
    )
    odd = tmp_path / "masks" / "a" / "im.1.png"
    odd.write_bytes(encode(np.zeros((3, 3), np.uint8)))
    run(
        "folder",
        source,
        tmp_path / "more",
        "--masks",
        tmp_path / "masks",
        fails=f"{odd}: the mask of",
    )
    odd.unlink()
    run(
        "folder",
        source,
        tmp_path / "more",
        "--masks",
        tmp_path / "masks",
        fails=f"{odd} cannot be read",
    )
    assert not list(tmp_path.glob("more*"))


def test_faults_of_the_source_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("folder", tmp_path / "none", out, fails="none: no such folder of images")
    (tmp_path / "empty").mkdir()
    run("folder", tmp_path / "empty", out, fails="empty holds no images")
    source = tree(tmp_path / "src", {"a": 2, "b": 2})
    (source / "void").mkdir()
    run("folder", source, out, fails=f"class folder {source}/void holds no images")
    (source / "void").rmdir()
    (source / "loose.png").write_bytes(encode(picture(0)))
    run("folder", source, out, fails="class folders and loose images (loose.png)")
    (source / "loose.png").unlink()
    run("folder", source, out, "--max-pixels", 100, fails="30 x 24 pixels are more than")
    jpeg = encode(picture(1, 200, 200), ".jpg")
    for broken in (b"", jpeg[: len(jpeg) // 2], b"GIF89a"):
        (source / "a" / "im.1.png").write_bytes(broken)
        run("folder", source, out, fails=f"{source}/a/im.1.png: ")
    assert not list(tmp_path.glob("out*"))


def test_destination_is_protected(tmp_path: Path) -> None:
    source = tree(tmp_path / "src", {"a": 3})
    out = tmp_path / "out"
    out.mkdir()
    run("folder", source, out)  # an empty folder is fine
    run(
        "folder",
        source,
        out,
        fails="out exists already; choose another folder, or replace it with --force",
    )
    run("folder", source, out, "--per-shard", 1, "--force")
    assert len(list(out.glob("*.tar"))) == 3
    (out / "thesis.doc").write_text("precious")
    run(
        "folder",
        source,
        out,
        "--force",
        fails="not replaced, since it holds more than shards (thesis.doc)",
    )
    assert (out / "thesis.doc").read_text() == "precious"
    (out / "thesis.doc").unlink()
    (out / "index.json").write_text('{"chunks": []}')  # of another tool
    run(
        "folder",
        source,
        out,
        "--force",
        fails="not replaced, since it holds more than shards (index.json)",
    )
    (out / "index.json").write_text(
        '{\n"version": 1,\n"samples": 3,\n"shards": [\n]\n}'
    )  # of an older version
    run("folder", source, out, "--force")
    (tmp_path / "file").write_text("x")
    run("folder", source, tmp_path / "file", fails="exists already")
    run("folder", source, tmp_path / "file" / "out", fails="cannot be made")


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves its file open
def test_webdataset_reads_what_we_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset

    run("folder", tree(tmp_path / "src", {"a": 3, "b": 3}), tmp_path / "out")
    url = str(tmp_path / "out" / "train-000000.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False, empty_check=False))
    assert {s["png"]: int(s["cls"]) for s in samples} == contents(tmp_path / "out")


# --- other importers ------------------------------------------------------------------------------


def idx(path: Path, array: np.ndarray, kind: int = 8) -> None:
    head = bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes(), mtime=0))


def fashion(root: Path) -> dict[str, np.ndarray]:
    root.mkdir()
    images = {}
    for prefix, n in (("train", 20), ("t10k", 10)):
        images[prefix] = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        idx(root / f"{prefix}-images-idx3-ubyte.gz", images[prefix])
        idx(root / f"{prefix}-labels-idx1-ubyte.gz", (np.arange(n) % 10).astype(np.uint8))
    return images


def test_fashion_mnist(tmp_path: Path) -> None:
    images = fashion(tmp_path / "src")
    run("fashion-mnist", tmp_path / "src", tmp_path / "out", "--per-shard", 8)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        found = contents(tmp_path / "out" / split)
        wanted = {pixels.tobytes(): i % 10 for i, pixels in enumerate(images[prefix])}
        assert {
            image.decode(data, 10**6)[..., 0].tobytes(): label for data, label in found.items()
        } == wanted
        assert len(json.loads((tmp_path / "out" / split / "classes.json").read_text())) == 10


def test_fashion_mnist_faults(tmp_path: Path) -> None:
    fashion(tmp_path / "src")
    out, path = tmp_path / "out", tmp_path / "src" / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2000])
    run("fashion-mnist", tmp_path / "src", out, fails=f"{path} cannot be read")
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    run("fashion-mnist", tmp_path / "src", out, fails=f"{path}: the content is not the 7840 bytes")
    path.write_bytes(gzip.compress(bytes((0, 0, 8, 3)) + b"\xff" * 12))
    run("fashion-mnist", tmp_path / "src", out, fails="at most")
    idx(path, np.zeros((10, 28), np.uint8))
    run("fashion-mnist", tmp_path / "src", out, fails="not an IDX file of 3 dimensions")
    idx(path, np.zeros((9, 28, 28), np.uint8))
    run("fashion-mnist", tmp_path / "src", out, fails="9 images and 10 labels")
    path.unlink()
    run("fashion-mnist", tmp_path / "src", out, fails=f"{path}: no such file")
    assert not list(tmp_path.glob("out*"))


def test_cifar10_from_class_folders_and_from_the_binary_release(tmp_path: Path) -> None:
    names = [f"class{i}" for i in range(10)]
    folders, binary = tmp_path / "folders", tmp_path / "binary"
    binary.mkdir()
    (binary / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    pixels = {}
    for split, files in (
        ("train", [f"data_batch_{i}.bin" for i in range(1, 6)]),
        ("test", ["test_batch.bin"]),
    ):
        pixels[split] = [picture(i + 100 * len(files), 32, 32) for i in range(10 * len(files))]
        for part, name in enumerate(files):
            records = b"".join(
                bytes([i % 10]) + pixels[split][i].transpose(2, 0, 1).tobytes()
                for i in range(part * 10, part * 10 + 10)
            )
            (binary / name).write_bytes(records)
        for i, image_ in enumerate(pixels[split]):
            path = folders / split / names[i % 10] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(image_))
    for form in (folders, binary):
        run("cifar10", form, tmp_path / f"out_{form.name}")
        for split in ("train", "test"):
            out = tmp_path / f"out_{form.name}" / split
            found = {image.decode(d, 10**6).tobytes(): y for d, y in contents(out).items()}
            assert found == {p.tobytes(): i % 10 for i, p in enumerate(pixels[split])}
            assert json.loads((out / "classes.json").read_text()) == names


def test_cifar10_faults(tmp_path: Path) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    source.mkdir()
    run("cifar10", source, out, fails="has neither train/CLASS/*.jpg nor data_batch_1.bin")
    (source / "data_batch_1").write_bytes(b"\x80\x04")
    run("cifar10", source, out, fails="data_batch_1 is not a sound pickle")
    (source / "data_batch_1").unlink()
    for i in range(1, 6):
        (source / f"data_batch_{i}.bin").write_bytes(bytes(3073))
    (source / "data_batch_3.bin").write_bytes(bytes(3000))
    run("cifar10", source, out, fails="data_batch_3.bin: 3000 bytes are not whole records")
    (source / "data_batch_3.bin").write_bytes(b"\x0b" + bytes(3072))
    run("cifar10", source, out, fails="batches.meta.txt, which names the classes")
    (source / "batches.meta.txt").write_text("a b c")
    run("cifar10", source, out, fails="label 11 is outside the 3 classes")


# --- index and verify -----------------------------------------------------------------------------


def test_verify_finds_every_kind_of_damage(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "d", (3, 3, 3, 3, 3), masks=True)
    assert "15 samples" in run("index", folder)
    assert "5 shards, 15 samples, 15 labelled, 15 masks" in run("verify", folder)
    files = [folder / f"s-{i:03d}.tar" for i in range(5)]
    rows = Shards(folder)._shard(1)[1]
    at = int(rows[2]["image"])
    data = [bytearray(f.read_bytes()) for f in files]
    data[1][at + 45] ^= 8
    data[2] = data[2][:-600]
    data[3][0:2] = b"99"  # the name, which the checksum of the header covers
    data[4][int(Shards(folder)._shard(4)[1][0]["target"])] = ord("6")  # another label
    for file, content in zip(files, data, strict=True):
        file.write_bytes(content)
    said = run("verify", folder)
    assert "1 shard, 3 samples" in said
    assert "4 FAULTS" in said
    result = subprocess.run(
        [sys.executable, "shards/verify.py", folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert result.returncode == 2
    faults = [line for line in result.stderr.decode().splitlines() if line.startswith("damaged:")]
    assert len(faults) == 4
    assert f"s-001.tar at byte {at}: this sample is not what was indexed" in faults[0]
    assert "s-002.tar" in faults[1]
    assert "truncated" in faults[1]
    assert "s-003.tar at byte 0: bad header checksum" in faults[2]
    assert "s-004.tar" in faults[3]


def test_verify_finds_images_that_were_broken_before_indexing(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "d", (4,), suffix="jpg")
    path = folder / "s-000.tar"
    data = bytearray(path.read_bytes())
    at = Shards(folder)._shard(0)[1][1]
    middle = int(at["image"] + at["image_size"] // 2)
    data[middle : int(at["image"] + at["image_size"])] = bytes(
        int(at["image"] + at["image_size"]) - middle
    )
    path.write_bytes(data)
    run("index", folder, "--force")
    said = run("verify", folder)
    assert "4 samples" in said
    assert ": 1 FAULT\n" in said


def test_scripts_run_from_the_shell_with_one_line_errors(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    helped = shell("shards/folder.py", "--help")
    assert helped.returncode == 0
    assert "--masks" in helped.stdout
    failed = shell("shards/folder.py", tmp_path / "none", tmp_path / "out")
    assert failed.returncode == 2
    assert failed.stderr == f"error: {tmp_path}/none: no such folder of images\n"
