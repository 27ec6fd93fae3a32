"""Features are encoded once, whoever asks for them, and are those of the encoder bit for bit."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import ranks
from kit.evals import run_folder, shards, spoil
from torch import Tensor

from scaletrain import dist
from scaletrain.data.errors import ShardError
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.subset_shards import SubsetShards
from scaletrain.evals import encoding, store, transforms
from scaletrain.evals import run as evals
from scaletrain.evals.encoders.exports import exported
from scaletrain.evals.encoders.targets import find
from scaletrain.evals.errors import EvalError
from scaletrain.evals.features import Encoded, FeatureConfig, FeatureExtractor

SAMPLES, BATCH, ROWS = 45, 2, 8
# chunks of ROWS samples: 5 of 4 batches and one of 3, the last of one sample
FORWARDS = 23
# the pass over one image of zeros that tells the width
PROBE = 1


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ROWS", ROWS)
    monkeypatch.setattr(encoding, "POLL", 0.01)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stored")
    return run_folder(root, shards(root / "train", [n % 6 for n in range(SAMPLES)]))


def extractor(run: Path, folder: Path | None, **settings: Any) -> FeatureExtractor:
    chosen = {"batch": BATCH, "workers": 0} | settings
    return FeatureExtractor(find(run), FeatureConfig(**chosen), folder)


def encoded(one: FeatureExtractor, run: Path, rows: list[int] | None = None) -> Encoded:
    data = Shards(run.parent / "train")
    chosen = data if rows is None else SubsetShards(data, np.array(rows))
    return one.encode(str(data.folder), chosen, "images")


def elsewhere(function: Callable[[Connection], None]) -> tuple[Any, Any]:
    """A process that sends something, and the connection to receive it."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=function, args=(theirs,))
    process.start()
    theirs.close()
    return process, ours


# --- once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_they_are_those_of_the_encoder(run: Path, tmp_path: Path, workers: int) -> None:
    bare, one = extractor(run, None, workers=workers), extractor(run, tmp_path, workers=workers)
    expected, actual = encoded(bare, run), encoded(one, run)
    assert actual.x.equal(expected.x)
    assert actual.index.tolist() == list(range(SAMPLES))
    assert (bare.forwards, one.forwards) == (FORWARDS + PROBE, FORWARDS + PROBE)

    with torch.no_grad():
        image = torch.stack([pixels(run, n) for n in range(SAMPLES)])
        direct = find(run).module(image)
    close(actual.x, direct)


def close(actual: Tensor, expected: Tensor) -> None:
    """The same, up to what the number of images in a batch changes in the last digits."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def pixels(run: Path, sample: int) -> Tensor:
    import cv2

    raw = np.frombuffer(Shards(run.parent / "train").read(sample).image, np.uint8)
    image = torch.from_numpy(cv2.imdecode(raw, cv2.IMREAD_COLOR_RGB)).permute(2, 0, 1) / 255
    data = find(run).data
    return (image - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[:, None, None]


def test_a_second_process_runs_no_forward(run: Path, tmp_path: Path) -> None:
    """Nor does this one, with a new extractor, other batches and workers."""
    first = encoded(extractor(run, tmp_path), run).x

    def second(answer: Connection) -> None:
        one = extractor(run, tmp_path)
        actual = encoded(one, run).x
        answer.send((one.forwards, actual.numpy().tobytes()))

    process, answer = elsewhere(second)
    forwards, raw = answer.recv()
    process.join()
    assert (forwards, raw) == (0, first.numpy().tobytes())

    third = extractor(run, tmp_path, batch=16, workers=1)
    assert encoded(third, run).x.equal(first)
    assert third.forwards == 0


def test_two_processes_share_the_work_of_one(run: Path, tmp_path: Path) -> None:
    def worker(answer: Connection) -> None:
        one = extractor(run, tmp_path)
        actual = encoded(one, run).x
        answer.send((one.forwards, actual.numpy().tobytes()))

    others = [elsewhere(worker) for _ in range(3)]
    answers = [answer.recv() for _, answer in others]
    for process, _ in others:
        process.join()
    assert sorted(forwards for forwards, _ in answers) == [0, 0, FORWARDS + PROBE]
    assert len({raw for _, raw in answers}) == 1


def test_a_killed_process_leaves_what_it_has_done(run: Path, tmp_path: Path) -> None:
    """The next encodes only the chunks that are missing, and has the same features."""

    def worker(answer: Connection) -> None:
        one = extractor(run, tmp_path)
        write = store.Entry.write

        def noted(*args: Any, **options: Any) -> None:
            write(*args, **options)
            answer.send(1)
            answer.recv()

        store.Entry.write = noted  # type: ignore[method-assign]
        encoded(one, run)

    process, answer = elsewhere(worker)
    for _ in range(2):
        answer.recv()
        answer.send(1)
    answer.recv()
    process.kill()
    process.join()

    one = extractor(run, tmp_path)
    actual = encoded(one, run)
    assert one.forwards == FORWARDS - 3 * ROWS // BATCH
    assert actual.x.equal(encoded(extractor(run, None), run).x)


# --- all devices of a job -------------------------------------------------------------------------


def on_ranks(run: Path, folder: Path, bad: Path) -> dict[str, Tensor]:
    store.ROWS = ROWS
    # one rank writes it for all
    target = exported(run, 7)
    one = FeatureExtractor(find(target), FeatureConfig(batch=BATCH, workers=0), folder)
    data = Shards(run.parent / "train")
    one.prepare(str(data.folder), data, "images")
    shared = one.forwards
    # neither rank encodes them again
    one.prepare(str(data.folder), data, "images")
    again = one.forwards - shared

    said = ""
    try:
        one.prepare(str(bad), Shards(bad), "images")
    except ShardError as error:
        said = str(error)

    quick = ("features.workers=0", "knn.ks=[3]")
    results = evals.run(run, ["knn"], overrides=quick, train=data.folder, test=data.folder)
    return {
        "forwards": torch.tensor([shared, again, "s-0.tar at byte" in said]),
        "results": torch.tensor([len(results), dist.world()]),
    }


def test_every_rank_encodes_a_part(run: Path, tmp_path: Path) -> None:
    """And learns of the error of another; an evaluation is then measured by the first alone."""
    bad = shards(tmp_path / "bad", [0] * 40)
    spoil(bad, 3)
    actual = ranks.run(2, on_ranks, tmp_path, run, tmp_path / "features", bad)
    first, second = (one["forwards"].tolist() for one in actual)
    assert first == [12 + PROBE, 0, True]
    assert second == [11, 0, True]

    assert [one["results"].tolist() for one in actual] == [[1, 1], [0, 1]]
    records = (run / "evals" / "features").glob("*/chunks-1.jsonl")
    assert any(path.stat().st_size for path in records)

    one = extractor(run, tmp_path / "features")
    assert encoded(one, run).x.equal(encoded(extractor(run, None), run).x)
    assert one.forwards == 0


# --- what they are of -----------------------------------------------------------------------------


def test_all_that_defines_them_is_in_their_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(transforms.CORRUPTIONS, "grey", lambda image, *_: image)
    data = Shards(run.parent / "train")

    def folder(encoder: dict[str, Any], **settings: Any) -> str:
        one = extractor(run, tmp_path, **settings)
        one.encoder = replace(one.encoder, **encoder)
        return one._entry(data, one.transform_of("test")).folder.name

    encoder = find(run)
    bit = encoder.weights[:-1] + ("0" if encoder.weights[-1] != "0" else "1")
    names = [
        folder({}),
        folder({"weights": bit}),
        folder({"kind": "untrained"}),
        folder({"model": encoder.model.model_copy(update={"input": "lightness"})}),
        folder({"data": encoder.data.model_copy(update={"mean": (0.5, 0.5, 0.5)})}),
        folder({"data": encoder.data.model_copy(update={"std": (0.5, 0.5, 0.5)})}),
        folder({"data": encoder.data.model_copy(update={"max_pixels": 1000})}),
        folder({}, bf16=True),
        folder({}, size=24),
        folder({}, resize="tv"),
        folder({}, border=1),
        folder({}, corruption="grey", severity=1),
        folder({}, corruption="grey", severity=2),
        folder({}, corruption="grey", severity=1, corruption_seed=1),
    ]
    assert len(set(names)) == len(names)

    same = [
        folder({"step": 8, "source": Path("elsewhere"), "home": Path("elsewhere")}),
        folder({"seed": 9, "samples": 5}),
        folder({}, batch=5, workers=1, store_gb=1),
    ]
    assert set(same) == {names[0]}


def test_one_image_more_or_less_is_another_data_set(run: Path, tmp_path: Path) -> None:
    one = extractor(run, tmp_path)
    data = Shards(run.parent / "train")
    other = Shards(shards(tmp_path / "other", [n % 6 for n in range(SAMPLES)], seed=1))
    sets = [
        data,
        other,
        SubsetShards(data, np.array([1, 2])),
        SubsetShards(data, np.array([1, 3])),
    ]
    plain = one.transform_of("train")
    assert len({one._entry(part, plain).folder for part in sets}) == 4


def test_border_and_corruption_are_of_test_images_only(run: Path) -> None:
    one = extractor(run, None, border=2)
    assert (
        one.transform_of("train")
        == one.transform_of("val")
        == extractor(run, None).transform_of("test")
    )
    assert one.transform_of("test").border == 2


# --- subsets --------------------------------------------------------------------------------------


def test_a_subset_of_stored_features_is_not_encoded(run: Path, tmp_path: Path) -> None:
    whole = encoded(extractor(run, tmp_path), run).x
    for rows in ([3, 7, 40], list(range(10, 20))):
        one = extractor(run, tmp_path)
        actual = encoded(one, run, rows)
        assert actual.x.equal(whole[rows])
        assert actual.index.tolist() == list(range(len(rows)))
        assert one.forwards == 0


def test_of_a_subset_nothing_else_is_read(tmp_path: Path) -> None:
    data = shards(tmp_path / "train", [n % 6 for n in range(SAMPLES)])
    run = run_folder(tmp_path, data)
    for sample in range(SAMPLES):
        if sample not in (3, 7, 40):
            spoil(data, sample)
    one = extractor(run, tmp_path / "features")
    actual = encoded(one, run, [3, 7, 40])
    assert len(actual.x) == 3
    assert one.forwards == 2 + PROBE
    again = extractor(run, tmp_path / "features")
    assert encoded(again, run, [3, 7, 40]).x.equal(actual.x)
    assert again.forwards == 0


# --- samples that cannot be read ------------------------------------------------------------------


def test_what_was_left_out_is_remembered(tmp_path: Path) -> None:
    data = shards(tmp_path / "train", [n % 6 for n in range(SAMPLES)])
    run = run_folder(tmp_path, data)
    whole = encoded(extractor(run, None), run).x
    sound = {path: path.read_bytes() for path in data.glob("*.tar")}
    bad = (0, 8, 9, 44)
    for sample in bad:
        spoil(data, sample)
    good = [n for n in range(SAMPLES) if n not in bad]

    features, skipping = tmp_path / "features", {"on_bad": "skip", "max_bad": 0.2}
    for forwards in (FORWARDS - 2 + PROBE, 0):  # two batches had nothing left
        one = extractor(run, features, **skipping)
        actual = encoded(one, run)
        close(actual.x, whole[good])
        assert actual.index.tolist() == good
        assert [part["sample"] for part in actual.left_out] == list(bad)
        assert "s-0.tar at byte" in actual.left_out[0]["fault"]
        assert one.forwards == forwards

    lenient = extractor(run, features, on_bad="skip", max_bad=0.5)
    some = encoded(lenient, run, [7, 8, 30, 44])
    close(some.x, whole[[7, 30]])
    assert some.index.tolist() == [0, 2]
    assert [part["sample"] for part in some.left_out] == [8, 44]

    with pytest.raises(EvalError, match=r"4 or more of its 45 samples .* max_bad=0\.01 "):
        encoded(extractor(run, features, on_bad="skip", max_bad=0.01), run)
    with pytest.raises(ShardError, match=r"s-0\.tar at byte"):
        encoded(extractor(run, features, on_bad="raise"), run)

    for path, content in sound.items():  # mended: only their chunks are encoded again
        path.write_bytes(content)
    one = extractor(run, features, on_bad="raise")
    close(encoded(one, run).x, whole)
    assert one.forwards == 2 * ROWS // BATCH + 3


def test_nothing_left(tmp_path: Path) -> None:
    data = shards(tmp_path / "train", [0, 1, 2, 3])
    run = run_folder(tmp_path, data)
    for sample in range(4):
        spoil(data, sample)
    for folder in (None, tmp_path / "features"):
        with pytest.raises(EvalError, match="train: 0 of its 4 samples could be read"):
            encoded(extractor(run, folder, on_bad="skip", max_bad=1), run)


def test_without_a_store_nothing_is_written(run: Path, tmp_path: Path) -> None:
    one = extractor(run, tmp_path / "features", store_gb=0)
    encoded(one, run)
    assert not (tmp_path / "features").exists()
