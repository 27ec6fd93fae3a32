"""A run folder and labelled shards in miniature, for the evaluation tests."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from data_kit import add, encode
from torch import Tensor

from scaletrain import checkpoint, config
from scaletrain.config import Config
from scaletrain.core import Piece
from scaletrain.nn import resnet

COLOURS = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [220, 220, 30], [30, 220, 220], [220, 30, 220]])


def shards(folder: Path, labels: Sequence[int | None], seed: int = 0) -> Path:
    """One 16 px image per label, in two shards: the label's colour and noise. None: no label is written."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    half = len(labels) // 2
    for shard, numbers in enumerate((range(half), range(half, len(labels)))):
        with tarfile.open(folder / f"s-{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in numbers:
                label = labels[number]
                colour = COLOURS[(label or 0) % len(COLOURS)]
                pixels = np.clip(colour + random.normal(0, 25, (16, 16, 3)), 0, 255).astype(np.uint8)
                if label is not None:
                    add(tar, f"{number:05d}.cls", str(label).encode())
                add(tar, f"{number:05d}.png", encode(pixels))
    return folder


def settings(train: Path | str, **model: object) -> Config:
    return config.build(
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
    pieces = {f"method.backbone.{name}": Piece(t.flatten(), 0, tuple(t.shape)) for name, t in state.items()}
    pieces["method.head.weight"] = Piece(torch.zeros(6), 0, (2, 3))
    writer = checkpoint.Writer(run / "checkpoints", keep_last=5, keep_every=0)
    writer.save(step, pieces, {})
    writer.close()


def run_folder(root: Path, train: Path | str, step: int = 7) -> Path:
    cfg = settings(train)
    run = root / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.dump(cfg))
    save(run, step, backbone(cfg))
    return run
