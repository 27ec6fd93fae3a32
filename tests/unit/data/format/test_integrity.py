"""Nine faults of a shard: each is named by shard and byte, and under `skip` exactly the bad samples
are replaced.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from kit.data import add, encode, picture, write_shards

from scaletrain import exit_codes, rng
from scaletrain.config.schema import DataConfig, View
from scaletrain.core import Batch
from scaletrain.data.errors import DataError, LoaderError, ShardError, unreadable
from scaletrain.data.format import index, offsets
from scaletrain.data.format.verify import verify
from scaletrain.data.loading.loader import Stream, eval_batches, open_stream
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.replacement import ReplacementLog
from scaletrain.data.sampling.substitutes import Replaced, substitutes
from scaletrain.evals.transforms import Transform

COUNTS = (8, 8, 8, 8, 8)
SHARD, FIRST = "s-002.tar", 16  # the damaged one and its first sample
WHERE = 19  # the sample at which it is damaged
UNIT = 512 + 512  # header and content of a .cls member


def places(folder: Path) -> dict[int, tuple[int, int]]:
    """First byte of the image's header and end of its content, in SHARD, by sample; from Python's
    own tar reader.
    """
    import tarfile

    with tarfile.open(folder / SHARD) as tar:
        return {
            int(m.name[:5]): (m.offset, m.offset_data + m.size)
            for m in tar.getmembers()
            if m.name.endswith(".png")
        }


def rewritten(folder: Path, drop: str = "", twice: str = "", other: bool = False) -> bytes:
    """The shard as another writer would have left it."""
    import tarfile

    path = folder / SHARD
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
    if other:
        members = [
            (name, encode(picture(77)) if name.endswith("png") else data) for name, data in members
        ]
    members = [m for m in members if m[0] != drop]
    members += [m for m in members if twice and m[0].startswith(twice)]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            add(tar, name, data)
    return path.read_bytes()


def damaged(folder: Path, how: str) -> bytes:
    data = bytearray((folder / SHARD).read_bytes())
    head, end = places(folder)[WHERE]
    if how == "cut at a header":
        return bytes(data[:head])
    if how == "cut inside a header":
        return bytes(data[: head + 200])
    if how == "cut inside a payload":
        return bytes(data[: head + 700])
    if how == "bad header checksum":
        data[head + 3] ^= 1
    elif how == "zeroed hole":
        data[head : head + 1024] = bytes(1024)
    elif how == "flipped bit":
        data[end - 40] ^= 16
    elif how == "missing sibling":
        return rewritten(folder, drop=f"{WHERE:05d}.png")
    elif how == "duplicate key":
        return rewritten(folder, twice=f"{WHERE:05d}")
    else:
        return rewritten(folder, other=True)
    return bytes(data)


FAULTS = (
    "cut at a header",
    "cut inside a header",
    "cut inside a payload",
    "bad header checksum",
    "zeroed hole",
    "flipped bit",
    "missing sibling",
    "duplicate key",
    "stale index",
)
CLS_FIRST = 1024  # the label stands before the image


def stream(
    folder: Path, rank: int = 0, world: int = 1, workers: int = 0, **options: object
) -> Stream:
    data = DataConfig(
        path=str(folder),
        lanes=4,
        window=2,
        workers=workers,
        views=(View(size=12, count=2), View(size=8)),
        **options,
    )
    return open_stream(data, seed=3, batch=12, rank=rank, world=world, device=torch.device("cpu"))


def run(
    folder: Path, steps: int = 9, **options: object
) -> tuple[list[Batch], list[tuple[int, Replaced]]]:
    lost: list[tuple[int, Replaced]] = []
    s = stream(folder, on_bad="skip", **options)
    return list(
        s.batches(0, steps, lambda step, found: lost.extend((step, r) for r in found))
    ), lost


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write_shards(tmp_path / "d", COUNTS)
    index.build(made)
    return made


@pytest.mark.parametrize("how", FAULTS)
def test_each_fault_is_named_or_replaced_exactly(folder: Path, how: str) -> None:
    path = folder / SHARD
    true, was = places(folder), path.read_bytes()
    now = damaged(folder, how)
    path.write_bytes(now)
    bad = {sample for sample, (start, end) in true.items() if was[start:end] != now[start:end]}
    assert (
        bad or how == "duplicate key"
    )  # appended at the end: the index is right about all it lists

    # raise: before the damaged shard's samples are served, by name
    if how != "duplicate key" or len(was) != len(now):
        with pytest.raises(ShardError, match=rf"{SHARD} at byte \d+: ") as error:
            list(stream(folder).batches(0, 3))
        assert error.value.shard.endswith(SHARD)
        assert 0 <= error.value.offset <= len(was)
        if len(was) == len(now):
            assert any(
                start <= error.value.offset < end for s, (start, end) in true.items() if s in bad
            )
    assert any(SHARD in str(fault) for fault in verify(folder, 10**6).faults)

    # skip: what is served and what is lost is the plan, exactly
    batches, lost = run(folder)
    planned = [
        s
        for step in range(9)
        for s in stream(folder, on_bad="skip").plan.batch(*divmod(step, 3)).tolist()
    ]
    used = torch.cat([b.index for b in batches]).tolist()
    assert len(used) == len(planned) == 9 * 12
    assert Counter(r.planned for _, r in lost) == Counter(s for s in planned if s in bad)
    replaced = iter([r for _, r in lost])
    for wanted, got in zip(planned, used, strict=True):
        assert got == (next(replaced).used if wanted in bad else wanted)
    assert not set(used) & bad
    assert all(f"{SHARD} at byte " in r.fault for _, r in lost)
    for b in batches:  # what is called `index` is what is seen
        assert b.labels.tolist() == [i % 7 for i in b.index.tolist()]


@pytest.mark.parametrize("how", [f for f in FAULTS if f not in ("flipped bit", "stale index")])
def test_indexing_names_each_fault_or_leaves_it_out(folder: Path, how: str) -> None:
    """A flipped bit and a stale index are faults only against an index that was made before."""
    true = places(folder)
    (folder / SHARD).write_bytes(damaged(folder, how))
    with pytest.raises(ShardError, match=rf"{SHARD} at byte \d+"):
        index.build(folder, force=True)
    faults: list[ShardError] = []
    shards = index.build(folder, force=True, report=faults.append)
    (fault,) = faults
    assert fault.shard.endswith(SHARD)
    here = true[WHERE][0]
    near = {
        "missing sibling": here - CLS_FIRST,
        "duplicate key": max(end for _, end in true.values()),
    }
    assert near.get(how, here) - 1024 <= fault.offset <= near.get(how, here) + 2048
    kept = 8 if how == "duplicate key" else 7 if how == "missing sibling" else WHERE - FIRST
    assert [s["samples"] for s in shards] == [8, 8, kept, 8, 8]
    rows = Shards(folder)
    assert [rows.read(i).label for i in range(FIRST, FIRST + 3)] == [
        i % 7 for i in range(FIRST, FIRST + 3)
    ]
    said: list[str] = []
    (folder / index.MANIFEST).unlink()
    index.load(folder, said.append, skip=True)
    assert any(line.startswith("left out: ") and SHARD in line for line in said)
    assert (
        offsets.scan(folder / "s-000.tar")[0].tolist()
        == offsets.load(
            folder / "s-000.tar.stidx", 8, (folder / "s-000.tar").stat().st_size
        ).tolist()
    )


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 2), (4, 0)])
def test_substitutes_are_the_same_on_any_ranks_and_workers(
    folder: Path, world: int, workers: int
) -> None:
    (folder / SHARD).write_bytes(damaged(folder, "cut inside a payload"))
    whole, lost = run(folder, 6)
    ranks = [run(folder, 6, rank=rank, world=world, workers=workers) for rank in range(world)]
    for step, batch in enumerate(whole):
        parts = [batches[step] for batches, _ in ranks]
        assert torch.equal(torch.cat([p.index for p in parts]), batch.index)
        assert torch.equal(torch.cat([p.keys for p in parts]), batch.keys)
        for k, view in enumerate(batch.views):
            assert torch.equal(torch.cat([p.views[k] for p in parts], 1), view)
    assert sorted(lost) == sorted(r for _, one in ranks for r in one)
    assert len(lost) == 2 * 5


def test_a_replaced_draw_keeps_its_own_randomness(folder: Path) -> None:
    """Else a substitute would give the very pixels of its own draw in that epoch."""
    (folder / SHARD).write_bytes(damaged(folder, "cut at a header"))
    batches, lost = run(folder, 3)
    planned = torch.from_numpy(stream(folder, on_bad="skip").plan.batch(0, lost[0][0]))
    assert torch.equal(batches[lost[0][0]].keys, rng.hash64(3, 0, planned, 0))
    assert not torch.equal(planned, batches[lost[0][0]].index)


def test_substitutes_spread_and_depend_on_everything() -> None:
    first = [next(substitutes(0, 0, s, 0, (100, 200))) for s in range(3000)]
    assert min(first) == 100
    assert max(first) == 199
    chi = sum((n - 30) ** 2 / 30 for n in Counter(first).values())
    assert 60 < chi < 150  # 99 degrees of freedom
    base = list(substitutes(1, 2, 3, 0, (0, 10**9)))
    assert len(set(base)) == len(base)
    for other in ((2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)):
        assert not set(base) & set(substitutes(*other, (0, 10**9)))


def test_a_substitute_may_be_bad_too_and_all_may_be(folder: Path) -> None:
    for name in ("s-000.tar", "s-001.tar", "s-002.tar", "s-003.tar"):
        (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    batches, lost = run(folder, 3)
    assert set(torch.cat([b.index for b in batches]).tolist()) <= set(range(32, 40))
    assert all(r.planned < 32 for _, r in lost)
    assert sum(len(b) for b in batches) == 36
    (folder / "s-004.tar").write_bytes(b"")
    with pytest.raises(DataError, match="none of its 64 substitutes can be used"):
        run(folder, 1)


def test_undecodable_images_are_replaced(tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "d").mkdir()
    with tarfile.open(tmp_path / "d" / "s.tar", "w") as tar:
        for i in range(12):
            add(tar, f"k{i}.png", encode(picture(i))[:-400] if i == 4 else encode(picture(i)))
    _, lost = run(tmp_path / "d", 2)
    assert {r.planned for _, r in lost} == {4}
    assert all("sample 'k4': the image is damaged" in r.fault for _, r in lost)
    with pytest.raises(
        ShardError, match="sample 'k4'"
    ):  # an evaluation never judges by other images
        list(
            eval_batches(
                str(tmp_path / "d"),
                transform=Transform(resize="tv", size=8),
                device=torch.device("cpu"),
                mean=(0.5,) * 3,
                std=(0.5,) * 3,
            )
        )


def test_what_may_pass_is_never_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pread(*_: object) -> bytes:
        raise OSError(116, "Stale file handle")

    s = stream(folder, on_bad="skip")
    monkeypatch.setattr("os.pread", pread)
    with pytest.raises(
        LoaderError, match=r"s-00\d.tar at byte \d+ cannot be read: Stale file handle"
    ):
        list(s.batches(0, 1))


# --- the account ----------------------------------------------------------------------------------


def test_in_a_mixture_the_damaged_part_replaces_its_own(folder: Path, tmp_path: Path) -> None:
    """The shares of a mixture stay what they are."""
    other = write_shards(tmp_path / "other", (30,))
    index.build(other)
    (folder / SHARD).write_bytes(damaged(folder, "flipped bit"))
    parts = [{"path": str(path), "weight": 1} for path in (other, folder)]
    mixed = {
        "path": "",
        "mixture": parts,
        "epoch_samples": 60,
        "lanes": 4,
        "window": 2,
        "workers": 0,
    }
    data = DataConfig(views=(View(size=8),), on_bad="skip", **mixed)
    source, lost = (
        open_stream(data, seed=3, batch=12, rank=0, world=1, device=torch.device("cpu")),
        [],
    )
    used = [b.index for b in source.batches(0, 10, lambda step, found: lost.extend(found))]
    planned = [torch.from_numpy(source.plan.batch(*divmod(step, 5))) for step in range(10)]
    assert {r.planned for r in lost} == {30 + WHERE}
    assert all(30 <= r.used < 70 and r.used != 30 + WHERE for r in lost)
    shares = [[int((batch < 30).sum()) for batch in batches] for batches in (used, planned)]
    assert shares[0] == shares[1]
    differ = sum(int((a != b).sum()) for a, b in zip(used, planned, strict=True))
    assert differ == len(lost) > 0


def account(
    run: Path, limit: float = 0.1, start: int = 0, before: int = 0, on_bad: str = "skip"
) -> ReplacementLog:
    return ReplacementLog(
        run, DataConfig(on_bad=on_bad, max_bad=limit), epoch=100, start=start, before=before
    )


def test_the_account_counts_over_resumes_and_names_everything(tmp_path: Path) -> None:
    a = account(tmp_path)
    a.add(0, [Replaced(1, 2, "x"), Replaced(3, 4, "y")])
    a.add(1, [])
    assert a.agree(20) == 2
    assert a.scalars() == {"data/skipped": 2.0}
    a.add(5, [Replaced(5, 6, "z")])  # after the checkpoint at step 2: lost with the session
    again = account(tmp_path, start=2, before=a.meta()["skipped"])
    again.add(3, [Replaced(7, 8, "w")])
    assert again.agree(60) == 3
    found = [
        json.loads(line)
        for line in (tmp_path / "skipped" / "rank-0.jsonl").read_text().splitlines()
    ]
    assert [(f["step"], f["planned"], f["used"], f["fault"]) for f in found] == [
        (0, 1, 2, "x"),
        (0, 3, 4, "y"),
        (3, 7, 8, "w"),
    ]
    assert again.summary(60).startswith("3 bad samples of 60 were replaced (0.05)")


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    a = account(tmp_path, limit=0.05)
    for step in range(5):
        a.add(step, [Replaced(step, 9, "x")])
    assert a.agree(50) == 5  # of an epoch of 100
    a.add(5, [Replaced(1, 9, "x")])
    with pytest.raises(
        DataError,
        match=r"6 of 60 samples could not be used, more than data.max_bad=0.05 allows; .*skipped "
        r"names",
    ):
        a.agree(60)


def test_without_the_policy_nothing_is_counted_or_written(tmp_path: Path) -> None:
    a = account(tmp_path, on_bad="raise")
    a.add(0, ())
    assert (a.scalars(), a.meta(), list(tmp_path.iterdir())) == ({}, {}, [])


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(errno.ENOENT, ShardError, 2), (errno.EIO, ShardError, 75), (errno.ESTALE, LoaderError, 75)],
)
def test_what_storage_does_not_give_may_be_tried_again(
    number: int, kind: type[DataError], code: int
) -> None:
    """A bad disk block is replaced under on_bad=skip, as what is missing is, and otherwise may be a
    passing fault.
    """
    error = pickle.loads(
        pickle.dumps(unreadable("a.tar", 512, OSError(number, os.strerror(number))))
    )  # as out of a worker
    assert isinstance(error, kind)
    assert exit_codes.of(error) == code
    assert str(error).startswith("a.tar at byte 512")
