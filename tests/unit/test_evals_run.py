"""`evals.run` from shards and a checkpoint to cards, scalars and a table, and the bad input that must end it."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from evals_kit import backbone, run_folder, save, settings, shards
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scaletrain import checkpoint, evals
from scaletrain.data.errors import DataError
from scaletrain.evals import targets
from scaletrain.evals.features import Config, Scene
from scaletrain.evals.targets import EvalError, find

QUICK = ("linear.epochs=12", "linear.batch=16", "linear.rates=[30,10,3]", "features.batch=32", "features.workers=0")
BOTH = ("knn", "linear")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on 72 images of six colours, with 24 more in the folder `test` beside them."""
    train = shards(tmp_path / "data" / "train", [i % 6 for i in range(72)])
    shards(tmp_path / "data" / "test", [i % 6 for i in range(24)], seed=1)
    return run_folder(tmp_path, train)


def sums(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_cards_scalars_and_table(run: Path) -> None:
    before = sums(run)
    cards = evals.run(run, BOTH, overrides=(*QUICK, "linear.augment=false", "knn.ks=[1,20]"))
    assert before.items() <= sums(run).items()  # nothing of the run was touched
    assert [json.loads((run / "evals" / f"{name}-step-7.json").read_text()) for name in BOTH] == json.loads(json.dumps(cards))
    knn, linear = cards
    assert knn["metrics"]["knn_20"] > 40  # of random weights; chance is 17
    assert linear["metrics"]["linear"] > 40
    assert set(knn["metrics"]) == {f"knn_{k}{part}" for k in (1, 20) for part in ("", "_top5", "_per_class")}
    assert set(linear["metrics"]) == {"linear", "linear_top5", "linear_per_class", "linear_held_out"}
    assert linear["protocol"]["epochs"] == 12
    assert linear["protocol"]["test_transform"]["resize"] == "none"
    for card in cards:
        assert (card["encoder"], card["step"], card["unit"]) == ("trained", 7, "per cent")
        assert {"scaletrain", "torch", "numpy", "python"} == set(card["versions"])
        folder = run.parent / "data" / "train"
        contents = [hashlib.sha256((folder / f"s-{n}.tar").read_bytes()).hexdigest() for n in (0, 1)]
        whole = hashlib.sha256("".join(contents).encode()).hexdigest()
        assert card["data"]["train"] == {"path": str(folder), "samples": 72, "sha256": whole}
        assert card["data"]["test"]["samples"] == 24
    board = EventAccumulator(str(run / "tensorboard" / "evals"))
    board.Reload()
    (event,) = board.Scalars("eval/knn_20")
    assert (event.step, event.value) == (7, pytest.approx(knn["metrics"]["knn_20"]))
    assert board.Scalars("eval/linear_held_out")[0].value == pytest.approx(linear["metrics"]["linear_held_out"])
    console = Console(width=120)
    with console.capture() as shown:
        evals.report(cards, console)
    text = shown.get()
    assert all(part in text for part in ("knn 20", "linear", f"{knn['metrics']['knn_20']:.2f}", "trained", "7"))
    assert "per class" not in text


@pytest.mark.parametrize("encoder", ["untrained", "pixels"])
def test_baselines_get_cards_of_their_own(run: Path, encoder: Any) -> None:
    evals.run(run, ["knn"], encoder=encoder, overrides=QUICK[3:])
    card = json.loads((run / "evals" / f"knn-step-0-{encoder}.json").read_text())
    assert card["encoder"] == encoder
    assert encoder != "pixels" or card["metrics"]["knn_10"] == 100.0  # the colours are easy
    assert card["about"]
    assert not (run / "evals" / "knn-step-7.json").exists()
    board = EventAccumulator(str(run / "tensorboard" / "evals"))
    board.Reload()
    assert f"eval-{encoder}/knn_20" in board.Tags()["scalars"]


def test_an_exported_file_judges_like_its_run(run: Path, tmp_path: Path) -> None:
    cfg, file = settings(run.parent / "data" / "train"), tmp_path / "out" / "small.safetensors"
    checkpoint.export(backbone(cfg), file, targets.describe(cfg, 7))
    (from_file,) = evals.run(file, ["knn"], overrides=QUICK[3:])
    (from_run,) = evals.run(run, ["knn"], overrides=QUICK[3:])
    assert from_file["metrics"] == from_run["metrics"]
    assert (tmp_path / "out" / "small-knn-step-7.json").is_file()
    assert sorted(p.name for p in file.parent.iterdir()) == ["small-knn-step-7.json", "small.safetensors"]


def test_the_augmented_probe_learns(run: Path) -> None:
    """The colours are separable in the pixels, whatever the crop."""
    (card,) = evals.run(run, ["linear"], overrides=QUICK, encoder="pixels")
    assert card["metrics"]["linear"] == 100.0
    assert card["protocol"]["train_transform"]["area"] == [0.08, 1.0]


def test_the_augmented_stream_gives_the_wanted_samples_anew(tmp_path: Path) -> None:
    """Labels are sample numbers here, so the stream tells what it read."""
    train = shards(tmp_path / "train", list(range(40)))
    scene = Scene(find(run_folder(tmp_path, train), "pixels"), Config(batch=8, workers=0), train, train)
    wanted = torch.arange(40) % 4 != 0
    epochs = [[next(stream) for _ in range(5)] for stream in [scene.augmented(wanted, 0)] for _ in range(2)]
    first, second = ({int(n): x for part, labels in epoch for n, x in zip(labels, part, strict=True)} for epoch in epochs)
    assert sorted(first) == sorted(second) == wanted.nonzero().flatten().tolist()
    assert list(first) != list(second)  # another order
    assert all(not first[n].equal(second[n]) for n in first)  # another crop
    again = [labels.tolist() for _, labels in islice(scene.augmented(wanted, 0), 5)]
    assert again == [labels.tolist() for _, labels in epochs[0]]


def test_features_are_the_networks_in_sample_order(run: Path) -> None:
    subject = find(run)
    scene = Scene(subject, Config(batch=32, workers=0), run.parent / "data" / "train", run.parent / "data" / "test")
    rows = torch.tensor([3, 4, 70])
    part = scene.part(rows)
    bank = scene.bank()
    assert bank.labels.tolist() == [i % 6 for i in range(72)]
    assert bank.x.shape == (72, 32)
    assert bank.x.dtype == torch.float32
    torch.testing.assert_close(part.x, bank.x[rows], rtol=0, atol=1e-5)
    assert part.labels.equal(bank.labels[rows])
    assert scene.bank() is bank
    one = Scene(subject, Config(batch=1, workers=0), scene.train, scene.test).bank()  # eval mode: no sample sees another
    torch.testing.assert_close(one.x, bank.x, rtol=0, atol=1e-5)


def refused(run: Path, text: str, benchmarks: tuple[str, ...] = BOTH, **options: Any) -> None:
    with pytest.raises((EvalError, DataError), match=text) as error:
        evals.run(run, benchmarks, **{"overrides": QUICK, **options})
    assert "\n" not in str(error.value)
    assert not (run / "evals").exists()


@pytest.mark.parametrize(
    ("benchmarks", "overrides", "text"),
    [
        (("linnear",), (), "no benchmark 'linnear'; did you mean 'linear'.*known: knn, linear"),
        ((), (), "no benchmark given; known: knn, linear"),
        (BOTH, ("linear.epoch=3",), r"linear\.epoch: unknown key; did you mean 'epochs'"),
        (BOTH, ("linear.epochs=0",), r"linear\.epochs: .*greater than or equal to 1"),
        (BOTH, ("feature.size=32",), "override of 'feature'.*did you mean 'features'"),
        (("knn",), ("linear.epochs=3",), "override of 'linear', which is not evaluated"),
        (BOTH, ("linear=3",), "linear.*dictionary"),
    ],
)
def test_misspelt_requests(run: Path, benchmarks: tuple[str, ...], overrides: tuple[str, ...], text: str) -> None:
    refused(run, text, benchmarks, overrides=overrides)


def test_no_test_set(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "test").rename(tmp_path / "elsewhere")
    refused(run, "no test set: .*--test")
    assert evals.run(run, ["knn"], test=tmp_path / "elsewhere", overrides=QUICK[3:])
    (tmp_path / "elsewhere").rename(tmp_path / "data" / "val")
    (card,) = evals.run(run, ["knn"], overrides=QUICK[3:])
    assert card["data"]["test"]["path"].endswith("val")


@pytest.mark.parametrize("path", ["", "synthetic"])
def test_no_training_set(tmp_path: Path, path: str) -> None:
    refused(run_folder(tmp_path, path), "no labels to judge by; give --train and --test")


def test_remote_shards_name_no_test_set_of_their_own(run: Path) -> None:
    with pytest.raises(EvalError, match=r"http://127\.0\.0\.1:1/train is remote; give its labelled test shards with --test"):
        evals.run(run, ["knn"], train="http://127.0.0.1:1/train", overrides=QUICK[3:])


def test_missing_labels_are_named(run: Path, tmp_path: Path) -> None:
    some = shards(tmp_path / "some", [0, 1, 2, None, 4, 5])
    refused(run, r"some: samples without a label.*\.cls", test=some)
    refused(run, r"some: samples without a label.*\.cls", train=some, test=tmp_path / "data" / "test")


def test_sets_that_are_no_pair(run: Path, tmp_path: Path) -> None:
    for benchmark in BOTH:
        refused(run, "label 9", (benchmark,), test=shards(tmp_path / benchmark, [0, 1, 9, 2]), overrides=QUICK[3:])
    for folder, classes in (("train", ["a", "b"]), ("test", ["b", "a"])):
        (tmp_path / "data" / folder / "classes.json").write_text(json.dumps(classes))
    refused(run, "different classes.json")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run: Path) -> None:
    save(run, 9, backbone(settings("x"), seed=12))
    (weights,) = (run / "checkpoints" / "step-00000009").glob("*.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    (card,) = evals.run(run, ["knn"], overrides=QUICK[3:])
    assert card["step"] == 7


def test_unwritable_results(run: Path) -> None:
    (run / "evals").write_text("a file in the way")
    with pytest.raises(EvalError, match=r"cannot write .*evals"):
        evals.run(run, ["knn"], overrides=QUICK[3:])
