"""The manifest in pieces: the same shards wherever it is cut, and refusals that name the fault."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path

import pytest
from kit.data import write_shards

from scaletrain.data.errors import DataError
from scaletrain.data.format import index, manifest, offsets
from scaletrain.data.reading.reader import Shards

SHARDS = [
    {"name": f"s-{n:0{1 + n % 4}d}}},é.tar", "samples": n, "bytes": 512 * n, "sha256": f"{n:064x}"}
    for n in range(50)
]


def parse(text: str) -> manifest.ShardManifest:
    return manifest.parse(io.BytesIO(text.encode()), "WHERE", "FIX")


def text_of(shards: object, **options: object) -> str:
    return json.dumps({"version": 2, "samples": 0, "shards": shards}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("piece", [1, 7, 100, 1000, 1 << 20])
@pytest.mark.parametrize("options", [{"indent": 0}, {}, {"indent": 2, "ensure_ascii": False}])
def test_pieces_change_nothing(
    piece: int, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "PIECE", piece)
    found = parse(text_of(SHARDS, **options))
    assert list(found) == SHARDS
    assert found[3:5] == SHARDS[3:5]
    assert found.samples.tolist() == list(range(50))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "WHERE cannot be read"),
        (text_of(SHARDS, indent=0)[:-9], "WHERE cannot be read"),
        (
            text_of(SHARDS, indent=0).replace('"version": 2', '"version": 1'),
            "not a version 2 manifest",
        ),
        (
            json.dumps({"version": 2, "more": SHARDS, "shards": []}, indent=0),
            "not a version 2 manifest",
        ),
        (text_of([*SHARDS, SHARDS[7]], indent=0), "names a shard twice"),
        (text_of([*SHARDS, {**SHARDS[7], "samples": True}], indent=0), "malformed entry"),
        (text_of([*SHARDS, {**SHARDS[7], "sha256": "0" * 65}], indent=0), "malformed entry"),
        (text_of([*SHARDS, {**SHARDS[7], "samples": -1}], indent=0), "impossible length"),
        (text_of([*SHARDS, {**SHARDS[7], "name": "../x.tar"}], indent=0), "outside its folder"),
        (text_of([*SHARDS, {**SHARDS[7], "name": "x" * 256}], indent=0), "outside its folder"),
        (text_of([*SHARDS, 5], indent=0), "malformed entry"),
    ],
)
def test_faults_are_named(text: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PIECE", 300)
    with pytest.raises(DataError, match=rf"^WHERE.*{fault.removeprefix('WHERE ')}.*; FIX$"):
        parse(text)


def test_a_large_manifest_takes_the_memory_of_its_columns() -> None:
    shards = [
        {"name": f"s-{n:06d}.tar", "samples": 1, "bytes": 512, "sha256": f"{n:064x}"}
        for n in range(30_000)
    ]
    file = io.BytesIO(text_of(shards, indent=0).encode())
    del shards
    tracemalloc.start()
    try:
        assert len(manifest.parse(file, "", "")) == 30_000
        assert (
            tracemalloc.get_traced_memory()[1] < 30_000 * 300 + 4 * manifest.PIECE
        )  # dictionaries take 600 a shard
    finally:
        tracemalloc.stop()


def test_tables_are_read_when_first_used_and_few_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(tmp_path / "d", (3,) * 10)
    index.build(folder)
    loaded: list[str] = []
    right = offsets.load

    def counted(path: Path, *facts: int, **options: bool) -> offsets.OffsetRows:
        loaded.append(path.name)
        return right(path, *facts, **options)

    monkeypatch.setattr(offsets, "load", counted)
    shards = Shards(folder, keep=4)
    shards.check()
    assert (len(shards), loaded) == (30, [])
    for sample in (4, 5, 3, 29):
        shards.read(sample)
    assert loaded == ["s-001.tar.stidx", "s-009.tar.stidx"]
    for sample in range(30):
        shards.read(sample)
        assert len(shards._open) <= 4
