"""Hostile archives, indexes and images: typed errors only, no code run, nothing written elsewhere, memory and time bounded."""

from __future__ import annotations

import io
import pickle
import random
import resource
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from data_kit import add, encode, picture, write_shards
from PIL import Image

from scaletrain.data import image, index, table
from scaletrain.data.errors import DataError, ImageError, ShardError
from scaletrain.data.reader import Shards
from scaletrain.data.tarfiles import members

LIMIT = 50_000_000  # the default of data.max_pixels


def made(path: Path, content: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in content:
            add(tar, name, data)
    return path


# --- archives ---------------------------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('trapped').touch()",)


@pytest.mark.parametrize("suffix", table.PICKLES)
def test_pickles_are_refused_by_name_and_never_run(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = made(tmp_path / "s.tar", [("a.png", encode(picture(0))), (f"a.{suffix}", pickle.dumps(Trap()))])
    with pytest.raises(ShardError, match=rf"s.tar at byte \d+: member 'a.{suffix}' is a pickle, which could run code"):
        Shards(tmp_path)
    assert not Path("trapped").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert Path("trapped").exists()  # the trap works
    assert path.exists()


def test_pickles_under_other_names_are_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "s.tar", [("a.png", pickle.dumps(Trap())), ("a.cls", b"1")])
    with pytest.raises(ImageError, match="not a JPEG, PNG or WebP image"):
        image.decode(Shards(tmp_path).read(0).image, LIMIT)
    made(tmp_path / "s.tar", [("a.png", encode(picture(0))), ("a.cls", pickle.dumps(Trap()))])
    index_file = tmp_path / index.MANIFEST
    index_file.unlink()
    with pytest.raises(ShardError, match="not a whole number"):
        Shards(tmp_path)
    assert not Path("trapped").exists()


def test_names_cannot_steer_the_terminal_or_break_the_line(tmp_path: Path) -> None:
    path = made(tmp_path / "s.tar", [("a\x1b[2J\nerror: all is well.cls", b"1")])
    with pytest.raises(ShardError) as error:
        table.scan(path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "field", [b"-0000001000\0", b"-10000000000", b"0_000000010\0", b"+0000001000\0", b"\xff" * 12, b"0x000000010\0"]
)
def test_sizes_that_are_no_octal_numbers_are_refused(tmp_path: Path, field: bytes) -> None:
    """A negative size would read everything at once, or go backwards for ever."""
    path = made(tmp_path / "s.tar", [("a.png", encode(picture(0)))])
    data = bytearray(path.read_bytes())
    data[124:136] = field.ljust(12, b"\0")[:12]
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 256)
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"s.tar at byte 0: bad size field"):
        table.scan(path)
    with pytest.raises(ShardError, match=r"s.tar at byte 0: bad size field"):
        list(members(path))


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with tarfile.open(tmp_path / "d" / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a.png", encode(picture(0)))
        add(tar, "../b.png", encode(picture(1)))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ShardError, match="leaves the archive"):
        Shards(tmp_path / "d")
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p not in before] in ([], ["s.tar.idx"])


# --- fuzz -------------------------------------------------------------------------------------------------------------


def mutated(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out) or 1)
        match rng.randrange(6):
            case 0 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + rng.choice((1, 8, 12, 512))] = rng.randbytes(rng.choice((1, 8, 12, 512)))
            case 2:
                del out[at:]
            case 3:
                del out[at : at + rng.choice((1, 100, 512, 1024))]
            case 4:
                out[at:at] = out[: rng.choice((1, 512, 1536))]
            case _:
                out[at : at + 12] = rng.choice(
                    (b"-0000001000\0", b"\x80" + b"\xff" * 11, b"77777777777\0", b"9" * 12, b"\0" * 12)
                )
        start = at // 512 * 512
        if rng.random() < 0.6 and len(out) >= start + 512:  # a sound checksum lets the damage go deeper
            block = out[start : start + 512]
            out[start + 148 : start + 156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)
    return bytes(out)


def test_fuzzed_archives_raise_typed_errors_only(tmp_path: Path) -> None:
    rng = random.Random(7)
    seeds = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "seed.tar", "w", format=form) as tar:
            for i in range(2):
                add(tar, f"{'ö' * 60}/{i}{'n' * 60}.png", encode(picture(i, 8, 8)))
                add(tar, f"{'ö' * 60}/{i}{'n' * 60}.json", b'{"label": 3}')
        seeds.append((tmp_path / "seed.tar").read_bytes())
    path, raised = tmp_path / "s.tar", 0
    for _ in range(3000):
        path.write_bytes(mutated(rng, rng.choice(seeds)))
        faults: list[ShardError] = []
        rows, size, _ = table.scan(path, faults.append)  # never raises
        assert all(512 <= r["image"] <= size - r["image_size"] for r in rows)
        assert all(str(fault).isprintable() and 0 <= fault.offset <= size for fault in faults)
        raised += bool(faults)
        with suppress(ShardError):
            assert len(list(members(path))) < 1000
    assert 1000 < raised < 3000


def test_fuzzed_indexes_raise_typed_errors_only(tmp_path: Path) -> None:
    rng = random.Random(11)
    folder = write_shards(tmp_path / "d", (3, 4))
    index.build(folder)
    files = [folder / index.MANIFEST, folder / "s-000.tar.idx", folder / "s-001.tar.idx"]
    good = [f.read_bytes() for f in files]
    body = table.HEAD.itemsize
    whole = {encode(picture(n)) for n in range(7)} | {str(n % 7).encode() for n in range(7)}
    raised = 0
    for turn in range(1500):
        which = turn % 3
        bad = mutated(rng, good[which])
        if which and rng.random() < 0.7 and len(bad) == len(good[which]):  # a crc does not keep an attacker out
            bad = bad[:24] + struct.pack("<I", zlib.crc32(bad[body:])) + bad[28:]
        elif not which and rng.random() < 0.5:
            key = rng.choice((b"samples", b"bytes"))
            value = rng.choice((b"-1", b"1" + b"0" * 30, b"true", b"1e400", b"NaN", b"9" * 5000, b"[" * 9, b"null"))
            at = good[0].rindex(key) + len(key) + 2
            bad = good[0][:at] + b" " + value + good[0][good[0].index(b",", at) :]
        files[which].write_bytes(bad)
        raised += 1
        with suppress(DataError):
            shards = Shards(folder, lambda text: None)
            for sample in range(min(len(shards), 9)):
                found = shards.read(sample)
                assert found.label >= -1
                assert found.image in whole
            raised -= 1
        files[which].write_bytes(good[which])
    assert raised > 750


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_fuzzed_images_raise_typed_errors_only(suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(13)
    good = encode(picture(1, 40, 40), suffix)
    for _ in range(400):
        with suppress(ImageError):
            pixels = image.decode(mutated(rng, good), 10**6)
            assert pixels.ndim == 3
            assert pixels.dtype == np.uint8
            assert pixels.size <= 3 * 10**6
    capfd.readouterr()  # the decoders' own complaints


# --- images -----------------------------------------------------------------------------------------------------------


def saved(pixels: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    pixels.save(file, form, **options)
    return file.getvalue()


SMOOTH = Image.fromarray(picture(3, 48, 64))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright_by_exif(form: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(
        SMOOTH, form, exif=exif, **({"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {})
    )
    with Image.open(io.BytesIO(data)) as picture_file:
        wanted = np.asarray(ImageOps.exif_transpose(picture_file).convert("RGB")).astype(int)
    found = image.decode(data, LIMIT)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).mean() < 1
    assert image._pillow(data, "RGB").shape == wanted.shape


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("RGBA", "WEBP")],
)
def test_other_colour_modes_equal_pillows_rgb(mode: str, form: str) -> None:
    data = saved(SMOOTH.convert(mode), form, **({"lossless": True} if form == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as again:
        wanted = np.asarray(again.convert("RGB")).astype(int)
    assert np.abs(image.decode(data, LIMIT) - wanted).max() <= 1


def test_cmyk_is_the_picture_and_not_its_negative() -> None:
    found = image.decode(saved(SMOOTH.convert("CMYK"), "JPEG", quality=95), LIMIT)
    assert np.abs(found.astype(int) - np.asarray(SMOOTH)).mean() < 12


def test_sixteen_bits_keep_the_upper_byte() -> None:
    deep = (np.arange(48 * 64).reshape(48, 64) * 21).astype(np.uint16)
    data = bytes(cv2.imencode(".png", deep)[1])
    assert np.array_equal(image.decode(data, LIMIT), np.repeat((deep >> 8)[..., None], 3, 2))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(form: str) -> None:
    others = [Image.fromarray(picture(n, 48, 64)) for n in range(5)]
    data = saved(SMOOTH, form, save_all=True, append_images=others, lossless=True)
    assert np.array_equal(image.decode(data, LIMIT), np.asarray(SMOOTH))


def test_cut_images_are_read_only_where_all_pixels_are_there(capfd: pytest.CaptureFixture[str]) -> None:
    png, jpeg, webp = (encode(np.asarray(SMOOTH), s) for s in (".png", ".jpg", ".webp"))
    assert np.array_equal(image.decode(png[:-12], LIMIT), np.asarray(SMOOTH))  # without its IEND chunk
    whole = image.decode(jpeg, LIMIT)
    assert np.array_equal(image.decode(jpeg + b"\0" * 3000, LIMIT), whole)
    for cut in (png[: len(png) // 2], jpeg[: len(jpeg) // 2], jpeg[:-40], webp[: len(webp) // 2], webp[:-20]):
        with pytest.raises(ImageError, match="the image is damaged"):
            image.decode(cut, LIMIT)
    capfd.readouterr()


def test_gray_filling_of_older_opencv_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = encode(np.asarray(SMOOTH), ".jpg")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.full((48, 64, 3), 128, np.uint8))
    assert image.decode(jpeg, LIMIT).max() == 128
    with pytest.raises(ImageError, match="truncated"):
        image.decode(jpeg[:-40], LIMIT)


def test_an_endless_progressive_jpeg_is_refused() -> None:
    data = saved(Image.fromarray(picture(1, 64, 64)), "JPEG", progressive=True)
    assert image.decode(data, LIMIT).shape == (64, 64, 3)
    at = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="more than 500 scans"):
        image.decode(data[:at] + data[at:-2] * 600 + b"\xff\xd9", LIMIT)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *between: bytes, colour: int = 2) -> bytes:
    rows = zlib.compress(bytes(1 << 20), 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(between) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BOMBS = """
import resource, sys, pathlib
from scaletrain.data import image
from scaletrain.data.errors import ImageError
image.decode(pathlib.Path(sys.argv[1]).read_bytes(), 10**6)  # loads the decoders
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[2:]:
    for decode in (image.decode, image.strict, image.decode_mask):
        try:
            decode(pathlib.Path(name).read_bytes(), 50_000_000)
        except ImageError:
            pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_take_little_memory(tmp_path: Path) -> None:
    text = zlib.compress(bytes(400 << 20), 9)
    webp = bytearray(saved(SMOOTH, "WEBP", lossless=True, exif=b"Exif\0\0" + bytes(20)))
    webp[24:30] = b"\0" * 6  # a canvas of one pixel around a larger frame
    jpeg = bytearray(encode(np.asarray(SMOOTH), ".jpg"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 20_000, 20_000)
    bombs = {
        "header": png(20_000, 20_000),
        "rows": png(7_000, 7_000),
        "wide": png(49_000_000, 1),
        "zTXt": png(30, 24, chunk(b"zTXt", b"c\0\0" + text)),
        "iTXt": png(30, 24, chunk(b"iTXt", b"c\0\1\0\0\0" + text)),
        "iCCP": png(30, 24, chunk(b"iCCP", b"c\0\0" + text)),
        "many": png(30, 24, *[chunk(b"zTXt", b"c%d\0\0" % i + text[:400_000]) for i in range(40)]),
        "jpeg": bytes(jpeg),
        "webp": bytes(webp),
    }
    (tmp_path / "good").write_bytes(encode(picture(1)))
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", BOMBS, tmp_path / "good", *(tmp_path / name for name in bombs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) <= 400, done.stderr  # 7,000 x 7,000 pixels, twice, are allowed; the rest is not


def test_archives_take_little_memory(tmp_path: Path) -> None:
    """Many large members of one key, and of kinds that are not read."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "a.png", encode(picture(0)))
        for i in range(12):
            add(tar, f"a.x{i}", bytes(50 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(table.scan(tmp_path / "s.tar")[0]) == 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < 256
