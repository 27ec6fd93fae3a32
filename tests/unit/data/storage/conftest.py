"""A folder of shards with its index, and a server that offers it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.data import write_shards
from kit.remote import Server, serving
from kit.remote_reading import COUNTS

from scaletrain.data.format import index
from scaletrain.data.storage import http


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_shards(tmp_path_factory.mktemp("shards") / "d", COUNTS)
    index.build(made)
    return made


@pytest.fixture
def web(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(http, "sleep", lambda seconds: None)  # between the tries
    with serving(folder) as server:
        yield server
