"""What all importers do alike: the same bytes at any number of workers, after kills, and around bad
images.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kit.data import encode, picture
from kit.importing import ROOT, contents, files, keys, run, tree
from PIL import Image

from scaletrain.data.reading.reader import Shards
from scaletrain.data.transforms import image, maps


def source(folder: Path, count: int = 20) -> Path:
    return tree(folder, {"a": count // 2, "b": count // 2})


def journal(partial: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (partial / ".journal.jsonl").read_text().splitlines()]


def test_output_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    run("folder", src, tmp_path / "one", "--per-shard", 6, "--workers", 1)
    run("folder", src, tmp_path / "many", "--per-shard", 6, "--workers", 7)
    assert files(tmp_path / "one") == files(tmp_path / "many")
    assert set(files(tmp_path / "one")) == {
        *(f"train-00000{i}.tar{end}" for i in range(4) for end in ("", ".stidx")),
        *("classes.json", "scaletrain-index.json"),
    }


HANG = """
import runpy, sys, time
from scaletrain.importers import sources
path, *sys.argv = sys.argv[1:]
read = sources.read
sources.read = lambda at: time.sleep(600) if str(at) == path else read(at)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def hang_at(path: Path, command: list[object], until: Path, lines: int) -> None:
    """Run an import that waits at `path` for ever, and kill it when its journal has so many
    lines.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", HANG, str(path), *map(str, command)]
    with subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 120
        while not until.exists() or until.read_text().count("\n") < lines:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_killed_import_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    src, out, partial = source(tmp_path / "src", 30), tmp_path / "out", tmp_path / "out.partial"
    (src / "b" / "im.3.png").write_bytes(b"")  # one bad image among them
    options = ("--per-shard", 5, "--workers", 2, "--max-bad", 1)
    run("folder", src, tmp_path / "undisturbed", *options)
    number = int(keys(tmp_path / "undisturbed")[17].split("-")[0])  # in the fourth of six shards
    path = sorted(src.rglob("*.png"))[number]
    hang_at(path, ["shards/folder.py", src, out, *options], partial / ".journal.jsonl", 3)
    assert not out.exists()
    assert len(journal(partial)) == 3
    (partial / ".train-000003.tar.stidx.x7f").write_bytes(
        b"half"
    )  # as a kill in mid-write may leave it
    before = {p.name: p.stat().st_mtime_ns for p in sorted(partial.glob("*.tar"))[:3]}
    assert "resuming from" in run("folder", src, out, *options)
    assert files(out) == files(tmp_path / "undisturbed")
    assert {
        name: (out / name).stat().st_mtime_ns for name in before
    } == before  # kept, and not written again
    assert not partial.exists()


def interrupted(tmp_path: Path) -> tuple[Path, Path]:
    """An import that stopped at a bad image, with three of five shards complete; the image is
    mended.
    """
    src, out = source(tmp_path / "src", 25 - 1), tmp_path / "out"
    run("folder", src, tmp_path / "whole", "--per-shard", 5)
    number = int(keys(tmp_path / "whole")[16].split("-")[0])
    path = sorted(src.rglob("*.png"))[number]
    data = path.read_bytes()
    path.write_bytes(b"no image")
    run(
        "folder",
        src,
        out,
        "--per-shard",
        5,
        fails=f"{path}: not a JPEG, PNG or WebP image; --max-bad",
    )
    path.write_bytes(data)
    assert len(journal(tmp_path / "out.partial")) in (
        2,
        3,
    )  # the third may still be indexed when the fourth fails
    return src, out


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "torn"])
def test_resume_verifies_what_is_there(tmp_path: Path, damage: str) -> None:
    src, out = interrupted(tmp_path)
    shard, log = (
        tmp_path / "out.partial" / "train-000001.tar",
        tmp_path / "out.partial" / ".journal.jsonl",
    )
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    if damage == "flip":
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1024])
    elif damage == "lose":
        shard.unlink()
    else:
        log.write_text(log.read_text()[:-20])
    run("folder", src, out, "--per-shard", 5)
    assert files(out) == files(tmp_path / "whole")


def test_another_import_does_not_go_on_with_it(tmp_path: Path) -> None:
    src, out = interrupted(tmp_path)
    run(
        "folder",
        src,
        out,
        "--per-shard",
        5,
        "--seed",
        3,
        fails="was begun with seed=0 and not 3; --force discards",
    )
    (src / "a" / "new.png").write_bytes(encode(picture(77)))
    run("folder", src, out, "--per-shard", 5, fails="was begun with another source")
    run("folder", src, out, "--per-shard", 5, "--force")
    assert len(contents(out)) == 25


def test_two_imports_at_once_are_refused(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    (tmp_path / "out.partial").mkdir()
    handle = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    run("folder", src, tmp_path / "out", fails="another import is writing")
    os.close(handle)
    run("folder", src, tmp_path / "out")


def test_bad_images_are_quarantined_with_the_reason(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    run("folder", src, tmp_path / "whole", "--per-shard", 6)
    bad = src / "a" / "im.4.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    (src / "b" / "im.2.png").write_bytes(b"GIF89a")
    run("folder", src, tmp_path / "out", fails="--max-bad N or N% leaves such images out")
    run("folder", src, tmp_path / "out", "--max-bad", 1, fails="--max-bad")
    run("folder", src, tmp_path / "out", "--max-bad", "9.9%", fails="--max-bad")  # of 20: one
    run(
        "folder",
        src,
        tmp_path / "out",
        "--max-bad",
        "few",
        fails="neither a number of images nor a share",
    )
    said = run("folder", src, tmp_path / "out", "--max-bad", "10%", "--per-shard", 6)
    assert "18 images in 2 classes, 4 shards; left out as bad: 2, see quarantine.jsonl" in said
    noted = [
        json.loads(line)
        for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert {n["path"] for n in noted} == {str(bad), str(src / "b" / "im.2.png")}
    assert {n["number"] for n in noted} == {4, 12}
    assert next(n["reason"] for n in noted if n["number"] == 12) == "not a JPEG, PNG or WebP image"
    gone = {n["number"] for n in noted}
    assert keys(tmp_path / "out") == [
        key for key in keys(tmp_path / "whole") if int(key[:9]) not in gone
    ]
    assert "sound" in run("verify", tmp_path / "out")
    run(
        "folder", src, tmp_path / "out", "--max-bad", 2, "--force"
    )  # a folder with a quarantine can be replaced


def test_a_lower_limit_counts_what_was_left_out_before(tmp_path: Path) -> None:
    src = source(tmp_path / "src", 20)
    run("folder", src, tmp_path / "whole", "--per-shard", 5)
    order = [int(key[:9]) for key in keys(tmp_path / "whole")]
    paths = sorted(src.rglob("*.png"))
    for place in (0, 12, 13):  # one in the first shard, two in the third
        paths[order[place]].write_bytes(b"")
    run(
        "folder",
        src,
        tmp_path / "out",
        "--per-shard",
        5,
        "--max-bad",
        2,
        fails=str(paths[order[13]]),
    )
    run(
        "folder",
        src,
        tmp_path / "out",
        "--per-shard",
        5,
        "--max-bad",
        0,
        fails=str(paths[order[0]]),
    )
    run("folder", src, tmp_path / "out", "--per-shard", 5, "--max-bad", 3)
    assert len(contents(tmp_path / "out")) == 17


def test_resize_shrinks_the_large_and_leaves_the_small(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    stripes = np.array(
        [0, 255, 255, 0], np.uint8
    )  # four pixels become one: their mean, and not what lies in the middle
    fine = np.broadcast_to(np.tile(stripes, 40)[None, :, None], (120, 160, 3)).copy()
    small = encode(picture(1, 40, 30), ".jpg")
    (src / "large.png").write_bytes(encode(fine))
    (src / "small.jpg").write_bytes(small)
    run("folder", src, tmp_path / "out", "--resize", 30)  # the small one has that very side
    large = next(data for data in contents(tmp_path / "out") if data != small)
    pixels = image.decode(large, 10**6)
    assert image.kind(large) == "jpg"
    assert pixels.shape == (30, 40, 3)
    assert np.abs(pixels.astype(int) - 127).max() <= 2  # antialiased: gray
    assert small in contents(tmp_path / "out")


def test_quality_alone_encodes_all_again(tmp_path: Path) -> None:
    src = source(tmp_path / "src", 4)
    run("folder", src, tmp_path / "low", "--quality", 20)
    run("folder", src, tmp_path / "high", "--quality", 95)
    low, high = contents(tmp_path / "low"), contents(tmp_path / "high")
    assert {image.kind(data) for data in low} == {"jpg"}
    assert sum(map(len, low)) < sum(map(len, high))
    with Image.open(io.BytesIO(next(iter(high)))) as found:
        assert found.quantization[0][0] == 2  # libjpeg's table at 95: 16 / 10, rounded


def test_masks_shrink_with_their_images(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", {"a": 1}, ".jpg")  # 24 x 30
    mask = np.zeros((24, 30), np.uint8)
    mask[:, 15:] = 255
    (tmp_path / "masks" / "a").mkdir(parents=True)
    (tmp_path / "masks" / "a" / "im.0.png").write_bytes(encode(mask))
    run("folder", src, tmp_path / "out", "--masks", tmp_path / "masks", "--resize", 12)
    sample = Shards(tmp_path / "out").read(0, mask=True)
    assert image.size(sample.image) == (12, 15)
    small = maps.decode(sample.mask, "foreground", 10**6)
    assert small.shape == (12, 15)
    assert not small[:, :7].any()
    assert small[:, 8:].all()


def test_class_numbers_survive_the_resize_of_their_images(tmp_path: Path) -> None:
    """Every second row and column, as grey values and as places in a palette."""
    src = tree(tmp_path / "src", {"a": 2}, ".jpg")  # 24 x 30
    numbers = np.random.default_rng(0).integers(0, 256, (24, 30), dtype=np.uint8)
    folder = tmp_path / "masks" / "a"
    folder.mkdir(parents=True)
    (folder / "im.0.png").write_bytes(encode(numbers))
    coloured = Image.frombytes("P", (30, 24), numbers.tobytes())
    coloured.putpalette([value for n in range(256) for value in (255 - n, n // 2, 7)])
    coloured.save(folder / "im.1.png")
    run("folder", src, tmp_path / "out", "--masks", tmp_path / "masks", "--resize", 12)
    run("folder", src, tmp_path / "same", "--masks", tmp_path / "masks", "--quality", 90)
    for number in range(2):
        small, same = (Shards(tmp_path / name).read(number, mask=True) for name in ("out", "same"))
        assert image.size(small.image) == (12, 15)
        assert np.array_equal(maps.decode(small.mask, "classes", 10**6), numbers[1::2, 1::2])
        assert np.array_equal(maps.decode(same.mask, "classes", 10**6), numbers)

    # a folder of maps alone gets the keys of the images
    run("folder", tmp_path / "masks", tmp_path / "maps", "--per-shard", 1)
    assert keys(tmp_path / "maps") == keys(tmp_path / "out")


def test_a_sideways_photo_is_upright_after_resize(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    exif = Image.Exif()
    exif[274] = 6  # turn right to view
    y, x = np.mgrid[0:60, 0:80]
    photo = np.stack([y * 4, x * 3, 0 * x + 90], -1).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "src" / "a.jpg", exif=exif, quality=95)
    run("folder", tmp_path / "src", tmp_path / "out", "--resize", 30)
    data = next(iter(contents(tmp_path / "out")))
    pixels = image.decode(data, 10**6).astype(float)
    turned = np.rot90(photo, -1).reshape(40, 2, 30, 2, 3).mean((1, 3))
    assert pixels.shape == (40, 30, 3)
    assert np.abs(pixels - turned).mean() < 3


def test_failures_of_the_disk_are_not_bad_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scaletrain.data.format import index

    def full(path: Path) -> object:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(index, "tabulate", full)
    run(
        "folder",
        source(tmp_path / "src"),
        tmp_path / "out",
        "--max-bad",
        "100%",
        fails="No space left on device",
    )
    assert not list(tmp_path.glob("out*"))
