"""What indexing left out of a folder is remembered, named and counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kit.data import add, encode, picture, write_shards
from kit.importing import run

from scaletrain.config.schema import DataConfig, View
from scaletrain.data.errors import DataError
from scaletrain.data.format import index
from scaletrain.data.format.verify import verify
from scaletrain.data.loading.loader import Stream, eval_batches, open_stream
from scaletrain.data.reading import concat
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.replacement import ReplacementLog
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.evals.transforms import Transform


def quiet(text: str) -> None:
    pass


@pytest.fixture
def lossy(tmp_path: Path) -> Path:
    """150 samples in 4 shards, of which one was cut to a third before the folder was indexed."""
    folder = write_shards(tmp_path / "train", (40, 40, 40, 30))
    path = folder / "s-001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    index.build(folder, report=quiet)  # type: ignore[arg-type]
    return folder


def stream(folder: Path, **options: object) -> Stream:
    data = DataConfig(
        path=str(folder),
        lanes=4,
        window=2,
        workers=0,
        views=(View(size=8),),
        **options,  # type: ignore[arg-type]
    )
    return open_stream(data, seed=3, batch=12, rank=0, world=1, device=torch.device("cpu"))


def test_what_indexing_left_out_is_remembered_and_counts(
    lossy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    present = len(Shards(lossy))
    left = 150 - present
    assert left >= 26
    words = (
        rf"indexing left out about {left} of 150 samples, the first: {lossy}/s-001.tar at "
        r"byte "
        r"\d+: "
    )
    mend = rf"mend the shards and run scaletrain shards index --force {lossy}"
    with pytest.raises(
        DataError,
        match=rf"{words}.*; {mend}, or go without .* with data.on_bad=skip data.max_bad=0.\d+$",
    ):
        stream(lossy)
    with pytest.raises(DataError, match=words):
        next(
            iter(
                eval_batches(
                    str(lossy),
                    transform=Transform(resize="tv", size=8),
                    device=torch.device("cpu"),
                    mean=(0.5,) * 3,
                    std=(0.5,) * 3,
                )
            )
        )
    with pytest.raises(
        DataError,
        match=rf"{words}.*; that is a share of 0.1\d+, above max_bad=0.001: {mend}, or set "
        r"data.max_bad=0.\d+$",
    ):
        stream(lossy, on_bad="skip")
    capsys.readouterr()
    for _ in range(2):
        accepted = stream(lossy, on_bad="skip", max_bad=0.2)
        assert f"notice: indexing left out about {left} of 150 samples" in capsys.readouterr().out
    assert accepted.samples == present
    assert accepted.missing == left / 150
    with pytest.raises(DataError, match=words):  # an intact folder beside it changes nothing
        stream("", mixture=[{"path": str(lossy), "weight": 1}])  # type: ignore[arg-type]
    assert stream(f"{lossy}/s-00[023].tar").missing == 0.0  # type: ignore[arg-type]
    found = verify(lossy, 10**6)
    assert found.left_out == left
    assert len(found.faults) == 1


def test_left_out_and_replaced_samples_count_together(tmp_path: Path) -> None:
    account = ReplacementLog(
        tmp_path, DataConfig(on_bad="skip", max_bad=0.1), epoch=100, start=0, before=0, missing=0.08
    )
    for step in range(2):
        account.add(step, [Replaced(step, 9, "x")])
    assert account.agree(20) == 2
    account.add(2, [Replaced(2, 9, "x")])
    with pytest.raises(
        DataError,
        match=r"more than data.max_bad=0.1 allows \(in addition to a share of 0.08 that indexing "
        r"left out\)",
    ):
        account.agree(30)


def test_single_samples_that_are_left_out_count_as_such(tmp_path: Path) -> None:
    import tarfile

    folder = tmp_path / "d"
    folder.mkdir()
    with tarfile.open(folder / "s.tar", "w") as tar:
        for n in range(20):
            add(tar, f"{n:02d}.png", encode(picture(n)))
            if n in (3, 7):
                add(tar, f"{n:02d}.pkl", b"")
        add(tar, "x.cls", b"1")
    said = run("index", folder, "--skip")
    assert "18 samples in 1 shard; 3 faults left out" in said
    assert Shards(folder).losses[0][1:3] == (3, 18)
    assert "pickle" in Shards(folder).losses[0].fault
    assert "samples left out of the index: 3: 3 FAULTS" in run("verify", folder)
    index.build(write_shards(tmp_path / "good", (3,)))
    both = concat.ConcatShards([str(folder), str(tmp_path / "good")])
    assert [loss.samples for loss in both.losses] == [3, 0]
