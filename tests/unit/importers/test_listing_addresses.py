"""Listings of web addresses: what is fetched, tried again, and refused."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from kit.data import encode, picture
from kit.importing import contents, keys, run

from scaletrain.data.errors import DataError
from scaletrain.data.storage import http


def write_csv(path: Path, rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


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
