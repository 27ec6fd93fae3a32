"""Remote shards: the same batches as from the folder itself, at any world size."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from kit.data import picture, write_shards
from kit.remote import Server, serving
from kit.remote_reading import COUNTS, CPU, cache, same, shards_of, stream, taken, until

from scaletrain.config.schema import CacheConfig, DataConfig, View
from scaletrain.data.errors import DataError
from scaletrain.data.format import index
from scaletrain.data.loading.loader import eval_batches, open_stream
from scaletrain.data.reading.reader import Shards
from scaletrain.data.storage import http, prefetch, remote
from scaletrain.evals.transforms import Transform


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 1), (3, 0)])
def test_the_same_batches_as_from_the_folder(
    folder: Path, web: Server, tmp_path: Path, world: int, workers: int
) -> None:
    local = taken(stream(folder, CacheConfig()), 2, 9)  # 4 steps an epoch: over two ends
    parts = [
        taken(stream(web.url, cache(tmp_path), rank, world, workers=workers), 2, 9)
        for rank in range(world)
    ]
    for step, whole in enumerate(local):
        at = torch.cat([part[step].index for part in parts])
        assert torch.equal(at, whole.index)
        for number, views in enumerate(whole.views):
            assert torch.equal(torch.cat([part[step].views[number] for part in parts], 1), views)
    again = (
        world * workers
    )  # a loader process may be in the middle of a download when it is stopped
    assert max(web.asked[f"s-{n:03d}.tar"] for n in range(4)) <= 1 + again  # one cache for all


def test_resume_takes_only_what_it_needs(folder: Path, web: Server, tmp_path: Path) -> None:
    whole = taken(stream(web.url, cache(tmp_path / "a")), 0, 8)
    for a, b in zip(
        whole[5:], taken(stream(web.url, cache(tmp_path / "b"), workers=1), 5, 8), strict=True
    ):
        same(a, b)


def test_everything_in_order_as_evaluations_read(folder: Path, web: Server, tmp_path: Path) -> None:
    options = {
        "transform": Transform(resize="tv", size=16),
        "batch": 10,
        "device": CPU,
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
    }
    for a, b in zip(
        eval_batches(str(folder), **options),
        eval_batches(web.url, cache=cache(tmp_path), **options),
        strict=True,
    ):
        assert torch.equal(a.views[0], b.views[0])
        assert torch.equal(a.labels, b.labels)


def test_labels_need_no_shards(folder: Path, web: Server, tmp_path: Path) -> None:
    shards = shards_of(web.url, tmp_path)
    assert shards.labels().tolist() == [i % 7 for i in range(sum(COUNTS))]
    assert not any(name.endswith(".tar") for name in web.asked)
    assert shards.name(12) == "s-001.tar/00012"
    assert shards.fingerprint == Shards(folder).fingerprint


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_the_next_shards_of_a_rank_come_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, world: int
) -> None:
    folder = write_shards(tmp_path / "d", (4,) * 24)
    shards = index.build(folder)
    monkeypatch.setattr(prefetch, "SHARE", 0.5)
    room = 7.5 * max(shard["bytes"] for shard in shards)
    with serving(folder) as web:
        small = {"lanes": 4, "window": 1, "views": (View(size=8),)}
        data = DataConfig(path=web.url, cache=cache(tmp_path, int(2 * room)), workers=0, **small)
        source = open_stream(data, seed=5, batch=4, rank=rank, world=world, device=CPU)
        lo, hi = source.plan.part(rank, world)
        coming = [
            sample // 4
            for step in range(24)
            for sample in sorted(source.plan.batch(0, step, lo, hi))
        ]
        due = {f"s-{shard:03d}.tar" for shard in list(dict.fromkeys(coming))[:7]}
        running = source.batches(0, 24)
        next(running)
        until(lambda: len(asked(web)) >= 7)
        time.sleep(0.1)
        assert asked(web) == due  # as many as have room, and no more
        for _ in range(5):
            next(running)
        until(lambda: len(asked(web)) > 7)
        place = tmp_path / f"scaletrain-{os.geteuid()}"
        until(
            lambda: any(not p.stat().st_mtime for p in place.iterdir())
        )  # what was read goes first
        source.close()
        source.dataset.shards.close()


def asked(web: Server) -> set[str]:
    return {name for name in web.asked if name.endswith(".tar")}


def test_a_remote_mixture_has_labels_where_the_classes_are_the_same(
    folder: Path, web: Server, tmp_path: Path
) -> None:
    parts = [{"path": web.url, "weight": 1}, {"path": str(folder), "weight": 1}]
    mixed = taken(stream("", cache(tmp_path), mixture=parts, epoch_samples=48), 0, 4)
    assert set(torch.cat([b.labels for b in mixed]).tolist()) == {-1}
    (folder / "classes.json").write_text('["a"]')
    try:
        mixed = taken(stream("", cache(tmp_path), mixture=parts, epoch_samples=48), 0, 4)
    finally:
        (folder / "classes.json").unlink()
    seen = torch.cat([b.index for b in mixed])
    assert torch.equal(torch.cat([b.labels for b in mixed]), seen % 48 % 7)


@pytest.mark.parametrize(
    "address", ["ftp://host/a", "file:///etc", "gs://bucket/a", "pipe:cat x://y", "data://x"]
)
def test_other_schemes_are_refused(address: str) -> None:
    with pytest.raises(DataError, match=r"only http://, https:// and s3:// are read"):
        Shards(address)


@pytest.mark.parametrize(
    "address",
    ["http://", "http://host/a?key=1", "https://me:secret@host/a", "s3:///a", "http://host/a#b"],
)
def test_addresses_with_more_than_a_folder_are_refused(address: str) -> None:
    with pytest.raises(DataError, match=r"write it as SCHEME://HOST/FOLDER"):
        Shards(address)


def test_s3_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(
        DataError,
        match=r"s3://bucket/a: reading s3:// needs s3fs: pip install 'scaletrain\[remote\]'",
    ):
        Shards("s3://bucket/a")


def test_staging_a_local_folder(folder: Path, tmp_path: Path) -> None:
    held = cache(tmp_path, stage=True)
    for a, b in zip(
        taken(stream(folder, CacheConfig()), 0, 5),
        taken(stream(folder, held, workers=2), 0, 5),
        strict=True,
    ):
        same(a, b)
    stored = sorted(
        p.stat().st_size
        for p in (tmp_path / f"scaletrain-{os.geteuid()}").iterdir()
        if len(p.name) == 64
    )
    assert stored == sorted(p.stat().st_size for p in folder.glob("*.tar"))


def test_staging_checks_what_it_copies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "sleep", lambda seconds: None)
    copy = write_shards(tmp_path / "d", COUNTS)
    index.build(copy)
    data = bytearray((copy / "s-000.tar").read_bytes())
    data[600] ^= 1
    (copy / "s-000.tar").write_bytes(data)
    (copy / "s-002.tar").unlink()
    (copy / "s-002.tar").mkdir()
    shards = Shards(copy, cache=cache(tmp_path / "cache", stage=True))
    with pytest.raises(
        remote.RemoteError,
        match=rf"{copy}/s-000.tar: the content is not that of the manifest .*tried 7 times",
    ):
        shards.read(0)
    with pytest.raises(remote.RemoteError, match=rf"{copy}/s-002.tar: "):
        shards.read(20)
    assert shards.read(12).label == 12 % 7


def test_more_in_use_than_the_cache_holds_is_refused(
    folder: Path, web: Server, tmp_path: Path
) -> None:
    total = sum(p.stat().st_size for p in folder.glob("*.tar"))
    with pytest.raises(
        DataError, match=rf"{total:,} bytes, and data.cache.bytes is 50,000: raise it"
    ):
        stream(web.url, cache(tmp_path, 50_000))


def test_pictures_are_the_right_ones(web: Server, tmp_path: Path) -> None:
    from scaletrain.data.transforms import image

    shards = shards_of(web.url, tmp_path)
    for number in (0, 12, 40):
        assert (image.decode(shards.read(number).image, 10_000) == picture(number)).all()
