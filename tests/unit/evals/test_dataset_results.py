"""Results on datasets with a descriptor: their splits, label maps and names, and what they say of
images that were seen before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kit import evals as kit

from scaletrain.checkpoint import reader, writer
from scaletrain.core import Piece
from scaletrain.data.reading.reader import Shards
from scaletrain.evals import run as evals
from scaletrain.evals.encoders import targets
from scaletrain.evals.errors import EvalError
from scaletrain.report import cards

QUICK = ("features.workers=0", "features.batch=32", "knn.ks=[3]")
NAMES = ["ant", "bat", "cat", "dog", "emu", "fox"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run, and shards of a training set of six colours and of two test sets."""
    sets = {
        "train": (NAMES, [i % 6 for i in range(48)], None),
        "test": (NAMES, [i % 6 for i in range(24)], None),
        # classes that are one, two and none of the training set's
        "odd": (["bird", "pet", "rock"], [0, 1, 1, 2], [4, 2, 3, 0]),
    }
    for number, (name, (names, labels, colours)) in enumerate(sets.items()):
        folder = kit.shards(tmp_path / "data" / name, labels, number, colours)
        (folder / "classes.json").write_text(json.dumps(names))
    return kit.run_folder(tmp_path, tmp_path / "data" / "train")


def evaluate(run: Path, text: str, **options: Any) -> dict[str, Any]:
    file = run.parent / "mine.yaml"
    file.write_text(text)
    options = {"overrides": QUICK, "encoder": "pixels"} | options
    return evals.run(run, ["knn"], dataset=str(file), data_root=run.parent / "data", **options)[0]


def test_a_result_belongs_to_its_dataset(run: Path) -> None:
    actual = evaluate(run, "train: train\ntest: test\nmetric: per_class\nclasses: 6\n")
    assert (actual["dataset"], actual["main"]) == ("mine", "knn_3_per_class")
    assert Path(actual["file"]).name.startswith("knn@mine-step-0-pixels-")
    assert actual["metrics"]["knn_3"] == 100
    assert "seen_in_training" not in actual["data"]
    with pytest.raises(EvalError, match="leave out --train, --test and --same-numbers"):
        evaluate(run, "train: train\ntest: test\n", same_numbers=True)


def test_a_main_metric_that_a_benchmark_lacks_is_said(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actual = evaluate(run, "train: train\ntest: test\nmetric: map\n")
    assert actual["main"] == "knn_3"
    assert "knn does not measure map, by which mine is scored" in capsys.readouterr().err


def test_a_label_map_decides_what_is_right(run: Path) -> None:
    """Two training classes mean a pet, in whichever of them an image lies; rocks do not count."""
    text = "train: train\ntest: odd\nlabel_map: {pet: [cat, dog], bird: emu}\n"
    for rule, others in (("restrict: true\n", 2), ("", 5)):
        actual = evaluate(run, text + rule)
        assert actual["metrics"]["knn_3"] == 100
        assert actual["data"]["test"]["used"] == 3
        assert ("knn_3_top5" in actual["metrics"]) == (others == 5)
        assert actual["identity"]["protocol"]["label_map"]["pet"] == ["cat", "dog"]


def test_test_sets_of_one_training_set_share_its_features(run: Path) -> None:
    base = run.parent / "base.yaml"
    base.write_text("train: train\ntest: test\n")
    evals.run(run, ["knn"], dataset=str(base), data_root=run.parent / "data", overrides=QUICK)
    folder = run / "evals" / "features"
    before = {path.name for path in folder.iterdir() if path.is_dir()}
    text = f"train_from: {base}\ntest: odd\nlabel_map: {{bird: emu}}\nmay_train: false\n"
    evaluate(run, text, encoder="trained")
    after = {path.name for path in folder.iterdir() if path.is_dir()}
    assert (len(before), len(after - before)) == (2, 1)


def test_images_that_were_seen_before_are_said(run: Path) -> None:
    """By the encoder's training, as its checkpoint records it, and an exported file too."""
    data = run.parent / "data"
    sources = [{"path": "/gone", "samples": 24, "sha256": Shards(data / "test").fingerprint}]
    step = writer.Writer(run / "checkpoints", keep_last=5, keep_every=0)
    backbone = kit.backbone(kit.settings(data / "train"))
    pieces = {
        f"method.backbone.{name}": Piece(tensor.flatten(), 0, tuple(tensor.shape))
        for name, tensor in backbone.items()
    }
    step.save(9, pieces, {"data": {"sources": sources}})
    step.close()
    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    file = run.parent / "encoder.safetensors"
    targets.export(run, saved, "backbone", file)

    options: dict[str, Any] = {"test": str(data / "test"), "overrides": QUICK}
    (result,) = evals.run(run, ["knn"], **options)
    (exported,) = evals.run(file, ["knn"], **options)
    seen = f"the encoder, or what it started from, was trained on the images of {data / 'test'}"
    for one in (result, exported):
        assert one["data"]["seen_in_training"] == [seen]
        assert f"warning: {seen}: this is no score of unseen images" in cards.report([one])
    (baseline,) = evals.run(run, ["knn"], encoder="untrained", **options)
    (earlier,) = evals.run(run / "checkpoints" / "step-00000007", ["knn"], **options)
    assert not {"seen_in_training"} & (baseline["data"].keys() | earlier["data"].keys())
    (own,) = evals.run(run, ["knn"], **options | {"test": str(data / "train")})
    assert own["data"]["seen_in_training"] == [
        f"48 of 48 test images of {data / 'train'} are training images of dataset data too"
    ]
