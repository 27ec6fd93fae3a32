"""Bytes from http and https addresses: bounded in size and time, and nothing but the web. What is
fetched is not trusted.

Failures that may pass (time-outs, broken connections, HTTP 408, 425, 429 and 5xx) are tried again.
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
# seconds between two tries at most
LONGEST = 30.0
# and 5xx
_AGAIN = (408, 425, 429)
# an image may take so many time-outs altogether, else a server could drip for ever
_WHOLE = 10
_CHUNK = 1 << 20
# forked processes would share the state of any other generator and come back all at once
_JITTER = random.SystemRandom()


class Passing(Exception):
    """A failure that may pass."""


class Differs(Passing):
    """Other bytes than were promised: by a bad connection, or for good."""


class Outage(DataError):
    """A failure that could have passed and did not."""


def fetch(url: str, timeout: float, tries: int) -> bytes:
    """The content; `timeout` is in seconds, of one wait for the network. Raises DataError with the
    reason.
    """
    return again(lambda: b"".join(parts(url, MEMBER_BYTES, timeout, timeout * _WHOLE)), tries)


def again(work: Callable[[], T], tries: int) -> T:
    """Its result, tried again after failures that may pass, with waits that double.

    Raises DataError with the last reason: an Outage, unless it is final.
    """
    for attempt in range(tries):
        try:
            return work()
        except Passing as error:
            last = error
            if attempt + 1 < tries:
                sleep(min(2.0**attempt, LONGEST) * _JITTER.uniform(0.5, 1.0))

    raise (DataError if isinstance(last, Differs) else Outage)(f"{last} (tried {tries} times)")


def parts(url: str, limit: int, timeout: float, seconds: float) -> Iterator[bytes]:
    """The content piece by piece, at most `limit` bytes within `seconds`. Raises Passing, or
    DataError for what cannot pass.
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
        kind = Passing if error.code in _AGAIN or error.code >= 500 else DataError
        raise kind(f"HTTP {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
        raise Passing(f"the download failed: {getattr(error, 'reason', None) or error}") from None


def _content(answer: HTTPResponse, limit: int, seconds: float) -> Iterator[bytes]:
    end, size = monotonic() + seconds, 0
    while part := answer.read1(_CHUNK):
        size += len(part)
        if size > limit:
            raise DataError(f"is larger than {limit} bytes")
        if monotonic() > end:
            raise Passing(f"the download takes more than {seconds:g} seconds")

        yield part

    if answer.length:
        raise Passing(f"the download was cut short by {answer.length} bytes")


def _web(url: str) -> None:
    try:
        address = urlsplit(url)
    except ValueError as error:
        raise DataError(f"no valid address ({error})") from None

    if address.scheme not in ("http", "https") or not address.hostname:
        raise DataError(f"only http:// and https:// addresses are fetched, not {address.scheme}:")


class _Redirects(request.HTTPRedirectHandler):
    """Follows to the web only, and not from the first host into the private network of this
    machine.
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
    """Raises DataError for a redirection that is not followed."""
    _web(to)
    host = urlsplit(to).hostname
    if host != urlsplit(url).hostname:
        for found in socket.getaddrinfo(host, None):
            if not ipaddress.ip_address(found[4][0]).is_global:
                raise DataError(f"redirects to {host}, which is in a private network")


def _opener() -> request.OpenerDirector:
    """urllib's own default would read file:, ftp: and data: too."""
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
