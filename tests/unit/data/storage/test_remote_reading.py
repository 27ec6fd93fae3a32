"""Remote shards: the same batches as from the folder itself, at any world size; and what happens
when the network fails.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from kit import remote as kit
from kit.data import picture, write_shards
from kit.remote import Server, serving

from scaletrain.config.schema import CacheConfig, DataConfig, View
from scaletrain.core import Batch
from scaletrain.data.errors import DataError
from scaletrain.data.format import index
from scaletrain.data.loading.loader import Stream, eval_batches, open_stream
from scaletrain.data.reading.reader import Shards
from scaletrain.data.storage import http, prefetch, remote

CPU = torch.device("cpu")
VIEWS = (View(size=16, count=2), View(size=8))
COUNTS = (11, 3, 20, 14)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_shards(tmp_path_factory.mktemp("shards") / "d", COUNTS)
    index.build(made)
    return made


@pytest.fixture
def web(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(http, "sleep", lambda seconds: None)  # between the tries
    with serving(folder) as server:
        yield server


def cache(place: Path, size: int = 10_000_000, stage: bool = False) -> CacheConfig:
    return CacheConfig(path=str(place), bytes=size, stage=stage)


def stream(
    path: str | Path, held: CacheConfig, rank: int = 0, world: int = 1, **options: object
) -> Stream:
    data = DataConfig(
        path=str(path),
        cache=held,
        **{"lanes": 4, "window": 2, "workers": 0, "views": VIEWS, **options},
    )
    return open_stream(data, seed=5, batch=12, rank=rank, world=world, device=CPU)


def taken(source: Stream, start: int, stop: int) -> list[Batch]:
    batches = list(source.batches(start, stop))
    source.close()
    return batches


def same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.index, b.index)
    assert torch.equal(a.keys, b.keys)
    assert torch.equal(a.labels, b.labels)
    assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def shards_of(url: str, place: Path, **options: int) -> Shards:
    return Shards(url, cache=cache(place, **options))


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
    options = {"size": 16, "batch": 10, "device": CPU, "mean": (0, 0, 0), "std": (1, 1, 1)}
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


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    "trouble",
    [kit.reset, kit.truncated, kit.short, kit.wrong, kit.slow, kit.status(503), kit.status(429)],
)
def test_trouble_that_passes(
    folder: Path, web: Server, tmp_path: Path, trouble: kit.Trouble
) -> None:
    for name in ("scaletrain-index.json", "s-001.tar", "s-001.tar.stidx"):
        if (name, trouble) != (
            "scaletrain-index.json",
            kit.wrong,
        ):  # a manifest has no checksum of its own
            web.trouble[name] = [trouble] * 2
    if trouble in (kit.short, kit.wrong):
        del web.trouble["s-001.tar.stidx"]
        web.trouble.pop("scaletrain-index.json", None)
    shards = shards_of(web.url, tmp_path)
    assert shards.read(12) == Shards(folder).read(12)
    assert web.asked["s-001.tar"] == (1 if trouble is kit.slow else 3)


@pytest.mark.parametrize(
    ("trouble", "cause", "tries"),
    [
        (kit.status(404), r"HTTP 404 Not Found$", 1),
        (kit.status(403), r"HTTP 403 Forbidden$", 1),
        (kit.longer, r"is larger than \d+ bytes$", 1),
        (
            kit.moved("ftp://127.0.0.1/s-001.tar"),
            r"only http:// and https:// addresses are fetched, not ftp:",
            1,
        ),
        (
            kit.moved("http://localhost:1/s-001.tar"),
            r"redirects to localhost, which is in a private network",
            1,
        ),
        (kit.status(500), r"HTTP 500 .* \(tried 7 times\)$", 7),
        (kit.truncated, r"cut short by \d+ bytes \(tried 7 times\)$", 7),
        (kit.short, r"\d+ bytes came and not the \d+ of the manifest \(tried 7 times\)$", 7),
        (kit.wrong, r"sha256 differs\): damaged on its way, or altered \(tried 7 times\)$", 7),
        (kit.reset, r"the download failed: .*reset.* \(tried 7 times\)$", 7),
        (kit.silent(0.3), r"timed out \(tried 7 times\)$", 7),
    ],
)
def test_trouble_that_stays_is_named(
    web: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: kit.Trouble,
    cause: str,
    tries: int,
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.1 if "timed out" in cause else 5.0)
    web.always["s-001.tar"] = trouble
    shards = shards_of(web.url, tmp_path)
    with pytest.raises(remote.RemoteError, match=cause) as caught:
        shards.read(12)
    assert str(caught.value).startswith(f"{web.url}/s-001.tar: ")
    assert "\n" not in str(caught.value)
    assert web.asked["s-001.tar"] == tries
    assert pickle.loads(pickle.dumps(caught.value)).exit_code == 75
    assert not list(tmp_path.rglob("*.part"))
    assert len(shards.read(0).image) > 0  # the others are still there


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("trouble", [kit.wrong, kit.short, kit.status(404)])
def test_under_skip_a_shard_that_is_lost_is_replaced_exactly(
    web: Server, tmp_path: Path, trouble: kit.Trouble, workers: int
) -> None:
    """By samples of the others, each draw by the same one as at any other number of workers."""
    web.always["s-001.tar"] = trouble
    source, lost = stream(web.url, cache(tmp_path), workers=workers, on_bad="skip"), []
    used = torch.cat(
        [b.index for b in source.batches(0, 4, lambda step, found: lost.extend(found))]
    ).tolist()
    planned = [sample for step in range(4) for sample in source.plan.batch(0, step).tolist()]
    source.close()
    assert sorted(planned) == list(range(48))
    assert sorted(r.planned for r in lost) == [11, 12, 13]
    found = {r.planned: r.used for r in lost}
    assert used == [found.get(sample, sample) for sample in planned]
    assert not set(used) & {11, 12, 13}
    assert all(f"{web.url}/s-001.tar" in r.fault for r in lost)
    assert web.asked["s-001.tar"] <= 7 * 2 * max(
        1, workers
    )  # read and read ahead, by each process, once


def test_under_skip_an_outage_still_stops_the_run(web: Server, tmp_path: Path) -> None:
    web.always["s-001.tar"] = kit.status(503)
    source = stream(web.url, cache(tmp_path), on_bad="skip")
    with pytest.raises(remote.RemoteError, match=r"s-001\.tar: HTTP 503 .*tried 7 times"):
        taken(source, 0, 4)


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


def test_a_loader_process_hands_the_failure_over(web: Server, tmp_path: Path) -> None:
    for number in range(4):
        web.always[f"s-{number:03d}.tar"] = kit.status(404)
    source = stream(web.url, cache(tmp_path), workers=2)
    with pytest.raises(remote.RemoteError, match=r"s-00\d\.tar: HTTP 404 Not Found"):
        next(source.batches(0, 4))


def test_folders_without_an_index_are_refused(web: Server, tmp_path: Path) -> None:
    web.always["scaletrain-index.json"] = kit.status(404)
    with pytest.raises(
        remote.RemoteError,
        match=r"/data/scaletrain-index.json: HTTP 404 .*shards/index.py before you upload",
    ):
        shards_of(web.url, tmp_path)
    web.always["scaletrain-index.json"] = lambda page, data: page.answer(b"<html>", 6)
    with pytest.raises(
        DataError,
        match=r"/data/scaletrain-index.json cannot be read .*shards/index.py before you upload",
    ):
        shards_of(web.url, tmp_path)


def test_a_wrong_table_is_named_and_not_kept(folder: Path, web: Server, tmp_path: Path) -> None:
    web.trouble["s-001.tar.stidx"] = [lambda page, data: page.answer(bytes(len(data)), len(data))]
    shards = shards_of(web.url, tmp_path)
    with pytest.raises(DataError, match=rf"{web.url}/s-001.tar.stidx at byte 0: "):
        shards.read(12)
    assert shards.read(12) == Shards(folder).read(12)


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


def test_waits_double_with_jitter_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(http, "sleep", waits.append)

    def work() -> None:
        raise http.Passing("no")

    with pytest.raises(DataError, match=r"^no \(tried 8 times\)$"):
        http.again(work, 8)
    assert all(
        top / 2 <= wait <= top for wait, top in zip(waits, (1, 2, 4, 8, 16, 30, 30), strict=True)
    )
    assert len({wait / top for wait, top in zip(waits, (1, 2, 4, 8, 16, 30, 30), strict=True)}) == 7


def test_a_killed_loader_process_leaves_nothing_wrong(
    folder: Path, web: Server, tmp_path: Path
) -> None:
    web.trouble["s-001.tar"] = [kit.silent(60)]
    child = os.fork()
    if not child:
        shards_of(web.url, tmp_path).read(12)
        os._exit(0)
    until(lambda: web.asked["s-001.tar"])
    time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    place = tmp_path / f"scaletrain-{os.geteuid()}"
    assert [p.stat().st_size for p in place.glob("*.part")] == [
        (folder / "s-001.tar").stat().st_size
    ]
    assert shards_of(web.url, tmp_path).read(12) == Shards(folder).read(12)
    assert not list(place.glob("*.part"))


def test_pictures_are_the_right_ones(web: Server, tmp_path: Path) -> None:
    from scaletrain.data.transforms import image

    shards = shards_of(web.url, tmp_path)
    for number in (0, 12, 40):
        assert (image.decode(shards.read(number).image, 10_000) == picture(number)).all()
