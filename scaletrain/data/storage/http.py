"""Downloads from http and https addresses, bounded in size and time. What is fetched is not
trusted.

Transient failures (time-outs, broken connections, HTTP 408, 425, 429 and 5xx) are retried.
Environment variables such as `https_proxy` are honoured.
"""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPMessage, HTTPResponse
from time import monotonic, sleep
from typing import IO, TypeVar
from urllib import request
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from scaletrain.data.errors import DataError
from scaletrain.data.format.tar import MEMBER_BYTES

T = TypeVar("T")
# most seconds between two tries
LONGEST = 30.0
# HTTP errors that are retried, like all 5xx
_RETRIED = (408, 425, 429)
# most time-outs that a whole image may take, or a slow server could block for ever
_WHOLE = 10
_CHUNK = 1 << 20
# forked processes would share the state of any other generator and all retry at the same time
_JITTER = random.SystemRandom()


class TransientError(Exception):
    """A failure that a retry may overcome."""


class MismatchError(TransientError):
    """Other bytes than announced, either because of a bad connection or permanently."""


class OutageError(DataError):
    """A transient failure that outlasted all tries."""


def fetch(url: str, timeout: float, tries: int) -> bytes:
    """The content of an address; `timeout` in seconds bounds each wait for the network. Raises
    DataError with the reason.
    """
    return retry(lambda: b"".join(parts(url, MEMBER_BYTES, timeout, timeout * _WHOLE)), tries)


def retry(work: Callable[[], T], tries: int) -> T:
    """The result of `work`, which is retried after transient failures with waits that double.

    Raises DataError with the last reason, as an OutageError unless the content differed.
    """
    for attempt in range(tries):
        try:
            return work()
        except TransientError as error:
            last = error
            if attempt + 1 < tries:
                sleep(min(2.0**attempt, LONGEST) * _JITTER.uniform(0.5, 1.0))

    raise (DataError if isinstance(last, MismatchError) else OutageError)(
        f"{last} (tried {tries} times)"
    )


def parts(url: str, limit: int, timeout: float, seconds: float) -> Iterator[bytes]:
    """The content piece by piece, at most `limit` bytes within `seconds`. Raises TransientError, or
    DataError for permanent failures.
    """
    _web(url)
    address = quote(url, safe="%/:=&?~#+!$,;'@()*[]")

    try:
        with _OPENER.open(
            request.Request(address, headers={"User-Agent": "scaletrain"}), timeout=timeout
        ) as answer:
            yield from _content(answer, limit, seconds)
    except HTTPError as error:
        error.close()
        kind = TransientError if error.code in _RETRIED or error.code >= 500 else DataError
        raise kind(f"HTTP {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
        raise TransientError(
            f"the download failed: {getattr(error, 'reason', None) or error}"
        ) from None


def _content(answer: HTTPResponse, limit: int, seconds: float) -> Iterator[bytes]:
    end, size = monotonic() + seconds, 0
    while part := answer.read1(_CHUNK):
        size += len(part)
        if size > limit:
            raise DataError(f"is larger than {limit} bytes")
        if monotonic() > end:
            raise TransientError(f"the download takes more than {seconds:g} seconds")

        yield part

    if answer.length:
        raise TransientError(f"the download was cut short by {answer.length} bytes")


def _web(url: str) -> None:
    try:
        address = urlsplit(url)
    except ValueError as error:
        raise DataError(f"no valid address ({error})") from None

    if address.scheme not in ("http", "https") or not address.hostname:
        raise DataError(f"only http:// and https:// addresses are fetched, not {address.scheme}:")


class _Redirects(request.HTTPRedirectHandler):
    """Follows redirections to http and https addresses only, and to no other host of a private
    network.
    """

    max_redirections = 5

    def redirect_request(
        self,
        req: request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> request.Request | None:
        try:
            _follow(req.full_url, newurl)
        except BaseException:
            fp.close()
            raise

        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _follow(url: str, to: str) -> None:
    """Raise DataError for a redirection that must not be followed."""
    _web(to)
    host = urlsplit(to).hostname
    if host != urlsplit(url).hostname:
        for entry in socket.getaddrinfo(host, None):
            if not ipaddress.ip_address(entry[4][0]).is_global:
                raise DataError(f"redirects to {host}, which is in a private network")


def _opener() -> request.OpenerDirector:
    """An opener for http and https alone; urllib's default would also read file:, ftp: and
    data:.
    """
    opener = request.OpenerDirector()
    handlers = (
        request.ProxyHandler(),
        request.HTTPHandler(),
        request.HTTPSHandler(),
        request.HTTPDefaultErrorHandler(),
    )

    for handler in (*handlers, _Redirects(), request.HTTPErrorProcessor()):
        opener.add_handler(handler)

    return opener


_OPENER = _opener()
