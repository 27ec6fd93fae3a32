"""The index of a folder: a name and a version of its own, what it remembers, and what else may lie
in the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kit.data import add, encode, picture, write_shards
from kit.importing import ROOT
from kit.remote import serving

from scaletrain.config.schema import CacheConfig
from scaletrain.data.errors import DataError, ShardError
from scaletrain.data.format import index, manifest, offsets
from scaletrain.data.format.verify import verify
from scaletrain.data.reading import concat
from scaletrain.data.reading.reader import Shards
from scaletrain.data.storage import http

FOREIGN = {  # of litdata, of streaming, and of no tool in particular
    "litdata": {
        "chunks": [{"chunk_bytes": 9, "filename": "chunk-0-0.bin"}],
        "config": {"compression": None},
    },
    "streaming": {"shards": [{"column_names": ["x"], "format": "mds"}], "version": 2},
    "list": [1, 2],
}


def quiet(text: str) -> None:
    pass


def old_index(folder: Path) -> Path:
    """As version 1 left it: index.json and NAME.idx."""
    entries = [
        {"name": p.name, "samples": 3, "bytes": p.stat().st_size, "sha256": "0" * 64}
        for p in folder.glob("*.tar")
    ]
    (folder / "index.json").write_text(
        json.dumps({"version": 1, "samples": 6, "shards": entries}, indent=0)
    )
    for path in folder.glob("*.tar"):
        path.with_name(path.name + ".idx").write_bytes(b"STIDX\0\0\1" + bytes(24))
    return folder / "index.json"


@pytest.mark.parametrize("tool", FOREIGN)
def test_index_files_of_other_tools_are_left_alone(tmp_path: Path, tool: str) -> None:
    folder = write_shards(tmp_path / "d", (3, 3))
    theirs = {
        folder / "index.json": json.dumps(FOREIGN[tool]),
        folder / "s-000.tar.idx": "0 1 2\n",
        folder / "s-000.idx": "v1",
    }
    for path, text in theirs.items():
        path.write_text(text)
    said: list[str] = []
    assert Shards(folder, said.append).read(4).label == 4
    assert len(said) == 1
    assert "has no index yet" in said[0]
    index.build(folder, force=True)
    assert {path: path.read_text() for path in theirs} == theirs
    assert sorted(p.name for p in folder.glob("*.stidx")) == ["s-000.tar.stidx", "s-001.tar.stidx"]


@pytest.mark.parametrize("writable", [True, False])
def test_an_index_of_an_older_version_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    folder = write_shards(tmp_path / "d", (3, 3))
    old = old_index(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if not writable:
        right = os.access
        monkeypatch.setattr(
            "os.access", lambda path, mode: Path(path) != folder and right(path, mode)
        )
    said: list[str] = []
    assert [Shards(folder, said.append).read(i).label for i in range(6)] == [0, 1, 2, 3, 4, 5]
    place = index.home(folder)
    assert (place == folder) is writable
    assert said == [
        f"{old} is the index of an older version and no longer used: reading every shard once to "
        f"make it in {place}"
    ]
    assert {
        path: path.read_bytes() for path in before
    } == before  # a run of that version may still read it
    assert len(Shards(folder, said.append)) == 6
    assert len(said) == 1
    text = (place / index.MANIFEST).read_text()
    (place / index.MANIFEST).write_text(
        text.replace(f'"version": {manifest.VERSION}', '"version": 1')
    )
    assert len(Shards(folder, said.append)) == 6
    assert len(said) == 2
    assert (index.home(folder) / index.MANIFEST).read_text() == text
    newer = text.replace(f'"version": {manifest.VERSION}', f'"version": {manifest.VERSION + 1}')
    (place / index.MANIFEST).write_text(newer)
    with pytest.raises(
        DataError,
        match=rf"not a version {manifest.VERSION} manifest; remake it with scaletrain shards index "
        r"--force",
    ):
        Shards(folder)


def test_an_older_index_at_an_address_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "sleep", lambda seconds: None)
    folder = write_shards(tmp_path / "d", (3, 3))
    old_index(folder)
    with (
        serving(folder) as web,
        pytest.raises(
            DataError, match=r"HTTP 404 .*older version: run scaletrain shards index on .*upload it"
        ),
    ):
        Shards(web.url, cache=CacheConfig(path=str(tmp_path)))


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "d", (3, 3))
    first = Shards(folder, quiet).fingerprint
    index.build(folder, force=True)
    assert Shards(folder).fingerprint == first
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.json", "*.stidx"))
    assert Shards(tmp_path / "copy", quiet).fingerprint == first
    both = Shards([f"{folder}/s-000.tar", f"{folder}/s-001.tar"])
    one = Shards(f"{folder}/s-000.tar")
    assert both.fingerprint == first != one.fingerprint
    path = folder / "s-000.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    index.build(folder, force=True)
    assert Shards(folder).fingerprint != first


def test_samples_have_the_hash_of_their_key(tmp_path: Path) -> None:
    import hashlib
    import tarfile

    names = ("a/ä.v.png", "0.png", "n" * 150 + ".png")
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for n, name in enumerate(names):
            add(tar, name, encode(picture(n)))
    rows = offsets.scan(tmp_path / "s.tar")[0]
    keys = ["a/ä.v", "0", "n" * 150]
    wanted = [
        int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        for key in keys
    ]
    assert rows["key"].tolist() == wanted


# --- what is no shard, or no index ----------------------------------------------------------------


def test_what_may_be_taken_for_a_shard_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "d", (3, 3))
    for name in (
        "more.tar.gz",
        "more.tgz",
        "x.tar.zst",
        "y.tar.bz2",
        "z.tar.xz",
        "._s-000.tar",
        "notes.txt",
    ):
        (folder / name).write_bytes(b"x")
    write_shards(folder / "part2", (2,))
    (folder / "empty").mkdir()
    said: list[str] = []
    assert len(Shards(folder, said.append)) == 6
    assert said[:3] == [
        f"{folder}: not read, since compressed: more.tar.gz, more.tgz, x.tar.zst, y.tar.bz2, "
        "z.tar.xz; "
        "decompress what belongs to the data set",
        f"{folder}: not read, since hidden: ._s-000.tar",
        f"{folder}: not read are the shards in its folders: part2",
    ]
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"packed holds no .tar shards; a.tar.gz must be decompressed first"
    ):
        Shards(tmp_path / "packed")


def test_pipes_folders_and_loops_among_shards_are_named_at_once(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "d", (3, 3))
    odd = folder / "odd.tar"
    for make, text in (
        (lambda: os.mkfifo(odd), "it is a pipe and not a file"),
        (odd.mkdir, "Is a directory"),
        (lambda: odd.symlink_to(odd), "Too many levels of symbolic links"),
        (lambda: odd.symlink_to("/dev/zero"), "it is a device and not a file"),
        (lambda: odd.symlink_to(tmp_path / "gone"), "No such file"),
    ):
        make()
        for skip in (False, True):
            with pytest.raises(ShardError, match=rf"odd.tar at byte 0: cannot be read: {text}"):
                Shards(folder, quiet, skip=skip)
        odd.rmdir() if odd.is_dir() else odd.unlink()
    shards = Shards(folder, quiet)
    (folder / "s-001.tar").unlink()
    os.mkfifo(folder / "s-001.tar")
    with pytest.raises(ShardError, match=r"s-001.tar at byte 0: cannot be read: it is a pipe"):
        shards.read(4)
    assert "s-001.tar at byte 0: cannot be read: it is a pipe" in str(
        verify(folder, 10**6).faults[0]
    )
    for name, fault in (
        (index.MANIFEST, "cannot be read"),
        ("classes.json", "cannot be read"),
        ("s-000.tar.stidx", "at byte 0"),
    ):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(DataError, match=rf"{name} {fault}.*it is a pipe and not a file"):
            concat.classes(folder) if name == "classes.json" else Shards(folder).read(0)
        (folder / name).unlink()
        if name == index.MANIFEST:
            (folder / "s-001.tar").unlink()
            index.build(folder)


LIMITS = """
import resource, sys
from pathlib import Path
from scaletrain.data.format import manifest
from scaletrain.data.reading import concat
from scaletrain.data.errors import DataError
from scaletrain.data.reading.reader import Shards
# a twentieth, for the time that it takes
manifest.MOST_BYTES, manifest.MOST_SAMPLES = 10 << 20, 1 << 20
Shards(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF)
for folder in sys.argv[2:]:
    try:
        concat.classes(folder)
        Shards(folder).read(0)
        print("no error", folder)
    except DataError as error:
        print(str(error))
after = resource.getrusage(resource.RUSAGE_SELF)
print((after.ru_maxrss - before.ru_maxrss) // 1024, after.ru_utime - before.ru_utime)
"""


def test_indexes_without_bound_take_little_memory(tmp_path: Path) -> None:
    good = write_shards(tmp_path / "good", (3,))
    index.build(good)
    entry = json.loads((good / index.MANIFEST).read_text())["shards"][0]
    head = b'{\n"version": 2,\n"samples": 1,\n"shards": [\n'
    many = b",\n".join(
        json.dumps({**entry, "name": f"{n}.tar"}, indent=0).encode() for n in range(5000)
    )
    samples = 1 << 20
    huge = {"name": "s-000.tar", "samples": samples, "bytes": 512 * samples, "sha256": "0" * 64}
    faults = {
        "long": (index.MANIFEST, head + b"[" * (8 << 20)),
        "flat": (index.MANIFEST, head + b"{}," * (2 << 20)),
        "wide": (
            index.MANIFEST,
            head + json.dumps({**huge, "samples": samples + 1}).encode() + b"]}",
        ),
        "deep": (index.MANIFEST, b"[" * 100_000),
        "endless": (index.MANIFEST, None),
        "many": (index.MANIFEST, head + (many + b",\n") * 15),
        "table": (index.MANIFEST, head + json.dumps(huge).encode() + b"]}"),
        "classes": ("classes.json", b'["' + b"x" * (17 << 20)),
        "objects": ("classes.json", b"[" + b"{}," * (4 << 20)),
    }
    for name, (file, content) in faults.items():
        folder = shutil.copytree(good, tmp_path / name)
        (folder / file).unlink(missing_ok=True)
        if content is None:
            (folder / file).symlink_to("/dev/zero")
        else:
            (folder / file).write_bytes(content)
    with (tmp_path / "table" / "s-000.tar.stidx").open("r+b") as sparse:
        sparse.truncate(offsets.HEAD.itemsize + samples * offsets.ROW.itemsize)
    with (tmp_path / "table" / "s-000.tar").open("r+b") as sparse:
        sparse.truncate(512 * samples)
    command = [sys.executable, "-c", LIMITS, good, *(tmp_path / name for name in faults)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    *lines, figures = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == len(faults)
    for line, (name, (file, _)) in zip(lines, faults.items(), strict=True):
        assert line.startswith(
            f"{tmp_path}/{name}/{'s-000.tar.stidx' if name == 'table' else file} "
        ), line
    memory, seconds = figures.split()
    assert int(memory) < 300
    assert float(seconds) < 5


def test_names_of_classes_are_read_beside_any_choice_of_shards(tmp_path: Path) -> None:
    assert concat.classes(tmp_path) is None
    for text in (
        b'["cat", "dog"]',
        b'{"0": "cat"}',
        b"[1, 2",
        b'["a \\"b\\" [c]", ' + b'"x", ' * (1 << 19) + b'"y"]',
    ):
        (tmp_path / "classes.json").write_bytes(text)
        assert concat.classes(f"{tmp_path}/x-*.tar") == text  # who needs them says what is wrong
    (tmp_path / "classes.json").write_bytes(b"[" + b"{}," * (1 << 19) + b"{}]")
    with pytest.raises(
        DataError, match=r"classes.json is no JSON list of names; restore it, or delete it"
    ):
        concat.classes(tmp_path)
