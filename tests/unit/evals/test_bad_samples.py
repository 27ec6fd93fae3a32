"""Samples that cannot be read: an evaluation stops at them, or leaves them out, counts and names
them, as its run does.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.data import add
from kit.evals import context, result_files, run_folder, shards, spoil
from typer.testing import CliRunner

from scaletrain.cli.main import app
from scaletrain.data.errors import DataError, ShardError
from scaletrain.data.format import index
from scaletrain.data.reading import subset
from scaletrain.data.reading.reader import Shards
from scaletrain.evals import run as evals
from scaletrain.evals.encoders.targets import find
from scaletrain.evals.errors import EvalError
from scaletrain.report import cards

QUICK = (
    "features.workers=0",
    "features.batch=8",
    "linear.epochs=3",
    "linear.batch=16",
    "linear.rates=[10]",
)
LABELS = [i % 6 for i in range(48)]
BAD = (
    0,
    13,
    *range(40, 48),
)  # of the training set: the first, one within a batch, and a whole last batch


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train, test = (
        shards(tmp_path / "data" / "train", LABELS),
        shards(tmp_path / "data" / "test", LABELS[:24], seed=1),
    )
    for sample in BAD:
        spoil(train, sample)
    spoil(test, 5)
    return run_folder(tmp_path, train, on_bad="skip", max_bad=0.3)


def evaluate(run: Path, benchmark: str, *changes: str, **options: Any) -> dict[str, Any]:
    (result,) = evals.run(
        run,
        [benchmark],
        overrides=(*(q for q in QUICK if q[:6] != "linear" or benchmark == "linear"), *changes),
        **options,
    )
    return result


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_left_is_the_data_set(run: Path, workers: int) -> None:
    """Features and labels are those of the good samples, with workers too."""
    train, test = run.parent / "data" / "train", run.parent / "data" / "test"
    opened = context(find(run), train, test, workers=workers)
    whole = shards(run.parent / "whole", LABELS)
    twin = context(find(run), whole, whole)
    good = [n for n in range(48) if n not in BAD]
    bank, queries = opened.features("trainval"), opened.features("test")
    torch.testing.assert_close(bank.x, twin.features("trainval").x[good], rtol=0, atol=1e-5)
    assert bank.index.tolist() == good
    assert bank.labels.tolist() == [LABELS[n] for n in good]
    assert queries.labels.tolist() == [n for i, n in enumerate(LABELS[:24]) if i != 5]
    assert queries.index.tolist() == [n for n in range(24) if n != 5]
    stream = opened.views("trainval", 0)
    drawn = [n for _ in range(4) for n in next(stream)[1].tolist()]
    stream.close()
    assert len(drawn) == 32
    counts, most = np.bincount(drawn, minlength=6), np.bincount([LABELS[n] for n in good])
    assert (counts <= most).all()  # an epoch has each once, and none of the bad ones


def test_the_result_counts_and_names_them(run: Path) -> None:
    found = [
        evaluate(run, "knn"),
        evaluate(run, "linear"),
        evaluate(run, "linear", "linear.augment=false"),
    ]
    for result in found:
        train, test = (result["data"][name] for name in ("train", "test"))
        assert (train["samples"], [one["sample"] for one in train["left_out"]]) == (48, list(BAD))
        assert (test["samples"], [one["sample"] for one in test["left_out"]]) == (24, [5])
        assert "s-0.tar at byte" in test["left_out"][0]["fault"]
        assert "00005" in test["left_out"][0]["fault"]
        text = cards.report([result])
        assert (
            f"train: 48 samples of {train['path']}, 10 of them left out because they cannot be read"
            in text
        )
        assert any(
            line.startswith("test: 24 samples of ") and ", 1 of them left out" in line
            for line in text
        )
    assert found[1]["protocol"]["trained_on"] == 38 - 3


def test_the_policy_is_the_runs_unless_given(run: Path) -> None:
    with pytest.raises(
        ShardError,
        match=r"s-0\.tar at byte .*; --set features\.on_bad=skip leaves such samples out and "
        r"counts",
    ):
        evaluate(run, "knn", "features.on_bad=raise")
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("on_bad: skip", "on_bad: raise"))
    shown = CliRunner().invoke(app, ["eval", str(run), "knn", "--set", "features.workers=0"])
    assert (shown.exit_code, shown.stderr.count("\n")) == (2, 1)
    assert shown.stderr.startswith("error: ")
    assert "left_out" in evaluate(run, "knn", "features.on_bad=skip")["data"]["train"]


def test_more_than_the_limit_ends_it(run: Path) -> None:
    with pytest.raises(
        EvalError,
        match=r"train: 10 or more of its 48 samples cannot be read, and max_bad=0\.05 allows "
        r"fewer; the last: .*max_bad",
    ):
        evaluate(run, "knn", "features.max_bad=0.05")
    assert not result_files(run / "evals")
    for sample in range(24):
        if sample != 5:
            spoil(run.parent / "data" / "test", sample)
    with pytest.raises(EvalError, match="test: 0 of its 24 samples could be read"):
        evaluate(run, "knn", "features.max_bad=1")


def test_another_loss_is_another_protocol(run: Path) -> None:
    """The same shards by their index, yet not the same images: such results share no curve and no
    table.
    """
    first = evaluate(run, "knn", "features.store_gb=0")
    spoil(run.parent / "data" / "train", 20)
    # what was stored is of the whole images
    Path(first["file"]).unlink()
    second = evaluate(run, "knn", "features.store_gb=0")
    assert second["file"] == first["file"]
    assert second["protocol"]["digest"] != first["protocol"]["digest"]


def test_with_a_label_subset_nothing_else_is_read(run: Path) -> None:
    """No substitute takes the place of what is left out: of all others, none can be read."""
    train = run.parent / "data" / "train"
    chosen = [n for n in range(48) if n % 4 or n == 0]
    few = run.parent / "few.json"
    subset.save(few, Shards(train), np.array(chosen), "by hand")
    for sample in range(48):
        if sample not in (*chosen, *BAD):
            spoil(train, sample)
    for benchmark in ("knn", "linear"):
        result = evaluate(run, benchmark, labels=few)
        left_out = [one["sample"] for one in result["data"]["train"]["left_out"]]
        assert left_out == [n for n in BAD if n in chosen]


def test_what_goes_bad_later_stops_the_probe(run: Path) -> None:
    train, test = run.parent / "data" / "train", run.parent / "data" / "test"
    opened = context(find(run), train, test)
    stream = opened.views("trainval", 0)
    opened.features("trainval")
    for sample in range(1, 30):
        if sample != 13:
            spoil(train, sample)
    with pytest.raises(EvalError, match="this sample could be read before"):
        next(stream)


def test_a_shard_that_was_cut_short(tmp_path: Path) -> None:
    """After indexing: the samples behind the cut are left out, of the probe's random crops too."""
    train, test = (
        shards(tmp_path / "data" / "train", LABELS),
        shards(tmp_path / "data" / "test", LABELS[:24], seed=1),
    )
    run = run_folder(tmp_path, train, on_bad="skip", max_bad=0.5)
    Shards(train)
    (train / "s-1.tar").write_bytes((train / "s-1.tar").read_bytes()[:20_000])
    result = evaluate(run, "linear", test=test)
    lost = [one["sample"] for one in result["data"]["train"]["left_out"]]
    assert lost == list(range(lost[0], 48))
    assert 24 < lost[0] < 48
    assert json.loads(Path(result["file"]).read_text())["data"]["train"]["left_out"][0][
        "fault"
    ].startswith(str(train / "s-1.tar"))


def test_what_indexing_left_out_is_refused_or_counted(tmp_path: Path) -> None:
    train, test = (
        shards(tmp_path / "data" / "train", LABELS),
        shards(tmp_path / "data" / "test", LABELS[:24], seed=1),
    )
    path = train / "s-1.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    index.build(train, report=lambda fault: None)
    run = run_folder(tmp_path, train)
    words = r"indexing left out about 11 of 48 samples, the first: .*s-1\.tar at byte"
    with pytest.raises(
        DataError,
        match=rf"{words}.* with --set features\.on_bad=skip --set features\.max_bad=0\.23$",
    ):
        evaluate(run, "knn")
    with pytest.raises(
        DataError, match=rf"{words}.*above max_bad=0\.1: .*set --set features\.max_bad=0\.23$"
    ):
        evaluate(run, "knn", "features.on_bad=skip", "features.max_bad=0.1")
    result = evaluate(run, "knn", "features.on_bad=skip", "features.max_bad=0.25")
    assert [result["data"][name]["left_out_of_index"] for name in ("train", "test")] == [11, 0]
    assert result["data"]["train"]["samples"] == 37
    whole = evaluate(run, "knn", train=f"{train}/s-0.tar", test=f"{test}/s-{{0,1}}.tar")
    assert result["data"]["test"]["sha256"] == whole["data"]["test"]["sha256"]
    assert (whole["data"]["train"]["samples"], whole["data"]["train"]["path"]) == (
        24,
        f"{train}/s-0.tar",
    )


def test_labels_that_are_no_numbers_are_named_with_what_they_hold(tmp_path: Path) -> None:
    train = shards(tmp_path / "data" / "train", LABELS)
    test = shards(tmp_path / "data" / "test", LABELS[:24], seed=1)
    with tarfile.open(test / "s-1.tar", "a") as tar:
        add(tar, "x.cls", b"tench")
        add(tar, "x.png", Shards(train).read(0).image)
    run = run_folder(tmp_path, train)
    words = (
        r"test: 1 of 25 samples have no label, .*, such as s-1\.tar/x with 'tench'; "
        r"evaluation "
        r"needs one"
    )
    with pytest.raises(EvalError, match=words):
        evaluate(run, "knn")
