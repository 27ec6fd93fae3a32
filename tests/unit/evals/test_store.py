"""Features on disk: whole or encoded again after any kill, of bounded size, and never deleted in
use.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scaletrain import exit_codes
from scaletrain.evals import store
from scaletrain.evals.errors import EvalError
from scaletrain.evals.store import Entry, FeatureStore, Layout

SAMPLES, WIDTH, ROWS = 70, 6, 16
CHUNKS = 5
BYTES = 4 * SAMPLES * WIDTH


def features(seed: int = 0) -> Tensor:
    return torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(seed))


def entry(folder: Path, name: str = "a", limit: int = 10**6) -> Entry:
    return FeatureStore(folder, limit).entry({"name": name}, SAMPLES)


@contextmanager
def begun(one: Entry, skip: bool = False) -> Iterator[tuple[Layout, list[int]]]:
    with one.encoding() as mine:
        assert mine
        yield one.begin(lambda: WIDTH, ROWS, skip)


def put(one: Entry, x: Tensor, *chunks: int, left_out: dict[int, str] | None = None) -> None:
    with begun(one) as (layout, _):
        for chunk in chunks:
            lo, hi = layout.part(chunk)
            bad = {n: why for n, why in (left_out or {}).items() if lo <= n < hi}
            one.write(layout, chunk, x[lo:hi], bad, rank=chunk % 2)


def filled(folder: Path, name: str, limit: int = 10**6) -> Entry:
    one = entry(folder, name, limit)
    put(one, features(), *range(CHUNKS))
    return one


def missing(one: Entry, skip: bool = False) -> list[int]:
    with begun(one, skip) as (_, chunks):
        return chunks


def stored(one: Entry, skip: bool = False) -> Tensor:
    actual = one.read(skip)
    assert actual is not None
    return actual.x


# --- what is complete -----------------------------------------------------------------------------


def test_features_are_there_once_all_chunks_are(tmp_path: Path) -> None:
    one, x = entry(tmp_path / "features"), features()
    assert one.read(skip=False) is None
    assert not (tmp_path / "features").exists()
    put(one, x, 3, 0, 4)
    assert entry(tmp_path / "features").read(skip=False) is None
    assert missing(one) == [1, 2]
    put(one, x, 2, 1)
    assert stored(entry(tmp_path / "features")).equal(x)


def test_what_a_benchmark_changes_stays_in_its_process(tmp_path: Path) -> None:
    one = filled(tmp_path, "a")
    stored(one).zero_()
    assert stored(one).equal(features())


@pytest.mark.parametrize(
    ("place", "expected"),
    [(0, [0]), (4 * WIDTH * ROWS - 1, [0]), (4 * WIDTH * ROWS, [1]), (BYTES - 1, [4])],
)
def test_a_changed_byte_is_encoded_again(tmp_path: Path, place: int, expected: list[int]) -> None:
    one = filled(tmp_path, "a")
    raw = bytearray((one.folder / "x.f32").read_bytes())
    raw[place] ^= 1
    (one.folder / "x.f32").write_bytes(raw)
    assert one.read(skip=False) is None
    assert missing(one) == expected
    put(one, features(), *expected)
    assert stored(one).equal(features())


def test_a_torn_record_is_encoded_again(tmp_path: Path) -> None:
    one = filled(tmp_path, "a")
    records = one.folder / "chunks-1.jsonl"
    records.write_bytes(records.read_bytes()[:-5])
    assert missing(one) == [3]
    put(one, features(), 3)  # a whole line, after what is left of the torn one
    assert stored(one).equal(features())


def test_a_file_that_was_cut_is_encoded_again(tmp_path: Path) -> None:
    one = filled(tmp_path, "a")
    os.truncate(one.folder / "x.f32", BYTES // 2)
    assert one.read(skip=False) is None
    assert missing(one) == [2, 3, 4]


def test_a_foreign_entry_is_refused(tmp_path: Path) -> None:
    one = filled(tmp_path, "a")
    text = json.loads((one.folder / "entry.json").read_text())
    for changed in ({**text, "identity": {"name": "b"}}, {**text, "width": 0}, []):
        (one.folder / "entry.json").write_text(json.dumps(changed))
        with pytest.raises(EvalError, match=r"entry\.json does not describe .*; delete "):
            one.read(skip=False)


def test_samples_that_were_left_out_are_recorded(tmp_path: Path) -> None:
    """Whoever would stop at them encodes their chunks again."""
    one, x = entry(tmp_path), features()
    put(one, x, *range(CHUNKS), left_out={20: "damaged", 69: "too large"})
    actual = one.read(skip=True)
    assert actual is not None
    assert dict(actual.left_out) == {20: "damaged", 69: "too large"}
    assert one.read(skip=False) is None
    assert (missing(one, skip=True), missing(one, skip=False)) == ([], [1, 4])


def test_rows_of_an_entry(tmp_path: Path) -> None:
    one, x = entry(tmp_path), features()
    put(one, x, *range(CHUNKS), left_out={20: "damaged", 69: "too large"})
    actual = one.read(skip=True)
    assert actual is not None
    for rows in (torch.tensor([3, 20, 21, 60]), torch.arange(10, 40)):
        part = actual.rows(rows)
        assert part.x.equal(x[rows])
        assert dict(part.left_out) == {rows.tolist().index(20): "damaged"}


# --- several processes ----------------------------------------------------------------------------


def test_one_process_encodes_at_a_time(tmp_path: Path) -> None:
    one, other = entry(tmp_path), entry(tmp_path)
    with one.encoding() as mine, other.encoding() as too:
        assert (mine, too) == (True, False)
    with other.encoding() as mine:
        assert mine


def encode_all(folder: Path, x: Tensor, reports: Connection) -> None:
    one = entry(folder)
    with one.encoding() as mine:
        assert mine
        layout, chunks = one.begin(lambda: WIDTH, ROWS, skip=False)
        reports.send("begun")
        for chunk in chunks:
            reports.recv()
            one.write(layout, chunk, x[slice(*layout.part(chunk))], {})
            reports.send(chunk)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Each time, what counts as complete is right, what was complete stays, and the locks are
    free.
    """
    moments, x, counts = random.Random(0), features(), set[int]()
    fork = multiprocessing.get_context("fork")

    for number in range(12):
        one = entry(tmp_path / str(number // 3))
        ours, theirs = fork.Pipe()
        process = fork.Process(target=encode_all, args=(one.store.folder, x, theirs))
        process.start()
        ours.recv()
        done = []
        for _ in range(moments.randint(0, 1)):
            ours.send("next")
            done.append(ours.recv())

        ours.send("next")  # which the kill may interrupt
        time.sleep(moments.random() * 0.001)
        process.kill()
        process.join()

        with begun(one) as (layout, chunks):
            raw = np.fromfile(one.folder / "x.f32", np.float32).reshape(SAMPLES, WIDTH)
            for chunk in set(layout.chunks) - set(chunks):
                rows = slice(*layout.part(chunk))
                assert np.array_equal(raw[rows], x[rows])
        assert not set(done) & set(chunks)
        counts.add(len(chunks))
        if number % 3 == 2:
            put(one, x, *chunks)
            assert stored(one).equal(x)
    assert len(counts) > 2, "the kills came at the same moments"


# --- the limit ------------------------------------------------------------------------------------


def names(folder: Path, *entries: Entry) -> list[str]:
    return [one.identity["name"] for one in entries if one.folder.exists()]


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    limit = 2 * BYTES
    one, two = filled(tmp_path, "1", limit), filled(tmp_path, "2", limit)
    for number, used in enumerate((two, one)):
        os.utime(used.folder / "use.lock", (number, number))
    assert stored(two).equal(features())  # and so it is the last that was used
    three = filled(tmp_path, "3", limit)
    assert names(tmp_path, one, two, three) == ["2", "3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [".room", two.folder.name, three.folder.name]
    )


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    one, two = filled(tmp_path, "1", 2 * BYTES), filled(tmp_path, "2", 2 * BYTES)
    x, y = stored(one), stored(two)[3:5]
    three = entry(tmp_path, "3", 2 * BYTES)
    with pytest.raises(store.StoreFullError, match="other evaluations use its features") as error:
        put(three, features(), 0)
    assert error.value.exit_code == exit_codes.RETRY
    del y
    put(three, features(), 0)
    assert names(tmp_path, one, two, three) == ["1", "3"]
    assert x.equal(features())


def test_what_is_being_encoded_stays(tmp_path: Path) -> None:
    one, two = entry(tmp_path, "1", BYTES), entry(tmp_path, "2", BYTES)
    with begun(one), pytest.raises(store.StoreFullError):
        put(two, features(), 0)
    put(two, features(), 0)
    assert names(tmp_path, one, two) == ["2"]


def test_features_above_the_limit_are_refused(tmp_path: Path) -> None:
    one = entry(tmp_path, "1", BYTES - 1)
    with pytest.raises(EvalError, match=r"do not fit in features\.store_gb=.*raise it") as error:
        put(one, features(), 0)
    assert not isinstance(error.value, store.StoreFullError)


def test_nothing_else_in_the_folder_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / ("a" * 24)).write_text("a file")
    filled(tmp_path, "1", BYTES)
    filled(tmp_path, "2", BYTES)
    assert (tmp_path / "mine").is_dir()
    assert (tmp_path / ("a" * 24)).read_text() == "a file"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        EvalError, match=r"file/\w+: Not a directory; .*--store, or .*features\.store_gb=0"
    ):
        put(entry(tmp_path / "file"), features(), 0)
