"""Images from http and https addresses of a listing, which is not trusted: bounded in size and time, and nothing but the web.

Failures that may pass (time-outs, broken connections, HTTP 408, 429 and 5xx) are tried again. Environment variables such as
`https_proxy` are honoured.
"""

from __future__ import annotations

import ipaddress
import socket
from http.client import HTTPException, HTTPMessage, HTTPResponse
from time import monotonic, sleep
from typing import IO
from urllib import request
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from scaletrain.data.errors import DataError
from scaletrain.data.tar import MEMBER_BYTES

_AGAIN = (408, 429)  # and 5xx
_WHOLE = 10  # a download may take so many time-outs altogether, else a server could drip for ever


class _Passing(Exception):
    """A failure that may pass."""


def fetch(url: str, timeout: float, tries: int) -> bytes:
    """The content; `timeout` is in seconds, of one wait for the network. Raises DataError with the reason."""
    _web(url)
    for attempt in range(tries):
        try:
            return _once(url, timeout)
        except _Passing as error:
            reason = str(error)
            if attempt + 1 < tries:
                sleep(2**attempt)
    raise DataError(f"{reason} (tried {tries} times)")


def _once(url: str, timeout: float) -> bytes:
    address = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    try:
        with _OPENER.open(request.Request(address, headers={"User-Agent": "scaletrain"}), timeout=timeout) as answer:
            return _content(answer, timeout * _WHOLE)
    except HTTPError as error:
        error.close()
        kind = _Passing if error.code in _AGAIN or error.code >= 500 else DataError
        raise kind(f"HTTP {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
        raise _Passing(f"the download failed: {getattr(error, 'reason', None) or error}") from None


def _content(answer: HTTPResponse, seconds: float) -> bytes:
    end, parts, size = monotonic() + seconds, list[bytes](), 0
    while part := answer.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MEMBER_BYTES:
            raise DataError(f"is larger than {MEMBER_BYTES} bytes")
        if monotonic() > end:
            raise _Passing(f"the download takes more than {seconds:g} seconds")
    if answer.length:
        raise _Passing(f"the download was cut short by {answer.length} bytes")
    return b"".join(parts)


def _web(url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise DataError(f"no valid address ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DataError(f"only http:// and https:// addresses are fetched, not {parts.scheme}:")


class _Redirects(request.HTTPRedirectHandler):
    """Follows to the web only, and not from the listed host into the private network of this machine."""

    max_redirections = 5

    def redirect_request(
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> request.Request | None:
        _web(newurl)
        host = urlsplit(newurl).hostname
        if host != urlsplit(req.full_url).hostname:
            for found in socket.getaddrinfo(host, None):
                if not ipaddress.ip_address(found[4][0]).is_global:
                    raise DataError(f"redirects to {host}, which is in a private network")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> request.OpenerDirector:
    """urllib's own default would read file:, ftp: and data: too."""
    opener = request.OpenerDirector()
    handlers = (request.ProxyHandler(), request.HTTPHandler(), request.HTTPSHandler(), request.HTTPDefaultErrorHandler())
    for handler in (*handlers, _Redirects(), request.HTTPErrorProcessor()):
        opener.add_handler(handler)
    return opener


_OPENER = _opener()
