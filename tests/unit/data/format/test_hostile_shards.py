"""Hostile archives, indexes and images: typed errors only, no code run, nothing written elsewhere,
memory and time bounded.
"""

from __future__ import annotations

import pickle
import random
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from kit.data import add, encode, picture, write_shards

from scaletrain.data.errors import DataError, ImageError, ShardError
from scaletrain.data.format import index, offsets
from scaletrain.data.reading.reader import Shards
from scaletrain.data.transforms import image
from scaletrain.importers.tar_source import members

LIMIT = 50_000_000  # the default of data.max_pixels


def made(path: Path, content: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in content:
            add(tar, name, data)
    return path


# --- archives -------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('trapped').touch()",)


@pytest.mark.parametrize("suffix", offsets.PICKLES)
def test_pickles_are_refused_by_name_and_never_run(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = made(
        tmp_path / "s.tar", [("a.png", encode(picture(0))), (f"a.{suffix}", pickle.dumps(Trap()))]
    )
    with pytest.raises(
        ShardError,
        match=rf"s.tar at byte \d+: member 'a.{suffix}' is a pickle, which could run code",
    ):
        Shards(tmp_path)
    assert not Path("trapped").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert Path("trapped").exists()  # the trap works
    assert path.exists()


def test_pickles_under_other_names_are_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "s.tar", [("a.png", pickle.dumps(Trap())), ("a.cls", b"1")])
    with pytest.raises(ImageError, match="not a JPEG, PNG or WebP image"):
        image.decode(Shards(tmp_path).read(0).image, LIMIT)
    made(tmp_path / "s.tar", [("a.png", encode(picture(0))), ("a.cls", pickle.dumps(Trap()))])
    index_file = tmp_path / index.MANIFEST
    index_file.unlink()
    assert Shards(tmp_path).read(0).label == -1
    assert not Path("trapped").exists()


def test_names_cannot_steer_the_terminal_or_break_the_line(tmp_path: Path) -> None:
    path = made(tmp_path / "s.tar", [("a\x1b[2J\nerror: all is well.cls", b"1")])
    with pytest.raises(ShardError) as error:
        offsets.scan(path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "field",
    [
        b"-0000001000\0",
        b"-10000000000",
        b"0_000000010\0",
        b"+0000001000\0",
        b"\xff" * 12,
        b"0x000000010\0",
    ],
)
def test_sizes_that_are_no_octal_numbers_are_refused(tmp_path: Path, field: bytes) -> None:
    """A negative size would read everything at once, or go backwards for ever."""
    path = made(tmp_path / "s.tar", [("a.png", encode(picture(0)))])
    data = bytearray(path.read_bytes())
    data[124:136] = field.ljust(12, b"\0")[:12]
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 256)
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"s.tar at byte 0: bad size field"):
        offsets.scan(path)
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
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p not in before] in ([], ["s.tar.stidx"])


# --- fuzz -----------------------------------------------------------------------------------------


def mutated(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out) or 1)
        match rng.randrange(6):
            case 0 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + rng.choice((1, 8, 12, 512))] = rng.randbytes(
                    rng.choice((1, 8, 12, 512))
                )
            case 2:
                del out[at:]
            case 3:
                del out[at : at + rng.choice((1, 100, 512, 1024))]
            case 4:
                out[at:at] = out[: rng.choice((1, 512, 1536))]
            case _:
                out[at : at + 12] = rng.choice(
                    (
                        b"-0000001000\0",
                        b"\x80" + b"\xff" * 11,
                        b"77777777777\0",
                        b"9" * 12,
                        b"\0" * 12,
                    )
                )
        start = at // 512 * 512
        if (
            rng.random() < 0.6 and len(out) >= start + 512
        ):  # a sound checksum lets the damage go deeper
            block = out[start : start + 512]
            out[start + 148 : start + 156] = b"%06o\0 " % (
                sum(block[:148]) + sum(block[156:]) + 256
            )
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
        rows, size, _ = offsets.scan(path, faults.append)  # never raises
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
    files = [folder / index.MANIFEST, folder / "s-000.tar.stidx", folder / "s-001.tar.stidx"]
    good = [f.read_bytes() for f in files]
    body = offsets.HEAD.itemsize
    whole = {encode(picture(n)) for n in range(7)} | {str(n % 7).encode() for n in range(7)}
    raised = 0
    for turn in range(1500):
        which = turn % 3
        bad = mutated(rng, good[which])
        if (
            which and rng.random() < 0.7 and len(bad) == len(good[which])
        ):  # a crc does not keep an attacker out
            bad = bad[:24] + struct.pack("<I", zlib.crc32(bad[body:])) + bad[28:]
        elif not which and rng.random() < 0.5:
            key = rng.choice((b"samples", b"bytes"))
            value = rng.choice(
                (b"-1", b"1" + b"0" * 30, b"true", b"1e400", b"NaN", b"9" * 5000, b"[" * 9, b"null")
            )
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
def test_fuzzed_images_raise_typed_errors_only(
    suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(13)
    good = encode(picture(1, 40, 40), suffix)
    for _ in range(400):
        with suppress(ImageError):
            pixels = image.decode(mutated(rng, good), 10**6)
            assert pixels.ndim == 3
            assert pixels.dtype == np.uint8
            assert pixels.size <= 3 * 10**6
    capfd.readouterr()  # the decoders' own complaints


def test_archives_take_little_memory(tmp_path: Path) -> None:
    """Many large members of one key, and of kinds that are not read."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "a.png", encode(picture(0)))
        for i in range(12):
            add(tar, f"a.x{i}", bytes(50 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(offsets.scan(tmp_path / "s.tar")[0]) == 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < 256
