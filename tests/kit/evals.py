"""A run folder and labelled shards in miniature, for the evaluation tests."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kit.data import add, encode
from scaletrain.checkpoint import writer as checkpoint
from scaletrain.config import load
from scaletrain.config.schema import Config
from scaletrain.core import Piece
from scaletrain.data.reading.reader import Shards
from scaletrain.evals import datasets, results
from scaletrain.evals.context import EvalContext
from scaletrain.evals.encoders.encoder import Encoder
from scaletrain.evals.features import FeatureConfig
from scaletrain.evals.intervals import interval
from scaletrain.evals.open_dataset import open_dataset
from scaletrain.evals.predictions import named_metrics, pack
from scaletrain.nn import resnet

COLOURS = np.array(
    [[220, 30, 30], [30, 220, 30], [30, 30, 220], [220, 220, 30], [30, 220, 220], [220, 30, 220]]
)


def shards(
    folder: Path, labels: Sequence[int | None], seed: int = 0, colours: Sequence[int] | None = None
) -> Path:
    """One 16 px image per label, in two shards: the label's colour and noise. None: no label is
    written.

    With `colours`, plain images of these.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    half = len(labels) // 2
    painted, noise = ([label or 0 for label in labels], 25) if colours is None else (colours, 0)
    for shard, numbers in enumerate((range(half), range(half, len(labels)))):
        with tarfile.open(folder / f"s-{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in numbers:
                label = labels[number]
                pixels = np.clip(
                    COLOURS[painted[number] % len(COLOURS)] + random.normal(0, noise, (16, 16, 3)),
                    0,
                    255,
                ).astype(np.uint8)
                if label is not None:
                    add(tar, f"{number:05d}.cls", str(label).encode())
                add(tar, f"{number:05d}.png", encode(pixels))
    return folder


def spoil(folder: Path, sample: int) -> None:
    """Alter a byte of a sample's image: whoever reads it notices."""
    source = Shards(folder)
    file, image = folder / source.name(sample).partition("/")[0], source.read(sample).image
    raw = file.read_bytes()
    at = raw.index(image) + 20
    file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])


def settings(train: Path | str, **model: object) -> Config:
    return load.build(
        {
            "seed": 3,
            "batch": 8,
            "data": {"path": str(train), "views": [{"size": 16, "count": 2}], "workers": 0},
            "model": {"name": "resnet18", "width": 0.0625, "stem": "cifar", **model},
            "method": {"name": "simclr"},
        }
    )


def backbone(cfg: Config, seed: int = 11) -> dict[str, Tensor]:
    """Tensors of a trunk that is neither the fresh one nor at its initial batch-norm statistics."""
    torch.manual_seed(seed)
    state = resnet.ResNet(cfg.model).state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return state


def save(run: Path, step: int, state: dict[str, Tensor]) -> None:
    """A checkpoint as an engine would write it, with tensors that are not the backbone's."""
    pieces = {
        f"method.backbone.{name}": Piece(t.flatten(), 0, tuple(t.shape))
        for name, t in state.items()
    }
    pieces["method.head.weight"] = Piece(torch.zeros(6), 0, (2, 3))
    writer = checkpoint.Writer(run / "checkpoints", keep_last=5, keep_every=0)
    writer.save(step, pieces, {})
    writer.close()


def run_folder(root: Path, train: Path | str, step: int = 7, **data: object) -> Path:
    cfg = settings(train)
    run = root / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        load.dump(cfg.model_copy(update={"data": cfg.data.model_copy(update=data)}))
    )
    save(run, step, backbone(cfg))
    return run


def context(
    encoder: Encoder,
    train: Path,
    test: Path,
    labels: Path | None = None,
    store: Path | None = None,
    **settings: Any,
) -> EvalContext:
    """An encoder with a training and a test set, and features that are stored only in `store`."""
    chosen = FeatureConfig(**{"batch": 8, "workers": 0, **settings})
    data = encoder.data
    dataset = open_dataset(
        datasets.given(train, test, labels=labels),
        cache=data.cache,
        skip=data.on_bad == "skip",
        max_bad=data.max_bad,
    )
    return EvalContext(encoder, dataset, chosen, store)


def result_files(folder: Path) -> list[Path]:
    """The results in a folder, without the predictions next to them and the stored features."""
    return sorted(folder.glob("*.json"))


def write_result(
    run: Path, step: int, metrics: dict[str, float] | None = None, **changes: Any
) -> Path:
    """A file of results of `linear` as an evaluation leaves it, with its predictions.

    `changes` of its protocol, of `dataset`, `name`, `encoder`, `trained`, `left_out` and
    `predictions`, which have the metrics if none are given.
    """
    kind, left_out = changes.pop("encoder", "trained"), changes.pop("left_out", [])
    predictions = changes.pop("predictions", {})
    own = {key: changes.pop(key, default) for key, default in (("name", ""), ("trained", {}))}
    dataset = changes.pop("dataset", "data")
    protocol = {
        "benchmark": "linear",
        "linear": {"epochs": 5},
        "train": "a" * 64,
        "test": "b" * 64,
        "labels": None,
    } | changes
    identity = {
        "format": results.FORMAT,
        "protocol": protocol,
        "encoder": {"kind": kind, "step": step, "run": str(run), "name": own["name"]},
    }
    sets = {
        part: {
            "path": f"/data/{part}",
            "samples": 9,
            "sha256": protocol[part],
            "left_out": left_out,
        }
        for part in ("train", "test")
    }
    labels = (
        {"labels": {"file": "few.json", "sha256": protocol["labels"]}} if protocol["labels"] else {}
    )
    if metrics is None:
        named = list(named_metrics(predictions))
        metrics = {key: value for key, _, _, value in named}
        bounds = {key: interval(predictions[part], metric) for key, part, metric, _ in named}
    else:
        bounds = {key: (max(0.0, x - 2), min(100.0, x + 2)) for key, x in metrics.items()}

    content = {
        "format": results.FORMAT,
        "digest": results.digest(identity),
        "benchmark": protocol["benchmark"],
        "dataset": dataset,
        "encoder": kind,
        "step": step,
        "measured": "2026-01-01T00:00:00+00:00",
        "main": next(iter(metrics)),
        "metrics": metrics,
        "intervals": bounds,
        "protocol": {},
        "data": sets | labels,
        "identity": identity,
        **own,
    }
    stem = f"{protocol['benchmark']}@{dataset}-step-{step}-{results.digest(identity)}"
    path = run / "evals" / f"{stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write(path, content, pack(predictions))
    return path
