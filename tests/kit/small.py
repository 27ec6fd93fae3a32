"""Every method in miniature: what the parity and contract tests train."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain import dist, rng
from scaletrain.config import load, recipe
from scaletrain.config.schema import Config, DataConfig, component_config
from scaletrain.core import PRETRAINING, Batch, Clock
from scaletrain.engines.base import Engine
from scaletrain.train.build import build

SAMPLES, BATCH, STEPS_PER_EPOCH, CLASSES = 48, 12, 4, 5

# each auxiliary with a method; `config` takes such names
JOINED = ("densecl+rotation", "supcon+suncet")
# methods that tests of resuming try in every way; between them they use moving averages, a queue, a
# memory of every sample, clusterings and masks
RESUMED = ("swav", "deepcluster_v2", "relicv2")


def config(name: str, **changes: Any) -> Config:
    """The configuration of a method, `byol`, or of one with auxiliaries, `byol+rotation`, with the
    options that its file gives as `miniature`; `changes` are merged over it.
    """
    method, *auxiliaries = name.split("+")
    model = importlib.import_module(f"scaletrain.methods.{method}").Model
    small = [] if model.two_views else [{"size": 8, "count": 1}]
    data = {"path": "synthetic", "views": [{"size": 16, "count": 2}, *small]}
    raw: dict[str, Any] = {
        "batch": BATCH,
        "data": data,
        "model": {"name": "resnet10", "width": 0.0625, "stem": "cifar", "zero_init": True},
        "method": {"name": method, **component_config("methods", method).miniature},
        "auxiliaries": [
            {"name": name, **component_config("auxiliaries", name).miniature}
            for name in auxiliaries
        ],
        **(
            {"data": {**data, "support": {"classes": 3, "per_class": 4, "epochs": 1}}}
            if "suncet" in auxiliaries
            else {}
        ),
        "optim": {
            "lr": 0.2,
            "lr_scaling": "none",
            "warmup_epochs": 0,
            "trust_coefficient": 0.05,
            "weight_decay": 1e-3,
        },
        "engine": {"name": "ddp", "precision": "fp64"},
    }
    return load.build(recipe.merge(raw, changes))


def pretrains(method: str) -> bool:
    """Whether it is of a kind that trains an encoder from nothing, for which more is required."""
    name = method.partition("+")[0]
    return importlib.import_module(f"scaletrain.methods.{name}").Model.kind in PRETRAINING


def batch(cfg: Config, step: int) -> Batch:
    """This rank's slice of a made-up global batch that depends on the step alone; of two
    precisions, the same numbers.
    """
    dtype = torch.float64 if cfg.engine.precision == "fp64" else torch.float32  # type: ignore[attr-defined]
    draw = torch.Generator().manual_seed(1000 + step)
    index = torch.randperm(SAMPLES, generator=draw)[: cfg.batch]
    sizes = [(v.size, v.count) for v in cfg.data.views]
    views = [
        torch.randn(n, cfg.batch, 3, s, s, generator=draw, dtype=torch.float64) for s, n in sizes
    ]
    masks = (
        torch.rand(sizes[0][1], cfg.batch, 1, sizes[0][0], sizes[0][0], generator=draw) < 0.6
    ).double()
    rows = cfg.batch // dist.world()
    own = slice(dist.rank() * rows, (dist.rank() + 1) * rows)
    pixels = torch.tensor([[-2.0] * 3, [2.0] * 3], dtype=torch.float64)
    keys = rng.hash64(0, step, index)
    shown, pixels = tuple(v[:, own].to(dtype) for v in views), pixels.to(dtype)
    found = Batch(
        shown, index[own], keys[own], pixels, index[own] % CLASSES, masks[:, own].to(dtype)
    )
    return (
        dataclasses.replace(found, support=_support(cfg.data, step, found))
        if cfg.data.support
        else found
    )


def _support(data: DataConfig, step: int, main: Batch) -> Batch | None:
    assert data.support is not None
    if step >= data.support.epochs * STEPS_PER_EPOCH:
        return None
    rows, size = data.support.classes * data.support.per_class, data.views[0].size
    draw = torch.Generator().manual_seed(5000 + step)
    images = torch.randn(1, rows, 3, size, size, generator=draw, dtype=torch.float64)
    labels = torch.arange(rows) % data.support.classes
    labels[0] = -1  # that of a substitute
    index = torch.arange(rows)
    return Batch(
        (dist.mine(images[0])[None].to(main.pixel_range),),
        dist.mine(index),
        dist.mine(index),
        main.pixel_range,
        dist.mine(labels),
    )


def engine(cfg: Config, *, perturb: bool = True) -> Engine:
    """The engine, with the gammas moved off their special values (a zero gamma hides what lies
    before it).
    """
    result = build(cfg, SAMPLES, STEPS_PER_EPOCH, torch.device("cpu"))
    draw = torch.Generator().manual_seed(7)
    for name, shard in result.shards.items():
        if perturb and len(shard.shape) == 1 and name.endswith("weight"):
            result.write(
                name, 0.5 + torch.rand(shard.shape, generator=draw, dtype=shard.tensor.dtype)
            )
    return result


def smooth() -> Any:
    """Context in which ReLUs have no kink: there float32's rounding, which depends on the ranks,
    grows a thousandfold.
    """
    return mock.patch.object(F, "relu", lambda x, inplace=False: F.silu(x))


def run(trainer: Engine, cfg: Config, start: int, stop: int) -> list[float]:
    """The global losses of steps start .. stop - 1."""
    losses = []
    for step in range(start, stop):
        clock = Clock(step, 20, step // STEPS_PER_EPOCH, STEPS_PER_EPOCH)
        if step % STEPS_PER_EPOCH == 0:

            def features(
                embed: Callable[[Batch], Tensor], *, every: bool = True, training: bool = False
            ) -> Iterator[tuple[Tensor, Tensor]]:
                batches = (batch(cfg, 100 + i) for i in range(8))
                return trainer.features(batches, embed, training=training)

            trainer.method.on_epoch(clock, features, trainer.write)
        losses.append(trainer.step(batch(cfg, step), clock, cfg.optim.lr, cfg.optim.lr).loss)
    return losses
