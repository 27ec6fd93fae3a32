"""Detects within seconds that another process of the run has died, whatever this one waits for.

A gloo collective fails by itself when a process dies. A process that waits for something else, such
as another rank's part of a checkpoint, data, or NCCL, does not notice. So rank 0 keeps a TCP
connection to every other rank. The kernel closes it when a process ends, for whatever reason, and
rank 0 informs the others. A process that exits normally announces it first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import resource
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

from scaletrain import exit_codes

log = logging.getLogger("scaletrain")

# Seconds in which a process whose peer has died may still end with its own error.
GRACE = 5.0
# Seconds for all processes to connect.
_CONNECT = 60.0
# bytes
_TOKEN = 16
# token, rank, process id, host
_HELLO = struct.Struct(f"!{_TOKEN}sIQ64s")
# of rank 0: token, port, its hello
_Offer = tuple[bytes, int, bytes]
# Message of a process that exits normally. For a dead one, rank 0 forwards its hello.
_LEAVING = bytes(_HELLO.size)


class Peers:
    """Watches the other processes of a run. share: returns the value of rank 0 on every rank."""

    def __init__(self, rank: int, world: int, host: str, share: Callable[[_Offer], _Offer]) -> None:
        self._rank, self._world = rank, world
        self._links: list[socket.socket] = []
        self._open = True
        # which process ended unexpectedly
        self.lost = ""
        self._known = threading.Event()

        listener = _listen(host) if rank == 0 else None
        offer = (
            secrets.token_bytes(_TOKEN),
            listener.getsockname()[1] if listener else 0,
            _hello(b"", 0),
        )
        token, port, self._first = share(offer)

        try:
            watch = (
                self._accept(listener, token) if listener else self._connect((host, port), token)
            )
        except OSError as error:
            log.warning(
                "the death of another process may be noticed late: no connection to rank 0 at %s "
                "(%s)",
                host,
                error,
            )

            return

        # Otherwise loader workers would keep the connections open after this process has died.
        os.register_at_fork(after_in_child=self._close)
        threading.Thread(target=watch, name="peers", daemon=True).start()

    def leave(self) -> None:
        """Announce that this process exits normally, so that the others do not end with it."""
        if self._open:
            self._tell(_LEAVING)
            self._close()

    def name_lost(self, patience: float) -> str:
        """The process that ended unexpectedly, waiting `patience` seconds; empty if none did."""
        self._known.wait(patience)
        return self.lost

    # --- rank 0 -----------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket, token: bytes) -> Callable[[], None]:
        _allow_open_files(self._world + 512)
        # connection -> who is at its other end
        watched: dict[socket.socket, bytes] = {}
        limit = time.monotonic() + _CONNECT
        try:
            with listener:
                while len(watched) < self._world - 1:
                    listener.settimeout(max(0.01, limit - time.monotonic()))
                    link, _ = listener.accept()
                    link.settimeout(max(0.01, limit - time.monotonic()))
                    hello = _receive(link, _HELLO.size)

                    if secrets.compare_digest(hello[:_TOKEN], token):
                        watched[link] = hello
                    else:
                        # Not a process of this run.
                        link.close()
        except OSError:
            self._links = list(watched)
            self.leave()
            raise

        for link in watched:
            _keep_alive(link)

        self._links = list(watched)
        return lambda: self._watch_all(watched)

    def _watch_all(self, watched: dict[socket.socket, bytes]) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in watched:
                selector.register(connection, selectors.EVENT_READ, connection)

            while self._open and selector.get_map():
                for key, _ in selector.select(timeout=1.0):
                    link: socket.socket = key.data
                    # A peer sends one message at most.
                    selector.unregister(link)
                    if not _receive(link, len(_LEAVING)) and self._open:
                        self._tell(watched[link])
                        self._end(watched[link])

    def _tell(self, news: bytes) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):
                link.sendall(news)

    # --- the others -------------------------------------------------------------------------------

    def _connect(self, address: tuple[str, int], token: bytes) -> Callable[[], None]:
        link = socket.create_connection(address, timeout=_CONNECT)
        link.sendall(_hello(token, self._rank))
        _keep_alive(link)
        self._links = [link]
        return lambda: self._watch_first(link)

    def _watch_first(self, link: socket.socket) -> None:
        news = _receive(link, len(_LEAVING))
        if self._open and news != _LEAVING:
            self._end(news or self._first)

    # --- all --------------------------------------------------------------------------------------

    def _end(self, hello: bytes) -> None:
        """End this process because the peer with this hello has died."""
        _, rank, pid, host = _HELLO.unpack(hello)
        where = host.rstrip(bytes(1)).decode(errors="replace")
        self.lost = f"rank {rank} of {self._world} (process {pid} on {where}) ended unexpectedly"
        self._known.set()
        time.sleep(GRACE)
        if not self._open:
            return

        code = exit_codes.claim(exit_codes.RETRY)
        if code is None:
            print(
                f"error: {self.lost}; see its own output. Start again to resume",
                file=sys.stderr,
                flush=True,
            )

        os._exit(exit_codes.RETRY if code is None else code)

    def _close(self) -> None:
        self._open = False
        for link in self._links:
            link.close()


def _hello(token: bytes, rank: int) -> bytes:
    return _HELLO.pack(token, rank, os.getpid(), platform.node().encode()[:64])


def _listen(host: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # On that address only, since nobody else needs to connect.
        listener.bind((host, 0))
    except OSError:
        # Others may reach rank 0 under an address that it does not have itself.
        listener.bind(("", 0))

    listener.listen(4096)
    return listener


def _keep_alive(link: socket.socket) -> None:
    """Make a connection blocking, and detect a node that lost power or network within half a
    minute.
    """
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _receive(link: socket.socket, size: int) -> bytes:
    """Read `size` bytes; empty if the connection ends before."""
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < size and (more := link.recv(size - len(data))):
            data += more

    return data if len(data) == size else b""


def _allow_open_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
