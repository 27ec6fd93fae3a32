"""The whole network of a run, rebuilt, and the score of its own classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from kit.evals import shards

from scaletrain.checkpoint import reader
from scaletrain.checkpoint import writer as checkpoint
from scaletrain.config import load
from scaletrain.config.schema import Config, component_config
from scaletrain.core import Method, Piece
from scaletrain.data.reading.reader import Shards
from scaletrain.evals import network
from scaletrain.evals import run as evals
from scaletrain.evals.errors import EvalError
from scaletrain.report import cards
from scaletrain.train.build import build_method, run_info_of
from scaletrain.train.loop import train

QUICK = ("features.workers=0", "features.batch=32")
LABELS = [(7 * i) % 6 for i in range(24)]


def settings(train: Path, method: dict[str, Any], **changes: Any) -> Config:
    views = [{"size": 16, "count": 2}]
    return load.build(
        {
            "batch": 8,
            "data": {"path": str(train), "views": views, "workers": 0, "lanes": 8},
            "model": {"name": "resnet18", "width": 0.0625, "stem": "cifar"},
            "method": method,
            **changes,
        }
    )


def save(root: Path, step: int = 7, method: str = "supervised", **options: Any) -> Path:
    """A run of this method on shards in `root`/train, with drawn weights and a test set."""
    train = root / "train"
    if not train.exists():
        shards(train, [(i * 5 + 2) % 6 for i in range(24)])
        shards(root / "test", LABELS, seed=1)
    cfg = settings(train, {"name": method, **options})
    made = build_method(cfg, run_info_of(cfg, 24, 3))
    draw = torch.Generator().manual_seed(step)
    pieces = {}
    for name, tensor in made.state_dict().items():
        if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=draw)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.3, generator=draw)
        pieces[f"method.{name}"] = Piece(tensor.flatten(), 0, tuple(tensor.shape))
    pieces["optim.classifier.bias.momentum_buffer"] = Piece(torch.zeros(3), 0, (3,))
    run = root / "run"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(load.dump(cfg))
    writer = checkpoint.Writer(run / "checkpoints", keep_last=5, keep_every=0)
    sources = [{"samples": 24, "sha256": Shards(train).fingerprint, "path": str(train)}]
    writer.save(step, pieces, {"data": {"sources": sources}})
    writer.close()
    return run


def test_the_network_is_rebuilt_with_every_weight(tmp_path: Path) -> None:
    run = save(tmp_path, classes=6)
    found = network.load(run)
    assert not found.method.training
    assert not any(p.requires_grad for p in found.method.parameters())
    saved = {p.stem: p for p in (run / "checkpoints").iterdir()}
    assert network.load(saved["step-00000007"]).weights == found.weights
    x = torch.randn(4, 3, 16, 16)
    assert found.method.predict(x).shape == (4, 6)
    save(tmp_path, 8, classes=6)
    assert network.load(run).weights != found.weights


def test_a_memory_of_every_sample_has_its_size_again(tmp_path: Path) -> None:
    small = component_config("methods", "pirl").miniature
    assert isinstance(network.load(save(tmp_path, method="pirl", **small)).method, Method)


def test_the_score_of_the_classifier(tmp_path: Path) -> None:
    run = save(tmp_path, classes=8)
    (result,) = evals.run(run, ["predict"], overrides=QUICK)
    method = network.load(run).method
    test = Shards(tmp_path / "test")
    data = load.load(run / "config.yaml").data
    pixels = [cv2.imdecode(np.frombuffer(test.read(i).image, np.uint8), 1) for i in range(24)]
    images = torch.tensor(np.stack(pixels)[..., ::-1].copy()).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.mean, data.std))
    answers = method.predict((images - mean) / std).argmax(1)
    right = answers == torch.from_numpy(test.labels())
    assert result["metrics"]["predict"] == pytest.approx(100 * right.double().mean().item())
    each = [right[torch.tensor(LABELS) == label].double().mean().item() for label in range(6)]
    assert result["metrics"]["predict_per_class"] == pytest.approx(100 * sum(each) / 6)
    assert "predict_top5" in result["metrics"]
    assert result["protocol"]["fitted"].startswith("nothing")
    assert any(line.startswith("predict ") for line in cards.report([result]))
    (again,) = evals.run(run, ["predict"], overrides=QUICK)
    assert again["file"] == result["file"]


def test_the_identity_covers_the_classifier(tmp_path: Path) -> None:
    """Two networks of one encoder have results of their own."""
    run = save(tmp_path, classes=6)
    first = evals.run(run, ["predict", "knn"], overrides=QUICK)
    saved = network.load(run)
    state = saved.method.state_dict()
    state["classifier.bias"] += 1
    pieces = {f"method.{n}": Piece(t.flatten(), 0, tuple(t.shape)) for n, t in state.items()}
    for path in (run / "checkpoints" / "step-00000007").iterdir():
        path.unlink()
    writer = checkpoint.Writer(run / "checkpoints", keep_last=5, keep_every=0)
    writer.save(7, pieces, dict(saved.meta))
    writer.close()
    second = evals.run(run, ["predict", "knn"], overrides=QUICK)
    assert [a["file"] == b["file"] for a, b in zip(first, second, strict=True)] == [False, True]
    assert first[0]["identity"]["protocol"] == second[0]["identity"]["protocol"]


def test_an_encoder_is_fine_tuned_and_scored(tmp_path: Path) -> None:
    """From a run of pretraining to the score of the classifier that was trained on top."""
    pretrained = save(tmp_path, method="simclr")
    before = reader.latest(pretrained / "checkpoints")
    assert before is not None
    tune = {"name": "finetune", "classes": 6, "source": str(pretrained), "head_lr": 100}
    cfg = settings(
        tmp_path / "train", tune, optim={"name": "sgd", "lr": 1e-7, "warmup_epochs": 0}, steps=3
    )
    train(cfg, tmp_path / "tuned")
    found = network.load(tmp_path / "tuned")
    weight = found.method.get_parameter("backbone.conv1.weight")
    start = before.read("method.backbone.conv1.weight").view_as(weight)
    torch.testing.assert_close(weight, start, rtol=0, atol=1e-4)
    assert found.method.get_parameter("classifier.weight").any()
    assert found.meta["initial_weights"]["backbone"]["step"] == 7
    (result,) = evals.run(tmp_path / "tuned", ["predict"], overrides=QUICK)
    assert set(result["metrics"]) == {"predict", "predict_top5", "predict_per_class"}
    assert result["protocol"]["test_seen_in_training"] is False


def test_a_test_set_of_the_pretraining_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(tmp_path, method="simclr")
    short = {"steps": 1, "optim": {"warmup_epochs": 0}}
    train(settings(tmp_path / "test", {"name": "simclr"}, **short), tmp_path / "before")
    tune: dict[str, Any] = {"name": "finetune", "classes": 6, "source": str(tmp_path / "before")}
    train(settings(tmp_path / "train", tune, **short), run.parent / "tuned")
    (result,) = evals.run(tmp_path / "tuned", ["predict"], overrides=QUICK)
    assert result["protocol"]["test_seen_in_training"] is True
    assert "is no score of unseen images" in capsys.readouterr().err


def test_what_cannot_be_scored(tmp_path: Path) -> None:
    run = save(tmp_path, classes=5)

    def refused(text: str, **options: Any) -> None:
        with pytest.raises(EvalError, match=text):
            evals.run(run, ["predict"], overrides=QUICK, **options)

    refused("its classifier tells 5 classes apart, and .*train has labels up to 5")
    refused("the untrained encoder is an encoder without the heads", encoder="untrained")
    other = shards(tmp_path / "other", [i % 6 for i in range(24)], seed=5)
    refused(".*other is not what .*step-00000007 was trained on", train=other)
    save(tmp_path, 8, method="simclr")
    with pytest.raises(NotImplementedError, match="simclr has no classifier to predict with"):
        network.load(run).method.predict(torch.zeros(1, 3, 16, 16))
    refused("method simclr has no classifier of its own .*; evaluate its encoder, e.g. with knn")
