"""Shards in a bucket of a real S3 server on this machine, which needs moto[server] and s3fs (the
extra `dev`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kit.data import write_shards

from scaletrain.config.schema import CacheConfig, DataConfig, View
from scaletrain.data.format import index
from scaletrain.data.loading.loader import Stream, open_stream
from scaletrain.data.reading.reader import Shards
from scaletrain.data.storage import http, remote

boto3 = pytest.importorskip("boto3", reason="S3 IS NOT TESTED: pip install 's3fs' 'moto[server]'")
pytest.importorskip("s3fs", reason="S3 IS NOT TESTED: pip install 's3fs'")
moto = pytest.importorskip("moto.server", reason="S3 IS NOT TESTED: pip install 'moto[server]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*utcnow:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # sockets of the server's threads
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
COUNTS = (11, 3, 20, 14)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_shards(tmp_path_factory.mktemp("shards") / "d", COUNTS)
    index.build(made)
    return made


@pytest.fixture
def s3(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[tuple[str, object]]:
    """The address of the folder in a bucket, and a client to change what is there."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(http, "sleep", lambda seconds: None)
    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    for path in folder.iterdir():
        client.put_object(Bucket="shards", Key=f"some/where/{path.name}", Body=path.read_bytes())
    yield "s3://shards/some/where", client
    server.stop()


def stream(path: str | Path, place: Path, rank: int, world: int, workers: int) -> Stream:
    data = DataConfig(
        path=str(path),
        cache=CacheConfig(path=str(place), bytes=10**7),
        lanes=4,
        window=2,
        workers=workers,
        views=(View(size=16),),
    )
    return open_stream(data, seed=5, batch=12, rank=rank, world=world, device=torch.device("cpu"))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2)])
def test_the_same_batches_as_from_the_folder(
    folder: Path, s3: tuple[str, object], tmp_path: Path, world: int, workers: int
) -> None:
    local = list(stream(folder, tmp_path, 0, 1, 0).batches(1, 6))
    parts = []
    for rank in range(world):
        source = stream(s3[0], tmp_path, rank, world, workers)
        parts.append(list(source.batches(1, 6)))
        source.close()
    for step, whole in enumerate(local):
        assert torch.equal(torch.cat([part[step].index for part in parts]), whole.index)
        assert torch.equal(torch.cat([part[step].views[0] for part in parts], 1), whole.views[0])


def test_files_larger_than_a_piece(
    folder: Path, s3: tuple[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK", 1000)
    assert Shards(s3[0], cache=CacheConfig(path=str(tmp_path))).read(12) == Shards(folder).read(12)


def test_what_is_wrong_is_named(folder: Path, s3: tuple[str, object], tmp_path: Path) -> None:
    url, client = s3
    shards = Shards(url, cache=CacheConfig(path=str(tmp_path)))
    data = (folder / "s-001.tar").read_bytes()

    def put(content: bytes) -> None:
        client.put_object(Bucket="shards", Key="some/where/s-001.tar", Body=content)

    put(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    with pytest.raises(
        remote.RemoteError, match=rf"^{url}/s-001.tar: .*sha256 differs.* \(tried 7 times\)$"
    ):
        shards.read(12)
    put(data[:-512])
    with pytest.raises(
        remote.RemoteError,
        match=rf"^{url}/s-001.tar: \d+ bytes came and not the \d+ .*\(tried 7 times\)$",
    ):
        shards.read(12)
    put(data + bytes(512))
    with pytest.raises(
        remote.RemoteError, match=rf"^{url}/s-001.tar: is larger than {len(data)} bytes"
    ):
        shards.read(12)
    client.delete_object(Bucket="shards", Key="some/where/s-001.tar")
    with pytest.raises(remote.RemoteError, match=rf"^{url}/s-001.tar: FileNotFoundError: \S+$"):
        shards.read(12)
    put(data)
    assert shards.read(12) == Shards(folder).read(12)
    with pytest.raises(
        remote.RemoteError,
        match=r"^s3://shards/else/scaletrain-index.json: FileNotFoundError.*before you upload it$",
    ):
        Shards("s3://shards/else")


def test_a_server_that_does_not_answer(
    s3: tuple[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(remote, "TRIES", 2)
    with pytest.raises(
        remote.RemoteError, match=r"Could not connect to the endpoint URL.*\(tried 2 times\)"
    ):
        Shards(s3[0])
