"""A web server that gives the files of a folder, and trouble where it is told to."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Trouble = Callable[["Page", bytes], None]


class Server(ThreadingHTTPServer):
    """`trouble[name]`: what to do in place of answering, as often as there are entries; `always`
    for every time.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}/data"
        self.asked: Counter[str] = Counter()
        self.trouble: dict[str, list[Trouble]] = {}
        self.always: dict[str, Trouble] = {}
        self.pause = 0.0  # seconds before each answer
        self.lock = threading.Lock()
        self.resets: set[socket.socket] = set()

    def shutdown_request(self, request: socket.socket) -> None:
        """Without the orderly end where a reset is wanted."""
        self.close_request(request) if request in self.resets else super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """A client that hangs up."""


class Page(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.removeprefix("/data/")
        with self.server.lock:
            self.server.asked[name] += 1
            planned = self.server.trouble.get(name)
            trouble = planned.pop(0) if planned else self.server.always.get(name)
        time.sleep(self.server.pause)
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        (trouble or whole)(self, path.read_bytes())

    def answer(self, data: bytes, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)


def whole(page: Page, data: bytes) -> None:
    page.answer(data, len(data))


def status(code: int) -> Trouble:
    return lambda page, data: page.send_error(code)


def truncated(page: Page, data: bytes) -> None:
    page.answer(data[: len(data) // 2], len(data))


def short(page: Page, data: bytes) -> None:
    """Complete, as far as HTTP goes."""
    page.answer(data[:-512], len(data) - 512)


def longer(page: Page, data: bytes) -> None:
    page.answer(data + bytes(512), len(data) + 512)


def wrong(page: Page, data: bytes) -> None:
    page.answer(data[:600] + bytes([data[600] ^ 1]) + data[601:], len(data))


def reset(page: Page, data: bytes) -> None:
    """Some bytes, then a broken connection."""
    page.answer(data[:700], len(data))
    page.wfile.flush()
    page.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    page.server.resets.add(page.connection)


def silent(seconds: float) -> Trouble:
    def trouble(page: Page, data: bytes) -> None:
        page.answer(data[:700], len(data))
        page.wfile.flush()
        time.sleep(seconds)

    return trouble


def slow(page: Page, data: bytes) -> None:
    """Whole, but piece by piece."""
    page.answer(b"", len(data))
    for at in range(0, len(data), 4096):
        page.wfile.write(data[at : at + 4096])
        page.wfile.flush()
        time.sleep(0.005)


def moved(place: str) -> Trouble:
    def trouble(page: Page, data: bytes) -> None:
        page.send_response(302)
        page.send_header("Location", place)
        page.end_headers()

    return trouble


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
