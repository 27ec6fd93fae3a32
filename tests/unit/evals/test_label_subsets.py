"""Evaluation on a label subset: as on a data set of these samples, in a result that says so, and
refused for other shards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
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
from scaletrain.config import load
from scaletrain.data.errors import DataError, ShardError
from scaletrain.data.reading import subset as labels
from scaletrain.data.reading.reader import Shards
from scaletrain.evals import run as evals
from scaletrain.evals.encoders import targets
from scaletrain.evals.encoders.targets import find
from scaletrain.evals.errors import EvalError
from scaletrain.evals.features import mask
from scaletrain.evals.held_out import held_out
from scaletrain.report import cards

QUICK = ("features.batch=8", "features.workers=0")
PROBE = (*QUICK, "linear.epochs=12", "linear.rates=[30,10,3]")
CLASSES = [None if i % 9 == 4 else i % 6 for i in range(72)]  # some samples have no label
CHOSEN = [
    i for i in range(72) if CLASSES[i] is not None and i % 5 < 2
]  # 28 of both shards, in no balance


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train = shards(tmp_path / "data" / "train", CLASSES)
    shards(tmp_path / "data" / "test", [i % 6 for i in range(24)], seed=1)
    return run_folder(tmp_path, train)


def subset(run: Path, chosen: list[int], name: str = "few.json") -> Path:
    path = run.parent / name
    labels.save(path, Shards(run.parent / "data" / "train"), np.array(chosen), "by hand")
    return path


def alone(run: Path, chosen: list[int]) -> Path:
    """A folder of shards that holds these samples and no others."""
    folder, source = run.parent / "alone", Shards(run.parent / "data" / "train")
    folder.mkdir()
    with tarfile.open(folder / "s-0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in chosen:
            sample = source.read(number)
            add(tar, f"{number:05d}.cls", str(sample.label).encode())
            add(tar, f"{number:05d}.png", sample.image)
    return folder


def test_a_subset_is_a_data_set_of_its_samples(run: Path) -> None:
    """Bit for bit, though other samples have no labels."""
    file, folder, test = subset(run, CHOSEN), alone(run, CHOSEN), run.parent / "data" / "test"
    some = context(find(run), run.parent / "data" / "train", test, file)
    twin = context(find(run), folder, test)
    bank, other = some.features("trainval"), twin.features("trainval")
    assert bank.index.tolist() == CHOSEN
    assert other.index.tolist() == list(range(28))
    assert bank.x.equal(other.x)
    order = list(
        dict.fromkeys(CLASSES[i] for i in CHOSEN)
    )  # classes are numbered by first appearance
    assert (
        bank.labels.tolist() == other.labels.tolist() == [order.index(CLASSES[i]) for i in CHOSEN]
    )
    assert some.classes == 6
    ours = evals.run(
        run,
        ["knn", "linear"],
        labels=file,
        overrides=(*PROBE, "linear.augment=false", "knn.ks=[1,7]"),
    )
    theirs = evals.run(run, ["knn"], train=folder, test=test, overrides=(*QUICK, "knn.ks=[1,7]"))
    assert ours[0]["metrics"] == theirs[0]["metrics"]
    for result in (*ours, *theirs):
        del result["protocol"]["digest"]  # other shards
    assert ours[0]["protocol"] == theirs[0]["protocol"]
    assert ours[1]["protocol"]["chosen_on"] == "held-out training images"
    assert ours[1]["protocol"]["trained_on"] == 26


def test_no_other_image_is_read(run: Path) -> None:
    file = subset(run, CHOSEN)
    spoil(run.parent / "data" / "train", next(i for i in range(72) if i not in CHOSEN))
    evals.run(run, ["linear", "knn"], labels=file, overrides=PROBE)
    spoil(run.parent / "data" / "train", CHOSEN[3])
    # what was stored is of the whole images
    shutil.rmtree(run / "evals" / "features")
    for benchmark, change in (("linear", "linear.epochs=11"), ("knn", "knn.ks=[3]")):
        with pytest.raises(
            ShardError, match=r"not what was indexed.*; --set features\.on_bad=skip leaves such"
        ):
            evals.run(run, [benchmark], labels=file, overrides=(*QUICK, change))


def test_the_augmented_stream_keeps_to_the_subset(tmp_path: Path) -> None:
    """Labels are sample numbers here."""
    train = shards(tmp_path / "data" / "train", list(range(40)))
    run = run_folder(tmp_path, train)
    chosen = [1, 2, 3, 7, 9, 11, 19, 20, 21, 30, 38, 39]
    test = shards(tmp_path / "data" / "test", chosen)
    opened = context(find(run, "pixels"), train, test, subset(run, chosen), batch=4)
    stream = opened.views("trainval", 0)
    epochs = [
        [chosen[n] for _ in range(3) for n in next(stream)[1].tolist()] for _ in range(2)
    ]  # labels are places by now
    stream.close()
    wanted = chosen
    assert [sorted(epoch) for epoch in epochs] == [wanted, wanted]
    assert epochs[0] != epochs[1]


def test_results_and_curves_of_their_own(run: Path) -> None:
    test = run.parent / "data" / "test"
    full = shards(run.parent / "full", [i % 6 for i in range(36)])
    few = run.parent / "labels-1pct.json"
    labels.save(few, Shards(full), np.arange(12), "by hand")
    options: dict[str, Any] = {"train": full, "test": test, "overrides": QUICK}
    (whole,) = evals.run(run, ["knn"], **options)
    before = Path(whole["file"]).read_bytes()
    command = [
        "eval",
        str(run),
        "knn",
        f"--train={full}",
        f"--test={test}",
        f"--labels={few}",
        "--set",
        "features.workers=0",
    ]
    shown = CliRunner().invoke(app, [*command, "--set", "features.batch=8"])
    assert shown.exit_code == 0, shown.output
    assert "of which labels: 12 of labels-1pct.json" in shown.stdout
    evals.run(run, ["knn"], encoder="pixels", labels=few, **options)
    (result,) = evals.run(run, ["knn"], labels=few, **options)
    assert shown.stdout.endswith(f"result: {result['file']}\n")
    assert len(result_files(run / "evals")) == 3
    assert Path(whole["file"]).read_bytes() == before
    assert "labels" not in whole["data"]
    digest = hashlib.sha256(few.read_bytes()).hexdigest()
    assert result["data"]["labels"] == {
        "file": few.name,
        "sha256": digest,
        "samples": 12,
        "rule": "by hand",
    }
    assert result["data"]["train"]["samples"] == 36
    assert whole["protocol"]["digest"] != result["protocol"]["digest"]
    # a subset is known by the samples that it names, and not by its file
    renamed = run.parent / "same.json"
    labels.save(renamed, Shards(full), np.arange(12), "in other words")
    assert evals.run(run, ["knn"], labels=renamed, **options)[0] == result


def test_files_that_do_not_belong(run: Path, tmp_path: Path) -> None:
    file = subset(run, CHOSEN)
    other = shards(tmp_path / "other", [i % 6 for i in range(72)], seed=5)
    with pytest.raises(
        DataError,
        match=r"few.json was made for other shards \('train' with 72 samples\) than .*other with "
        r"72",
    ):
        evals.run(
            run, ["knn"], train=other, test=tmp_path / "data" / "test", labels=file, overrides=QUICK
        )
    content = json.loads(file.read_text())
    content["label"][5] = (content["label"][5] + 1) % 6
    file.write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"few.json was altered: its labels are not those of .*train"
    ):
        evals.run(run, ["knn"], labels=file, overrides=QUICK)
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        evals.run(run, ["knn"], labels=tmp_path / "none.json", overrides=QUICK)
    lacks = subset(run, [i for i in CHOSEN if CLASSES[i] != 5], "lacks.json")
    with pytest.raises(
        EvalError, match=r"test has classes of which .*lacks.json has no sample: '5'"
    ):
        evals.run(run, ["knn"], labels=lacks, overrides=QUICK)
    assert not (run / "evals").exists()


def test_a_run_on_a_subset_is_evaluated_with_all_samples_unless_told(run: Path) -> None:
    """Its result says what the run was trained on; samples without labels are no label subset."""
    train = run.parent / "data" / "train"
    whole = shards(run.parent / "whole", [i % 6 for i in range(36)])
    test = run.parent / "data" / "test"
    few, any_samples = run.parent / "few.json", run.parent / "samples.json"
    labels.save(few, Shards(whole), np.arange(12), "by hand")
    labels.save(any_samples, Shards(whole), np.arange(12), "by hand", "samples")
    config = run / "config.yaml"
    config.write_text(
        config.read_text()
        .replace(f"path: {train}", f"path: {whole}", 1)
        .replace("subset: ''", f"subset: {few}", 1)
    )
    options: dict[str, Any] = {"test": test, "overrides": QUICK}
    (result,) = evals.run(run, ["knn"], **options)
    (same,) = evals.run(run, ["knn"], train=whole, **options)
    assert same == result
    assert result["data"]["train"] == {
        "path": str(whole),
        "samples": 36,
        "sha256": Shards(whole).fingerprint,
    }
    assert result["trained"]["subset"] == str(few)
    text = f"the run was trained on the samples of {few} only"
    hint = "; --labels FILE evaluates with a label subset only"
    assert f"{text}{hint}" in cards.report([result])
    (with_labels,) = evals.run(run, ["knn"], labels=few, **options)
    assert with_labels["data"]["labels"]["samples"] == 12
    assert text in cards.report([with_labels])
    with pytest.raises(
        DataError, match=r"samples\.json lists samples and says nothing about their"
    ):
        evals.run(run, ["knn"], labels=any_samples, **options)
    assert targets.describe(load.load(config), 7)["data"].count(str(few)) == 1


def test_few_samples_can_be_held_out() -> None:
    """A tenth at most, and never the last one of a class."""
    for count in (2, 3, 12):
        truth = torch.arange(100).repeat_interleave(count)
        out = held_out(len(truth), truth)
        assert len(out.unique()) == len(out) == count * 10
        assert truth[~mask(out, len(truth))].unique().tolist() == list(range(100))
    left = ~mask(held_out(200), 200)
    assert len(torch.arange(100).repeat_interleave(2)[left].unique()) < 100  # what the rule is for
    assert held_out(1200, torch.arange(1200) % 2).equal(
        held_out(1200)
    )  # and it changes nothing else
    with pytest.raises(EvalError, match=r"one image per class.*at least two per class"):
        held_out(100, torch.arange(100))


def test_one_image_per_class_is_for_knn_only(run: Path) -> None:
    file = subset(run, sorted(CLASSES.index(label) for label in range(6)))
    with pytest.raises(EvalError, match=r"one image per class"):
        evals.run(run, ["linear"], labels=file, overrides=PROBE)
    assert evals.run(run, ["knn"], labels=file, overrides=QUICK)
