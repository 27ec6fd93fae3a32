"""Remote shards while the network or the server fails: trouble that passes, trouble that stays, and
shards that are lost.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch
from kit import remote as kit
from kit.remote import Server
from kit.remote_reading import cache, shards_of, stream, taken, until

from scaletrain.data.errors import DataError
from scaletrain.data.reading.reader import Shards
from scaletrain.data.storage import http, remote


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
        match=r"/data/scaletrain-index.json: HTTP 404 .*scaletrain shards index before you upload",
    ):
        shards_of(web.url, tmp_path)
    web.always["scaletrain-index.json"] = lambda page, data: page.answer(b"<html>", 6)
    with pytest.raises(
        DataError,
        match=r"/data/scaletrain-index.json cannot be read .*scaletrain shards index before you "
        r"upload",
    ):
        shards_of(web.url, tmp_path)


def test_a_wrong_table_is_named_and_not_kept(folder: Path, web: Server, tmp_path: Path) -> None:
    web.trouble["s-001.tar.stidx"] = [lambda page, data: page.answer(bytes(len(data)), len(data))]
    shards = shards_of(web.url, tmp_path)
    with pytest.raises(DataError, match=rf"{web.url}/s-001.tar.stidx at byte 0: "):
        shards.read(12)
    assert shards.read(12) == Shards(folder).read(12)


def test_waits_double_with_jitter_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(http, "sleep", waits.append)

    def work() -> None:
        raise http.TransientError("no")

    with pytest.raises(DataError, match=r"^no \(tried 8 times\)$"):
        http.retry(work, 8)
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
