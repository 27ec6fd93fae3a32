"""The origins of a data set's files: http(s)://HOST/FOLDER, s3://BUCKET/PREFIX, or a local folder
that is staged to the node.

Nothing is trusted: every file has a maximum size, and shards must have the sha256 of the manifest.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import quote, urlsplit

from scaletrain import exit_codes
from scaletrain.data.errors import PERMANENT, DataError
from scaletrain.data.format.names import is_remote
from scaletrain.data.storage import http
from scaletrain.data.storage.http import MismatchError, TransientError
from scaletrain.runtime import heartbeat, local_files

T = TypeVar("T")
# with waits of 1, 2, 4 ... 30 seconds, enough for an outage of a minute
TRIES = 7
# seconds without any data
TIMEOUT = 30.0
# bytes per second; a slower download is given up
SLOWEST = 500_000
CHUNK = 8 << 20


class RemoteError(DataError):
    """A file of a remote data set that could not be read in any of the tries."""

    exit_code = exit_codes.RETRY


class LostError(RemoteError):
    """A file that does not exist, or differs from the one that the manifest lists: a retry does not
    help.
    """


class Origin(Protocol):
    """A folder from which files are read."""

    # address of the folder, without a slash at its end
    url: str

    def parts(self, name: str, limit: int) -> Iterator[bytes]:
        """The content of a file piece by piece, at most `limit` bytes. Raises http.TransientError,
        or DataError for permanent failures.
        """
        ...


def origin(path: str) -> Origin:
    """The origin that a path or address names. Raises DataError for addresses that are not read."""
    if not is_remote(path):
        return LocalOrigin(path)

    parts = urlsplit(path)
    if parts.scheme not in ("http", "https", "s3"):
        raise DataError(
            f"data.path={path}: only http://, https:// and s3:// are read, or a local folder"
        )
    if not parts.hostname or parts.query or parts.fragment or parts.username or parts.password:
        raise DataError(
            f"data.path={path}: write it as SCHEME://HOST/FOLDER, without query, fragment or "
            "password"
        )

    return S3Origin(path.rstrip("/")) if parts.scheme == "s3" else WebOrigin(path.rstrip("/"))


def read(source: Origin, name: str, limit: int) -> bytes:
    """The content of a small file. Raises RemoteError."""
    return _tried(source, name, lambda: b"".join(source.parts(name, limit)))


def download(source: Origin, name: str, file: BinaryIO, size: int, sha256: str | None) -> None:
    """Write the content of `name` to `file` and check its size, and its checksum if given. Raises
    RemoteError with address, tries and cause.
    """

    def once() -> None:
        heartbeat.beat()
        file.seek(0)
        done, digest = 0, hashlib.sha256()
        for part in source.parts(name, size):
            heartbeat.beat()
            digest.update(part)
            done += file.write(part)

        if done != size:
            raise MismatchError(f"{done} bytes came and not the {size} of the manifest")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise MismatchError(
                "the content is not that of the manifest (sha256 differs): damaged on its way, or "
                "altered"
            )

    _tried(source, name, once)


def _tried(source: Origin, name: str, work: Callable[[], T]) -> T:
    # network reads have time limits of their own, longer than the watchdog's; a file system that
    # hangs has none
    silence = nullcontext() if isinstance(source, LocalOrigin) else heartbeat.unwatched()
    try:
        with silence:
            return http.retry(work, TRIES)
    except DataError as error:
        kind = RemoteError if isinstance(error, http.OutageError) else LostError
        raise kind(f"{source.url}/{name}: {error}") from None


class WebOrigin:
    """A folder at an http or https address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def parts(self, name: str, limit: int) -> Iterator[bytes]:
        return http.parts(f"{self.url}/{quote(name)}", limit, TIMEOUT, TIMEOUT + limit / SLOWEST)


class LocalOrigin:
    """A local folder, for instance on a parallel file system on which random reads are slow."""

    def __init__(self, path: str) -> None:
        self.url = str(Path(path).absolute())

    def parts(self, name: str, limit: int) -> Iterator[bytes]:
        try:
            with local_files.reader(Path(self.url, name)) as file:
                if (size := os.fstat(file.fileno()).st_size) > limit:
                    raise DataError(f"is larger than {limit} bytes ({size})")
                while part := file.read(CHUNK):
                    yield part
        except FileNotFoundError:
            raise DataError("no such file") from None
        except OSError as error:
            kind = DataError if error.errno in PERMANENT else TransientError
            raise kind(f"reading failed: {error.strerror}") from None


class S3Origin:
    """A bucket of S3 or a compatible service. Credentials, region and endpoint are configured as
    for boto: AWS_PROFILE, AWS_ENDPOINT_URL and so on.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._library = importlib.import_module("s3fs").__name__
        except ImportError:
            raise DataError(
                f"data.path={url}: reading s3:// needs s3fs: pip install 'scaletrain[remote]'"
            ) from None

        self._opened: tuple[int, Any] | None = None

    def parts(self, name: str, limit: int) -> Iterator[bytes]:
        path = f"{self.url}/{name}"
        try:
            files = self._files()
            size = files.info(path)["size"]
            if size > limit:
                raise DataError(f"is larger than {limit} bytes ({size})")

            for start in range(0, size, CHUNK):
                yield files.cat_file(path, start=start, end=min(start + CHUNK, size))
        except DataError:
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(_line(error)) from None
        except Exception as error:  # botocore and aiohttp have many types without a common base
            final = type(error).__name__ in (
                "NoCredentialsError",
                "PartialCredentialsError",
                "ProfileNotFound",
            )
            raise (DataError if final else TransientError)(_line(error)) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _files(self) -> Any:
        """The file system of this process: connections and event loops do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            limits = {
                "connect_timeout": TIMEOUT,
                "read_timeout": TIMEOUT,
                "retries": {"max_attempts": 0},
            }
            library = importlib.import_module(self._library)
            made = library.S3FileSystem(
                config_kwargs=limits, skip_instance_cache=True, use_listings_cache=False
            )

            # `http.retry` counts the tries and has its own waits
            made.retries = 1
            self._opened = os.getpid(), made

        return self._opened[1]


def _line(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
