"""The listing importer: CSV and Parquet, paths and addresses, no, one and many labels; and what it
may not fetch.
"""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from kit.data import encode, picture
from kit.importing import contents, files, keys, run

from scaletrain.config.schema import DataConfig
from scaletrain.data.errors import DataError
from scaletrain.data.format import offsets
from scaletrain.data.format.tar import Reader
from scaletrain.data.loading.dataset import Images
from scaletrain.data.reading.reader import Shards
from scaletrain.data.storage import http


def photos(root: Path, count: int) -> list[bytes]:
    root.mkdir(parents=True, exist_ok=True)
    data = [encode(picture(i)) for i in range(count)]
    for i, image in enumerate(data):
        (root / f"{i}.png").write_bytes(image)
    return data


def write_csv(path: Path, rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def members(folder: Path) -> dict[str, bytes]:
    return {m.name: m.data for shard in sorted(folder.glob("*.tar")) for m in Reader(shard)}


def test_none_one_and_many_labels(tmp_path: Path) -> None:
    data = photos(tmp_path / "images", 5)
    rows = [
        ["0.png", "4"],
        ["1.png", ""],
        ["2.png", "7;1"],
        ["3.png", "-1"],
        [str(tmp_path / "images" / "4.png"), "2.0"],
    ]
    listing = write_csv(tmp_path / "list.csv", [["path", "label"], *rows])
    said = run(
        "listing", listing, tmp_path / "out", "--root", tmp_path / "images", "--no-label", ""
    )
    assert "5 images in 4 classes, 1 shard; without a label: 2" in said
    assert (
        "labels are numbered anew, without gaps; give other splits these classes: --classes "
        f"{tmp_path}/out/classes.json" in said
    )
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["1", "2", "4", "7"]
    assert contents(tmp_path / "out") == {
        data[0]: 2,
        data[1]: -1,
        data[2]: -1,
        data[3]: -1,
        data[4]: 1,
    }
    found = members(tmp_path / "out")
    assert {key: json.loads(value) for key, value in found.items() if key.endswith(".json")} == {
        "000000002-2.json": {"labels": [0, 3]}
    }
    assert sorted(key.partition("-")[0] for key in found if key.endswith(".cls")) == [
        "000000000",
        "000000004",
    ]
    assert "5 samples, 2 labelled" in run("verify", tmp_path / "out")


def test_samples_with_many_labels_train_as_unlabelled(tmp_path: Path) -> None:
    from scaletrain.data.sampling.plan import Plan

    photos(tmp_path, 4)
    listing = write_csv(
        tmp_path / "list.csv",
        [["file", "labels"], *([f"{i}.png", "1;2" if i % 2 else "3"] for i in range(4))],
    )
    run("listing", listing, tmp_path / "out")
    shards = Shards(tmp_path / "out")
    data = DataConfig.model_validate(
        {
            "path": str(tmp_path / "out"),
            "lanes": 4,
            "window": 1,
            "views": [{"size": 16, "count": 1}],
        }
    )
    raw = Images(data, shards, Plan(shards.counts, seed=0, batch=4, lanes=4, window=1), 0, 4)[0, 0]
    assert sorted(raw.labels.tolist()) == [-1, -1, 2, 2]  # of the classes 1, 2, 3


@pytest.mark.parametrize(
    ("text", "label"),
    [
        *(
            ('{"labels": [5]}', 5),
            ('{"labels": []}', -1),
            ('{"labels": [1, 2]}', -1),
            ('{"labels": [1, 2], "label": 2}', 2),
        ),
        *(
            ('{"labels": [-1]}', -1),
            ('{"labels": [-1, 5]}', 5),
            ('{"labels": [5], "label": null}', 5),
        ),
    ],
)
def test_json_members_of_others(text: str, label: int) -> None:
    assert offsets._single(json.loads(text)) == label


@pytest.mark.parametrize(
    "text", ['{"labels": 3}', '{"labels": ["dog"]}', '{"labels": [true]}', '{"labels": [-2, 1]}']
)
def test_malformed_json_labels_are_refused(text: str) -> None:
    assert offsets._single(json.loads(text)) is None


def test_names_as_labels(tmp_path: Path) -> None:
    data = photos(tmp_path, 3)
    rows = [["0.png", "golden retriever"], ["1.png", "cat"], ["2.png", "cat;axolotl"]]
    listing = write_csv(tmp_path / "list.csv", [["image", "tags"], *rows])
    run("listing", listing, tmp_path / "out", "--label", "tags")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == [
        "axolotl",
        "cat",
        "golden retriever",
    ]
    assert contents(tmp_path / "out") == {data[0]: 2, data[1]: 1, data[2]: -1}
    (tmp_path / "names.txt").write_text("cat\ngolden retriever\naxolotl\n")
    run(
        "listing",
        listing,
        tmp_path / "given",
        "--label",
        "tags",
        "--classes",
        tmp_path / "names.txt",
    )
    assert contents(tmp_path / "given") == {data[0]: 1, data[1]: 0, data[2]: -1}
    (tmp_path / "names.txt").write_text("cat\naxolotl\n")
    few = ("--label", "tags", "--classes", tmp_path / "names.txt")
    run(
        "listing",
        listing,
        tmp_path / "more",
        *few,
        fails="label 'golden retriever' is not in --classes",
    )


def test_parquet_gives_the_shards_of_the_same_csv(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    photos(tmp_path / "images", 6)
    labels = [[3], [], [1, 5], None, [0], [2]]
    (tmp_path / "parts").mkdir()
    for part in range(2):
        rows = slice(3 * part, 3 * part + 3)
        columns = {
            "path": [f"{i}.png" for i in range(6)][rows],
            "noise": [0.5] * 3,
            "labels": labels[rows],
        }
        parquet.write_table(
            arrow.table(columns), tmp_path / "parts" / f"part-{part}.parquet", row_group_size=2
        )
    texts = [";".join(map(str, row or [])) for row in labels]
    listing = write_csv(
        tmp_path / "list.csv",
        [["path", "labels"], *([f"{i}.png", text] for i, text in enumerate(texts))],
    )
    for name, source in (("a", tmp_path / "parts"), ("b", listing)):
        run(
            "listing",
            source,
            tmp_path / name,
            "--root",
            tmp_path / "images",
            *(("--no-label", "") if name == "b" else ()),
        )
    assert files(tmp_path / "a") == files(tmp_path / "b")
    flat = {
        "path": ["0.png", "1.png"],
        "label": np.array([4.0, np.nan]),
    }  # whole numbers with gaps, as pandas saves them
    parquet.write_table(arrow.table(flat), tmp_path / "images" / "flat.parquet")
    run("listing", tmp_path / "images" / "flat.parquet", tmp_path / "flat")
    assert sorted(contents(tmp_path / "flat").values()) == [-1, 0]
    assert json.loads((tmp_path / "flat" / "classes.json").read_text()) == ["4"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    run("listing", tmp_path / "bad.parquet", tmp_path / "more", fails="bad.parquet cannot be read")


def test_faults_of_listings_are_named(tmp_path: Path) -> None:
    photos(tmp_path, 2)
    path, out = tmp_path / "list.csv", tmp_path / "out"

    def fails(text: str, fault: str, *options: object) -> None:
        path.write_text(text)
        run("listing", path, out, *options, fails=fault)

    fails(
        "",
        "has no column path or url or image or file, only an empty first line; choose with --image",
    )
    fails("a,b\n", "only a, b; choose with --image")
    fails("path,b\n", "has no column c, only path, b; choose with --label", "--label", "c")
    fails("path\n", "lists no images")
    fails("path,label\n0.png,1\n1.png\n", "line 3: 1 cells, and 2 columns")
    fails('path,label\n"0.png,1\n', "cannot be read: unexpected end of data")
    fails("path,label\n,1\n", "line 2: no path or address")
    fails("path\n0.png\ngone.png\n", f"{tmp_path}/gone.png: cannot be read: No such file")
    fails(
        "path\nfile:///etc/hostname\n", "only http:// and https:// addresses are fetched, not file:"
    )
    run("listing", tmp_path / "none.csv", out, fails="none.csv cannot be read")
    (tmp_path / "void").mkdir()
    run("listing", tmp_path / "void", out, fails="holds neither .csv nor .parquet files")
    assert not list(tmp_path.glob("out*"))


# --- addresses ------------------------------------------------------------------------------------


class Web(ThreadingHTTPServer):
    """Answers /NUMBER.png with a picture and a few special paths with trouble; counts the
    requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Page(BaseHTTPRequestHandler):
    server: Web

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        image = (
            encode(picture(int(path[1:-4])))
            if path.endswith(".png") and path[1:-4].isdigit()
            else b""
        )
        redirects = {
            "/moved": "/7.png",
            "/file": "file:///etc/hostname",
            "/ftp": "ftp://127.0.0.1/x.png",
            "/inside": f"http://localhost:{self.server.server_address[1]}/1.png",
            "/loop": "/loop",
        }
        if path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[path])
            self.end_headers()
        elif path == "/flaky" and self.server.asked.count(path) < 3:
            self.send_error(503)
        elif path == "/flaky":
            self.answer(encode(picture(8)))
        elif path == "/short":
            self.answer(encode(picture(1))[:-9], len(encode(picture(1))))
        elif path == "/slow":
            time.sleep(1.0)
        elif path == "/drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        elif path == "/huge":
            self.answer(bytes(4096))
        elif image:
            self.answer(image)
        else:
            self.send_error(404)

    def answer(self, data: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(http, "sleep", lambda seconds: None)  # between the tries
    server = Web()
    server.handle_error = lambda *_: None  # a client that hangs up
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_are_fetched_and_dead_ones_quarantined(tmp_path: Path, web: Web) -> None:
    urls = [f"{web.url}/{i}.png?size=l" for i in range(6)] + [
        f"{web.url}/gone.png",
        f"{web.url}/moved",
    ]
    listing = write_csv(
        tmp_path / "list.csv", [["url", "label"], *([url, i] for i, url in enumerate(urls))]
    )
    run(
        "listing",
        listing,
        tmp_path / "out",
        "--per-shard",
        3,
        fails="gone.png: HTTP 404 Not Found; --max-bad",
    )
    run("listing", listing, tmp_path / "out", "--per-shard", 3, "--max-bad", "20%", "--workers", 8)
    wanted = {encode(picture(i)): i for i in range(6)} | {encode(picture(7)): 7}
    assert contents(tmp_path / "out") == wanted
    assert json.loads((tmp_path / "out" / "quarantine.jsonl").read_text()) == {
        "number": 6,
        "path": f"{web.url}/gone.png",
        "reason": "HTTP 404 Not Found",
    }
    assert "000000003-3" in keys(tmp_path / "out")
    assert web.asked.count("/gone.png") <= 2  # a 404 does not pass: one request an import


def test_failures_that_may_pass_are_tried_again(web: Web) -> None:
    assert http.fetch(f"{web.url}/flaky", 5, 3) == encode(picture(8))
    assert web.asked == ["/flaky"] * 3
    web.asked.clear()
    with pytest.raises(DataError, match=r"HTTP 503 .* \(tried 2 times\)"):
        http.fetch(f"{web.url}/flaky", 5, 2)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/file", "302"),  # urllib itself refuses it
        ("/ftp", "only http:// and https:// addresses are fetched, not ftp:"),
        ("/inside", "redirects to localhost, which is in a private network"),
        ("/loop", "302"),
        ("/short", "cut short by 9 bytes"),
        ("/slow", "timed out"),
        ("/drip", "takes more than 2 seconds"),
        ("/huge", "is larger than 4000 bytes"),
    ],
)
def test_what_is_not_fetched(
    web: Web, monkeypatch: pytest.MonkeyPatch, path: str, fault: str
) -> None:
    monkeypatch.setattr(http, "MEMBER_BYTES", 4000)
    with pytest.raises(DataError, match=fault):
        http.fetch(web.url + path, 0.2, 1)
    if path in ("/file", "/ftp", "/inside"):
        assert len(web.asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/hostname",
        "ftp://x/y",
        "data:image/png;base64,AA",
        "gopher://x",
        "http://",
        "http://[x",
    ],
)
def test_only_the_web(url: str) -> None:
    with pytest.raises(DataError, match=r"only http:// and https://|no valid address"):
        http.fetch(url, 1, 1)


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("8.8.8.8", True),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("127.0.0.1", False),
        ("fd00::1", False),
        ("::1", False),
    ],
)
def test_redirects_stay_out_of_private_networks(
    monkeypatch: pytest.MonkeyPatch, address: str, allowed: bool
) -> None:
    monkeypatch.setattr(http.socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", (address, 80))])
    start = http.request.Request("http://images.example/a.jpg")

    def redirect() -> object:
        return http._Redirects().redirect_request(
            start, io.BytesIO(), 302, "Found", {}, "http://other.example/b.jpg"
        )

    if allowed:
        assert redirect().full_url == "http://other.example/b.jpg"
    else:
        with pytest.raises(
            DataError, match=r"redirects to other\.example, which is in a private network"
        ):
            redirect()
