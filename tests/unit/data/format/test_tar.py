"""The tar parser and the index: what is read, and that every fault ends in one error that names
shard and byte.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from kit.data import add, encode, picture, write_shards

from scaletrain.data.errors import DataError, ImageError, ShardError
from scaletrain.data.format import index, offsets
from scaletrain.data.reading.reader import Shards
from scaletrain.data.transforms import image

PNG = encode(picture(0))


def tar_of(
    path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def refused(path: Path, words: str) -> ShardError:
    with pytest.raises(ShardError, match=words) as caught:
        offsets.scan(path)
    assert str(path) in str(caught.value)
    assert f"at byte {caught.value.offset}" in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_rows_equal_what_tarfile_reads(tmp_path: Path, format: int) -> None:
    long = (
        "d" * 90 + "/" + "k" * 60 if format == tarfile.USTAR_FORMAT else "d" * 200 + "/" + "k" * 150
    )
    members = [
        ("a.json", b'{"label": 12, "text": "x"}'),
        ("a.png", PNG),
        ("x/b.v1.txt".replace(".v1", ""), b"note"),
        ("x/b.JPEG", encode(picture(1), ".jpg")),
        (f"{long}.png", PNG),
        (f"{long}.mask.png", PNG),
        (f"{long}.cls", b" 3\n"),
    ]
    path = tar_of(tmp_path / "s.tar", members, format)
    rows, size, sha = offsets.scan(path)
    with tarfile.open(path) as tar:
        true = {
            m.name: (m.offset_data, m.size, zlib.crc32(tar.extractfile(m).read()))
            for m in tar.getmembers()
        }
    assert [tuple(r)[:3] for r in rows.tolist()] == [
        true["a.png"],
        true["x/b.JPEG"],
        true[f"{long}.png"],
    ]
    assert rows["label"].tolist() == [12, -1, 3]
    assert tuple(rows[2].item())[6:9] == true[f"{long}.mask.png"]
    assert tuple(rows[1].item())[3:9] == (0,) * 6
    assert size == path.stat().st_size
    import hashlib

    assert sha == hashlib.sha256(path.read_bytes()).hexdigest()


def test_directories_are_skipped_and_unicode_names_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("./tier")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add(tar, "./tier/größe.png", PNG)
    assert len(offsets.scan(tmp_path / "s.tar")[0]) == 1


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
    ],
)
def test_special_members_are_refused(tmp_path: Path, kind: bytes, words: str) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        add(tar, "a.png", PNG)
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    assert refused(tmp_path / "s.tar", words).offset == 512 + -(-len(PNG) // 512) * 512


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "x/../../a.png"])
def test_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    refused(tar_of(tmp_path / "s.tar", [(name, PNG)], tarfile.PAX_FORMAT), "leaves the archive")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.png", PNG), ("b.png", PNG), ("a.cls", b"1")], "key 'a' occurs twice"),
        ([("a.png", PNG), ("a.png", PNG)], "two members of one kind"),
        ([("a.png", PNG), ("a.jpg", PNG)], "two members of one kind"),
        ([("a.cls", b"1"), ("b.png", PNG)], "sample 'a' has no image"),
        ([("a.png", PNG), ("a.pyd", b"cos\nsystem\n")], "a.pyd.*not read"),
        ([("a.png", PNG), ("a.pth", b"PK")], "a.pth.*not read"),
    ],
)
def test_bad_samples_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], words: str
) -> None:
    refused(tar_of(tmp_path / "s.tar", members), words)


def cut(data: bytearray) -> dict[str, tuple[bytes, str]]:
    """Ways of damaging an archive of three samples of one block header and `body` bytes each."""
    unit = 512 + -(-len(PNG) // 512) * 512
    changed = {}
    changed["at a header"] = bytes(data[: 2 * unit]), "end-of-archive marker is missing"
    changed["inside a header"] = bytes(data[: 2 * unit + 200]), "header is cut short"
    changed["inside a payload"] = bytes(data[: 2 * unit + 512 + 100]), "past the end"
    changed["inside the end marker"] = (
        bytes(data[: 3 * unit + 600]),
        "end-of-archive marker is cut short",
    )
    bad = data.copy()
    bad[unit + 3] ^= 1
    changed["header bit"] = bytes(bad), "bad header checksum"
    hole = data.copy()
    hole[unit : 2 * unit] = bytes(unit)
    changed["zero hole"] = bytes(hole), "data after the end|zeroed header"
    changed["tail"] = bytes(data) + b"x", "data after the end"
    huge = data.copy()
    huge[unit + 124 : unit + 136] = b"\x80" + (10**12).to_bytes(11, "big")
    huge[unit + 148 : unit + 156] = b" " * 8
    huge[unit + 148 : unit + 156] = b"%06o\0 " % sum(huge[unit : unit + 512])
    changed["huge size"] = bytes(huge), "past the end"
    return changed


DAMAGES = (
    "at a header",
    "inside a header",
    "inside a payload",
    "inside the end marker",
    "header bit",
    "zero hole",
    "tail",
    "huge size",
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_archives_are_refused(tmp_path: Path, damage: str) -> None:
    path = tar_of(tmp_path / "s.tar", [(f"{k}.png", PNG) for k in "abc"])
    broken, words = cut(bytearray(path.read_bytes()))[damage]
    path.write_bytes(broken)
    refused(path, words)


def test_long_name_bombs_and_sparse_records_are_refused(tmp_path: Path) -> None:
    refused(
        tar_of(tmp_path / "s.tar", [("n" * 200_000 + ".png", PNG)], tarfile.GNU_FORMAT),
        "at most 65536",
    )
    with tarfile.open(tmp_path / "p.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={}) as tar:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = len(PNG), {"GNU.sparse.major": "1"}
        tar.addfile(info, io.BytesIO(PNG))
    refused(tmp_path / "p.tar", "GNU.sparse.major.*refused")


def test_members_above_the_cap_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaletrain.data.format.tar.MEMBER_BYTES", 100)
    refused(tar_of(tmp_path / "s.tar", [("a.png", PNG)]), "at most 100")


# --- index and reader -----------------------------------------------------------------------------


def test_first_use_indexes_once_and_reads_every_sample(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "d", (5, 1, 3), masks=True)
    said: list[str] = []
    shards = Shards(folder, said.append)
    assert len(said) == 1
    assert len(shards) == 9
    assert shards.counts.tolist() == [5, 1, 3]
    for number in (8, 0, 5, 4, 6):
        sample = shards.read(number, mask=True)
        assert sample.image == encode(picture(number))
        assert sample.label == number % 7
        assert sample.mask is not None
    assert Shards(folder, said.append).read(3).mask is None
    assert len(said) == 1
    assert not list(folder.glob(".*"))  # no temporary files stay
    shards.close()


def _index(folder: Path) -> None:
    index.load(folder, lambda text: None)


def test_several_processes_may_index_at_once(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "d", (4, 4))
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_index, args=(folder,)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert len(Shards(folder)) == 8


def test_altered_shards_are_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "d", (3, 3))
    shards = Shards(folder)
    path = folder / "s-001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    for use in (shards.check, lambda: Shards(folder).read(4)):
        with pytest.raises(
            ShardError,
            match=r"s-001.tar.*truncated or altered after indexing; run scaletrain shards index "
            r"--force",
        ):
            use()
    assert shards.read(0).label == 0
    flipped = bytearray(whole)
    rows, _, _ = (path.write_bytes(whole), *offsets.scan(path))[1:]
    at = int(rows[1]["image"])
    flipped[at + 40] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(ShardError, match=f"s-001.tar at byte {at}: the content of '00004'.*crc32"):
        Shards(folder).read(4)
    assert Shards(folder).read(3).label == 3


def test_index_faults_are_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "d", (3, 3))
    index.build(folder)
    side = folder / "s-000.tar.stidx"
    good = side.read_bytes()
    for bad in (good[:-1], b"X" + good[1:], good[:60] + bytes([good[60] ^ 1]) + good[61:]):
        side.write_bytes(bad)
        with pytest.raises(ShardError, match=r"s-000.tar.stidx.*--force"):
            Shards(folder).read(0)
    side.unlink()
    with pytest.raises(ShardError, match=r"s-000.tar.stidx.*--force"):
        Shards(folder).read(0)
    index.build(folder, force=True)
    assert Shards(folder).read(0).label == 0

    manifest = folder / index.MANIFEST
    for text in (
        "{",
        "[]",
        '{"version": 9, "shards": []}',
        '{"version": 2, "shards": [{"name": "x"}]}',
    ):
        manifest.write_text(text)
        with pytest.raises(DataError, match=r"scaletrain-index.json.*--force"):
            Shards(folder)
    entry = {"name": "../s-000.tar", "samples": 3, "bytes": 1, "sha256": ""}
    manifest.write_text(json.dumps({"version": 2, "shards": [entry]}))
    with pytest.raises(DataError, match="outside its folder"):
        Shards(folder)


def test_folder_and_manifest_must_agree(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "d", (3, 3))
    index.build(folder)
    (folder / "s-000.tar").rename(folder / "t.tar")
    with pytest.raises(
        DataError, match=r"s-000.tar is in scaletrain-index.json but not in the folder"
    ):
        Shards(folder)
    (folder / "t.tar").rename(folder / "s-000.tar")
    (folder / "extra.tar").write_bytes((folder / "s-000.tar").read_bytes())
    with pytest.raises(DataError, match=r"extra.tar is not in scaletrain-index.json"):
        Shards(folder)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data folder"):
        Shards(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no \.tar shards; write"):
        Shards(tmp_path)
    write_shards(tmp_path / "train", (2,))
    with pytest.raises(DataError, match=rf"did you mean {tmp_path}/train"):
        Shards(tmp_path)


def test_many_shards_stay_within_the_open_files(tmp_path: Path) -> None:
    shards = Shards(write_shards(tmp_path / "d", (1,) * 6), keep=2)
    assert [shards.read(i).label for i in (0, 1, 2, 3, 4, 5, 0, 3)] == [0, 1, 2, 3, 4, 5, 0, 3]
    assert len(shards._open) == 2


# --- image headers --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_size_is_read_from_the_header(suffix: str) -> None:
    data = encode(picture(1, 37, 53), suffix)
    assert image.size(data) == (37, 53)
    assert image.kind(data) == suffix[1:]
    assert image.decode(data, 37 * 53).shape == (37, 53, 3)
    with pytest.raises(ImageError, match=r"53 x 37 pixels are more than data.max_pixels=100"):
        image.decode(data, 100)


def test_size_of_other_jpeg_and_webp_kinds() -> None:
    from PIL import Image

    pixels = Image.fromarray(picture(2, 40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    for format, options in (
        ("JPEG", {"progressive": True, "exif": exif}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": exif}),
    ):
        file = io.BytesIO()
        pixels.save(file, format, **options)
        assert image.size(file.getvalue()) == (40, 60)
        if format == "JPEG":
            assert image.decode(file.getvalue(), 10**6).shape == (60, 40, 3)


def test_gray_cmyk_palette_alpha_and_deep_images_become_rgb() -> None:
    from PIL import Image

    pixels = Image.fromarray(picture(3, 16, 16))
    for mode, format in (
        ("L", "PNG"),
        ("CMYK", "JPEG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("L", "JPEG"),
    ):
        file = io.BytesIO()
        (pixels.convert("L").convert("I;16") if mode == "I;16" else pixels.convert(mode)).save(
            file, format
        )
        out = image.decode(file.getvalue(), 10**6)
        assert out.shape == (16, 16, 3), (mode, format)
        assert out.dtype == np.uint8
        if mode == "CMYK":
            assert np.abs(out.astype(int) - picture(3, 16, 16)).mean() < 12


def test_other_formats_and_broken_images_are_refused() -> None:
    bmp = encode(picture(1), ".bmp")
    jpeg = encode(picture(1, 200, 200), ".jpg")
    for bad in (
        b"",
        bmp,
        b"GIF89a",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        jpeg[:20],
        b"RIFF1234WEBPVP8 ",
    ):
        with pytest.raises(ImageError, match="not a JPEG, PNG or WebP image"):
            image.decode(bad, 10**6)
    with pytest.raises(ImageError, match="damaged"):
        image.strict(jpeg[: len(jpeg) // 2], 10**6)
