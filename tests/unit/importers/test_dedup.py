"""The listing importer at scale: downloads side by side, an import that is killed and goes on, and
copies left out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import remote as kit
from kit.data import encode, picture
from kit.importing import ROOT, contents, files, run
from kit.remote import Page, Server, serving

from scaletrain.importers.dedup import Copies, digest

WHICH = [0, 1, 2, 0, 3, 4, 1, 0, 5, 6, 7, 3]  # the picture of each row: four copies


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "images"
    folder.mkdir()
    for row, number in enumerate(WHICH):
        (folder / f"{row}.png").write_bytes(encode(picture(number)))
    with serving(folder) as server:
        yield server


def listing(path: Path, web: Server, rows: int = len(WHICH)) -> Path:
    path.write_text(
        "url,label\n" + "".join(f"{web.url}/{row}.png,{row % 3}\n" for row in range(rows))
    )
    return path


def copies(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "copies.jsonl").read_text().splitlines()]


def test_copies_are_left_out_and_listed(tmp_path: Path, web: Server) -> None:
    source = listing(tmp_path / "list.csv", web)
    said = run("listing", source, tmp_path / "out", "--per-shard", 3)
    assert (
        "8 images in 3 classes, 4 shards; left out as copies of others: 4, see copies.jsonl" in said
    )
    assert set(contents(tmp_path / "out")) == {encode(picture(i)) for i in range(8)}
    assert "8 samples" in run("verify", tmp_path / "out")
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()
    assert not list((tmp_path / "out").glob(".*"))
    left = copies(tmp_path / "out")
    for line in left:
        first = int(
            line["reason"].removeprefix(f"the same bytes as {web.url}/").removesuffix(".png")
        )
        assert line["path"] == f"{web.url}/{line['number']}.png"
        assert (WHICH[first], first != line["number"]) == (WHICH[line["number"]], True)
        assert first not in {other["number"] for other in left}
    assert sorted(WHICH[line["number"]] for line in left) == [0, 0, 1, 3]
    run("listing", source, tmp_path / "more", "--per-shard", 3, "--workers", 7)
    assert files(tmp_path / "more") == files(tmp_path / "out")


def test_copies_are_known_by_what_came_and_not_by_what_is_written(
    tmp_path: Path, web: Server
) -> None:
    run("listing", listing(tmp_path / "list.csv", web), tmp_path / "out", "--resize", 12)
    assert len(copies(tmp_path / "out")) == 4


def test_copies_can_be_kept(tmp_path: Path, web: Server) -> None:
    said = run("listing", listing(tmp_path / "list.csv", web), tmp_path / "out", "--keep-copies")
    assert "12 images" in said
    assert not (tmp_path / "out" / "copies.jsonl").exists()


def test_copies_are_not_bad(tmp_path: Path, web: Server) -> None:
    web.always["5.png"] = kit.status(404)
    source = listing(tmp_path / "list.csv", web)
    run("listing", source, tmp_path / "out", fails="5.png: HTTP 404 Not Found")
    said = run("listing", source, tmp_path / "out", "--max-bad", 1)
    assert (
        "left out as copies of others: 4, see copies.jsonl; left out as bad: 1, see "
        "quarantine.jsonl" in said
    )
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 1


def test_downloads_run_side_by_side(tmp_path: Path, web: Server) -> None:
    """Each answer waits until six requests are there: one after the other, they would never
    come.
    """
    together = threading.Barrier(6)

    def wait(page: Page, data: bytes) -> None:
        together.wait(10)
        kit.whole(page, data)

    web.always = {f"{row}.png": wait for row in range(12)}
    assert "8 images" in run(
        "listing", listing(tmp_path / "list.csv", web), tmp_path / "out", "--workers", 6
    )
    assert not together.broken


def test_a_killed_import_goes_on_to_the_same_bytes(tmp_path: Path, web: Server) -> None:
    source = listing(tmp_path / "list.csv", web)
    run("listing", source, tmp_path / "whole", "--per-shard", 2)
    web.asked.clear()
    web.pause = 0.15
    command = [sys.executable, "-m", "shards.listing", str(source), str(tmp_path / "out")]
    options = ["--per-shard", "2", "--workers", "1"]
    process = subprocess.Popen(
        [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    journal = tmp_path / "out.partial" / ".journal.jsonl"
    end = time.monotonic() + 60
    while (not journal.exists() or journal.read_text().count("\n") < 3) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = journal.read_text().count("\n")
    assert kept >= 3
    web.pause = 0.0
    web.asked.clear()
    assert "resuming from" in run("listing", source, tmp_path / "out", "--per-shard", 2)
    assert sum(web.asked.values()) == 12 - 2 * kept  # what is there is not fetched again
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_hashes_of_shards_that_are_written_again_are_dropped(tmp_path: Path) -> None:
    seen = Copies(tmp_path, 0)
    assert [
        seen.first(digest(b"a"), 0, 10),
        seen.first(digest(b"b"), 1, 11),
        seen.first(digest(b"a"), 2, 12),
    ] == [10, 11, 10]
    seen.save()
    assert seen.first(digest(b"c"), 3, 13) == 13
    seen.close()  # a kill before the next save
    seen = Copies(tmp_path, 1)
    assert seen.first(digest(b"a"), 1, 20) == 10
    assert seen.first(digest(b"b"), 1, 21) == 21
    assert seen.first(digest(b"c"), 1, 22) == 22
    seen.close()
