"""What is not exactly as written is refused by name, and what cannot be saved says so and leaves
the rest alone.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.stored import as_rank, flip, holds, listing, save, tensors, whole

from scaletrain.checkpoint import files
from scaletrain.checkpoint import reader as saved_steps
from scaletrain.checkpoint import writer as checkpoint
from scaletrain.checkpoint.files import CheckpointError
from scaletrain.checkpoint.reader import latest, open_step
from scaletrain.checkpoint.writer import Writer
from scaletrain.core import Piece
from scaletrain.runtime import durable

# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["*.safetensors", "manifest.json"])
def test_a_flipped_bit_is_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pattern: str
) -> None:
    save(tmp_path, 1, 2)
    (file,) = (tmp_path / "step-00000002").glob(pattern)
    draw = random.Random(0)
    for place in [
        0,
        8 * file.stat().st_size - 1,
        *(draw.randrange(8 * file.stat().st_size) for _ in range(60)),
    ]:
        flip(file, place)
        caplog.clear()
        saved = latest(tmp_path)
        assert saved is not None
        holds(saved, 1)
        assert [
            record.levelno for record in caplog.records if str(file) in record.getMessage()
        ] == [logging.WARNING], place
        with pytest.raises(CheckpointError, match=file.name):
            open_step(file.parent)
        flip(file, place)
    holds(open_step(file.parent), 2)


def test_a_flipped_bit_in_a_done_file_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    draw = random.Random(0)
    for _ in range(20):
        second = as_rank(monkeypatch, tmp_path, 1, 2)
        second.save(2, {"b": whole(torch.ones(3))}, {})
        second.close()
        (done,) = (tmp_path / "step-00000002").glob("*.json")
        flip(done, draw.randrange(8 * done.stat().st_size))
        first = as_rank(monkeypatch, tmp_path, 0, 2)
        first.save(2, {"a": whole(torch.ones(3))}, {})
        with pytest.raises(CheckpointError, match=done.name):
            first.close()
        saved = latest(tmp_path)
        assert saved is not None
        holds(saved, 1)
        assert listing(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(
    "fault", ["short", "long", "empty", "gone", "manifest short", "manifest empty", "manifest gone"]
)
def test_cut_and_missing_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    save(tmp_path, 1, 2)
    (file,) = (tmp_path / "step-00000002").glob(
        "manifest.json" if fault.startswith("manifest") else "*.safetensors"
    )
    raw = file.read_bytes()
    match fault.split()[-1]:
        case "gone":
            file.unlink()
        case how:
            file.write_bytes({"short": raw[:-1], "long": raw + b" ", "empty": b""}[how])
    saved = latest(tmp_path)
    assert saved is not None
    holds(saved, 1)
    assert "step-00000002" in caplog.text
    with pytest.raises(CheckpointError, match=file.name):
        open_step(file.parent)
    flip(next((tmp_path / "step-00000001").glob("*.safetensors")), 500)
    with pytest.raises(CheckpointError, match=r"no step in .* is whole .*safetensors is damaged"):
        latest(tmp_path)


def test_nothing_committed_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest(tmp_path / "none") is None
    assert latest(tmp_path) is None
    (tmp_path / "step-00000004").mkdir()
    assert latest(tmp_path) is None
    assert "step-00000004 was never committed" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot list checkpoints"):
        latest(tmp_path / "file")


def test_a_renamed_step_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000003")
    saved = latest(tmp_path)
    assert saved is not None
    assert saved.step == 2
    assert "contains step 1" in caplog.text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 2}, "format: Input should be 1"),
        (
            {"files": {"../../x.safetensors": {"bytes": 1, "sha256": "0" * 64}}},
            "String should match pattern",
        ),
        ({"files": {}}, "which it does not list"),
        ({"step": -1}, "step: "),
        ({"surprise": 1}, "surprise: Extra inputs"),
        (
            {"tensors": {"a": {"dtype": "F32", "shape": [2], "pieces": []}}},
            r"pieces of a end at 0, but shape \(2,\)",
        ),
        ({"tensors": {"a": {"dtype": "OBJ", "shape": [0], "pieces": []}}}, "dtype: "),
    ],
)
def test_manifests_of_strangers(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    """Well sealed, so only their contents speak against them."""
    save(tmp_path, 1)
    path = tmp_path / "step-00000001" / "manifest.json"
    path.write_bytes(files.seal(json.dumps(json.loads(files.unseal(path)) | change)))
    with pytest.raises(CheckpointError, match=text):
        open_step(path.parent)


def test_a_manifest_without_bound(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with (tmp_path / "step-00000001" / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(
        CheckpointError, match=r"manifest\.json is damaged: it has more than 134,217,728 bytes"
    ):
        open_step(tmp_path / "step-00000001")


def test_a_manifest_that_lies_about_the_data(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001" / "manifest.json"
    body = json.loads(files.unseal(path))
    body["tensors"]["scalar"]["shape"] = [4]
    body["tensors"]["scalar"]["pieces"][0]["stop"] = 4
    body["tensors"]["float32"]["dtype"] = "F64"
    path.write_bytes(files.seal(json.dumps(body)))
    for name in ("scalar", "float32"):
        with pytest.raises(
            CheckpointError, match=f"{name} is not what the manifest says|cannot read {name}"
        ):
            open_step(path.parent).read(name)


# --- what cannot be saved -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (
            [(0, 3, (10,)), (4, 10, (10,))],
            r"pieces of w leave a gap at 3: rank-00001-.* has \[4, 10\)",
        ),
        ([(0, 5, (10,)), (4, 10, (10,))], "pieces of w overlap at 5"),
        ([(0, 10, (10,)), (0, 10, (10,))], "pieces of w overlap at 10"),
        (
            [(0, 5, (10,)), (5, 9, (10,))],
            r"pieces of w end at 9, but shape \(10,\) has 10 elements",
        ),
        ([(0, 5, (10,)), (5, 10, (2, 5))], "ranks disagree on w"),
    ],
)
def test_pieces_that_do_not_tile(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pieces: list[tuple[int, int, tuple[int, ...]]],
    text: str,
) -> None:
    save(tmp_path, 1)
    for rank in (1, 0):
        start, stop, shape = pieces[rank]
        writer = as_rank(monkeypatch, tmp_path, rank, 2)
        writer.save(2, {"w": Piece(torch.zeros(stop - start), start, shape)}, {})
        if rank == 0:
            with pytest.raises(
                CheckpointError, match=f"step 2 was not saved: {text}.*step 1 is the last good one"
            ):
                writer.close()
        else:
            writer.close()
    assert listing(tmp_path) == ["step-00000001"]


def test_refused_at_the_call(tmp_path: Path) -> None:
    writer, one = Writer(tmp_path), torch.zeros(4)
    for piece in (Piece(one.view(2, 2), 0, (2, 2)), Piece(one, 1, (4,)), Piece(one, -1, (4,))):
        with pytest.raises(CheckpointError, match="piece of w"):
            writer.save(1, {"w": piece}, {})
    with pytest.raises(CheckpointError, match=r"w of type torch\.complex64 cannot be stored"):
        writer.save(1, {"w": whole(one.to(torch.complex64))}, {})
    with pytest.raises(CheckpointError, match="__metadata__"):
        writer.save(1, {"__metadata__": whole(one)}, {})
    for bad in (float("nan"), one, {1, 2}):
        with pytest.raises(CheckpointError, match="meta of step 1 is not plain JSON"):
            writer.save(1, {"w": whole(one)}, {"x": bad})
    assert listing(tmp_path) == []


def test_a_rank_that_never_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    writer = as_rank(monkeypatch, tmp_path, 0, 3, timeout=0.05)
    writer.save(2, {"w": whole(torch.zeros(2))}, {})
    with pytest.raises(CheckpointError, match=r"rank 1 of 3 did not finish within 0\.05 s"):
        writer.save(3, {"w": whole(torch.zeros(2))}, {})
    assert listing(tmp_path) == ["step-00000001"]


def test_unwritable_root(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot make .*file/run: Not a directory"):
        Writer(tmp_path / "file" / "run")


def failing(monkeypatch: pytest.MonkeyPatch, first: int, number: int, times: int) -> None:
    """From call `first` on, fsync fails so many times."""
    sync, calls = os.fsync, itertools.count()

    def fsync(handle: int) -> None:
        if first <= next(calls) < first + times:
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(checkpoint, "PAUSES", (0.0, 0.0))


@pytest.mark.parametrize("call", range(5))
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_a_passing_failure_of_storage_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, number: int
) -> None:
    """fsync fails once at each of its calls before the commit: data, done file, folder, root,
    manifest.
    """
    save(tmp_path, 1)
    failing(monkeypatch, call, number, 1)
    save(tmp_path, 2)
    saved = latest(tmp_path)
    assert saved is not None
    holds(saved, 2)


@pytest.mark.parametrize("call", range(5))
@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 75), (errno.EROFS, 2)])
def test_an_error_in_the_background_is_raised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, number: int, code: int
) -> None:
    """fsync fails from each of its calls on until nothing more is tried; another start may help
    where storage comes back.
    """
    save(tmp_path, 1)
    writer = Writer(tmp_path)
    failing(monkeypatch, call, number, 3 if code == 75 else 1)
    state = {name: whole(t) for name, t in tensors(2).items()}
    writer.save(2, state, {"clock": {"step": 2}})
    why = re.escape(os.strerror(number))
    text = (
        rf"step 2 was not saved: .*step-00000002.*: {why} \([\d,]+ bytes free\); step 1 is the "
        r"last good one"
    )
    with pytest.raises(CheckpointError, match=text) as caught:
        writer.wait()
    assert caught.value.exit_code == code
    assert listing(tmp_path) == ["step-00000001"]
    writer.check()
    writer.save(2, state, {"clock": {"step": 2}})
    writer.close()
    saved = latest(tmp_path)
    assert saved is not None
    holds(saved, 2)


def test_a_failure_of_storage_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on from an older step would lose work; a disk that keeps failing on one file is another
    matter.
    """
    monkeypatch.setattr(saved_steps, "PAUSES", (0.0, 0.0))
    compare, failures = files.compare, [2]

    def flaky(path: Path, size: int, sha256: str) -> None:
        if "step-00000002" in str(path) and failures[0]:
            failures[0] -= 1
            raise CheckpointError(f"{path} cannot be read: Stale file handle", 75)
        compare(path, size, sha256)

    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(files, "compare", flaky)
    saved = latest(tmp_path)
    assert saved is not None
    assert saved.step == 2


def test_a_failure_after_the_commit_keeps_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is in place when the folder's own fsync fails: its files must not be swept from
    under it.
    """
    sync = durable.sync

    def fails(folder: Path) -> None:
        if (folder / "manifest.json").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(folder)

    save(tmp_path, 1)
    monkeypatch.setattr(durable, "sync", fails)
    monkeypatch.setattr(checkpoint, "PAUSES", ())
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tmp_path, 2)
    holds(open_step(tmp_path / "step-00000002"), 2)
