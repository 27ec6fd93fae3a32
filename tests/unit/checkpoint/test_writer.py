"""The format: what is written comes back by ranges, from any cut, as it was when it was saved."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.stored import as_rank, flip, holds, listing, save, tensors, whole
from safetensors.torch import load_file as official_load

from scaletrain.checkpoint import files
from scaletrain.checkpoint.files import CheckpointError
from scaletrain.checkpoint.reader import latest, open_step
from scaletrain.checkpoint.writer import Writer
from scaletrain.core import Piece

# --- what is written comes back -------------------------------------------------------------------


def test_round_trip_and_ranges(tmp_path: Path) -> None:
    save(tmp_path, 3)
    saved = latest(tmp_path)
    assert saved is not None
    holds(saved, 3)
    holds(open_step(tmp_path / "step-00000003"), 3)
    flat = tensors(3)["net.weight"].reshape(-1)
    for start, stop in [(0, 77), (5, 6), (10, 10), (76, 77)]:
        assert torch.equal(saved.read("net.weight", start, stop), flat[start:stop])
    saved.read("net.weight").zero_()  # the reader's own memory
    assert torch.equal(saved.read("net.weight"), flat)
    for start, stop in [(-1, 3), (0, 78), (4, 3)]:
        with pytest.raises(CheckpointError, match=r"net\.weight has 77 elements"):
            saved.read("net.weight", start, stop)
    with pytest.raises(CheckpointError, match=r"has no tensor net\.bias"):
        saved.read("net.bias")


def test_the_official_library_reads_the_data(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (file,) = (tmp_path / "step-00000001").glob("*.safetensors")
    read = official_load(file)
    assert {name: t.tolist() for name, t in read.items()} == {
        n: t.reshape(-1).tolist() for n, t in tensors(1).items()
    }
    assert all(read[name].dtype == t.dtype for name, t in tensors(1).items())
    with file.open("rb") as raw:
        header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
        assert raw.tell() % 8 == 0
    assert all(
        header[name]["data_offsets"][0] % t.element_size() == 0 for name, t in tensors(1).items()
    )
    assert listing(file.parent) == ["manifest.json", file.name]  # the done file is gone
    assert json.loads((file.parent / "manifest.json").read_text())["body"]["step"] == 1


def test_the_launcher_learns_of_a_step_once_it_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALETRAIN_PROGRESS_FILE", str(tmp_path / "progress"))
    save(tmp_path / "checkpoints", 3)
    assert (tmp_path / "progress").read_text() == "step 3\n"

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "_commit", refuse)
    with pytest.raises(CheckpointError):
        save(tmp_path / "checkpoints", 4)
    assert (tmp_path / "progress").read_text() == "step 3\n"


@pytest.mark.parametrize(("world", "seed"), [(1, 0), (2, 1), (3, 2), (5, 3)])
def test_any_cut_reads_at_any_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, seed: int
) -> None:
    draw, value = random.Random(seed), torch.randn(13, 9)
    cuts = [
        0,
        *sorted(draw.randrange(118) for _ in range(world - 1)),
        117,
    ]  # some pieces may be empty
    for rank in reversed(range(world)):
        piece = Piece(value.reshape(-1)[cuts[rank] : cuts[rank + 1]], cuts[rank], (13, 9))
        own = {f"rank{rank}": whole(torch.tensor([rank]))}
        writer = as_rank(monkeypatch, tmp_path, rank, world)
        writer.save(
            7,
            {"w": piece, "w@3": whole(value)} | own if rank == 0 else {"w": piece} | own,
            {"rank": rank},
        )
        writer.close()
    saved = latest(tmp_path)
    assert saved is not None
    assert saved.meta == {"rank": 0}
    assert torch.equal(saved.read("w@3"), value.reshape(-1))
    assert [int(saved.read(f"rank{rank}")) for rank in range(world)] == list(range(world))
    for _ in range(30):
        start, stop = sorted((draw.randrange(118), draw.randrange(118)))
        assert torch.equal(saved.read("w", start, stop), value.reshape(-1)[start:stop])


def test_values_are_those_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, write = threading.Event(), files.write_new

    def held(path: Path, tensors: Any) -> Any:
        assert go.wait(30)
        return write(path, tensors)

    monkeypatch.setattr(files, "write_new", held)
    x, meta, writer = torch.arange(6.0), {"config": {"lr": 1}}, Writer(tmp_path)
    for step in (1, 2):  # the second copy goes into the first one's memory
        x.fill_(step)
        writer.save(step, {"x": whole(x)}, meta)
        x.fill_(-1)
        meta["config"]["lr"] = 2
        go.set()
        writer.wait()
        go.clear()
    assert torch.equal(open_step(tmp_path / "step-00000001").read("x"), torch.ones(6))
    assert torch.equal(open_step(tmp_path / "step-00000002").read("x"), torch.full((6,), 2.0))
    assert open_step(tmp_path / "step-00000001").meta == {"config": {"lr": 1}}


def test_a_save_waits_for_the_one_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, seen = files.write_new, []

    def slow(path: Path, tensors: Any) -> Any:
        seen.append((tmp_path / "step-00000001" / "manifest.json").exists())
        threading.Event().wait(0.1)
        return write(path, tensors)

    monkeypatch.setattr(files, "write_new", slow)
    save(tmp_path, 1, 2)
    assert seen == [False, True]


def test_order_of_durability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing refers to bytes that are not on disk: a power loss is not tried here, so the order of
    the calls is.
    """
    calls: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.replace
    kinds = {"safetensors": "data", "json": "done", "tmp": "tmp"}

    def kind(path: str) -> str:
        name = Path(path).name
        return (
            name
            if name.startswith(("manifest", ".manifest", "step-")) or path == str(tmp_path)
            else kinds[name.rsplit(".", 1)[-1]]
        )

    def fsync(handle: int) -> None:
        calls.append(("sync", kind(str(Path(f"/proc/self/fd/{handle}").readlink()))))
        sync(handle)

    def replace(self: Path, target: Path) -> Path:
        calls.append(("rename", kind(str(target))))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    save(tmp_path, 1)
    step, temporary = (
        "step-00000001",
        next(name for _, name in calls if name.startswith(".manifest.json.")),
    )
    done = [("sync", "data"), ("sync", "tmp"), ("rename", "done"), ("sync", step)]
    commit = [
        ("sync", tmp_path.name),
        ("sync", temporary),
        ("rename", "manifest.json"),
        ("sync", step),
    ]
    assert calls == done + commit


# --- retention ------------------------------------------------------------------------------------


def test_retention(tmp_path: Path) -> None:
    save(tmp_path, *range(1, 10), keep_last=2, keep_every=4)
    assert listing(tmp_path) == ["step-00000004", "step-00000008", "step-00000009"]


def test_the_manifest_is_deleted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed, remove = [], shutil.rmtree

    def rmtree(folder: Path) -> None:
        removed.append((folder.name, listing(folder)))
        remove(folder)

    save(tmp_path, 1)
    (file,) = (tmp_path / "step-00000001").glob("*.safetensors")
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save(tmp_path, 2, keep_last=1)
    assert removed == [("step-00000001", [file.name])]


def test_the_step_just_saved_outlives_a_damaged_later_one(tmp_path: Path) -> None:
    save(tmp_path, 3, 5)
    (file,) = (tmp_path / "step-00000005").glob("*.safetensors")
    flip(file, 99)
    save(tmp_path, 4, keep_last=1)
    saved = latest(tmp_path)
    assert saved is not None
    holds(saved, 4)
    save(tmp_path, 5, keep_last=1)  # training comes by again and replaces the damaged one
    holds(open_step(tmp_path / "step-00000005"), 5)
    assert len(listing(tmp_path / "step-00000005")) == 2


def test_debris_goes_after_the_commit(tmp_path: Path) -> None:
    for step in (2, 3, 9):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "rank-00001-of-00002.00000000000000ff.safetensors").write_bytes(b"half")
        (folder / "rank-00001-of-00002.00000000000000ff.json.00000000000000ff.tmp").write_bytes(
            b"half"
        )
    (tmp_path / "notes").mkdir()  # not ours
    save(tmp_path, 3)
    assert listing(tmp_path) == [
        "notes",
        "step-00000003",
        "step-00000009",
    ]  # another rank may be writing 9 already
    assert len(listing(tmp_path / "step-00000003")) == 2


def test_tidying_spares_the_next_save_of_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = as_rank(monkeypatch, tmp_path, 1, 2)
    for value in (1.0, 2.0):  # rank 1 is one save of the same step ahead
        second.save(1, {"b": whole(torch.tensor(value))}, {})
        second.wait()
    first = as_rank(monkeypatch, tmp_path, 0, 2, timeout=5)
    for value in (1.0, 2.0):
        first.save(1, {"a": whole(torch.tensor(value))}, {})
        first.wait()
        saved = open_step(tmp_path / "step-00000001")
        assert (float(saved.read("a")), float(saved.read("b"))) == (value, value)
    assert len(listing(tmp_path / "step-00000001")) == 3
