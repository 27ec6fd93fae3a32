"""Encoders from the checkpoints of other trainers, SOURCE:FILE; a source is a file in foreign/."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from scaletrain.config.schema import DataConfig, ModelConfig, View
from scaletrain.evals.encoders import foreign, layout
from scaletrain.evals.encoders.encoder import Encoder, EncoderConfig, EncoderKind, check
from scaletrain.evals.encoders.layout import COUNTER, Layout
from scaletrain.evals.errors import EvalError
from scaletrain.nn import resnet
from scaletrain.nn.blocks import Basic

# Widest network; the widest published one is five times ResNet-50.
_WIDTH = 16
# Pixels of the images of networks with the cifar stem.
_SMALL = 32


def sources() -> tuple[str, ...]:
    """Names of all trainers whose checkpoints can be read."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(foreign.__path__)))


def find(source: str, path: Path, kind: EncoderKind, config: EncoderConfig) -> Encoder:
    """The encoder of a checkpoint. Raises EvalError, DataError or CheckpointError."""
    if not path.name:
        raise EvalError(f"{source}: which file? Write {source}:FILE")

    known: Layout = importlib.import_module(f"{foreign.__name__}.{source}").LAYOUT
    path = path.absolute()
    taken = layout.take(path, known, ("conv1.weight",), source)
    model = _model({name: tuple(t.shape) for name, t in taken.tensors.items()}, path)
    size = known.size if model.stem == "imagenet" else _SMALL
    if size == _SMALL and None in (config.mean, config.std):
        raise EvalError(
            f"{path} is a network for small images, which every data set normalises in its own "
            "way; say how with --set encoder.mean=[R,G,B] --set encoder.std=[R,G,B]"
        )

    data = DataConfig(
        mean=config.mean or known.mean, std=config.std or known.std, views=(View(size=size),)
    )

    # The shapes are compared before the memory is taken.
    with torch.device("meta"):
        net: nn.Module = resnet.ResNet(model)
    wanted = net.state_dict()
    zero = {n: torch.zeros((), dtype=torch.int64) for n in wanted if n.endswith(COUNTER)}
    tensors = zero | taken.tensors
    check(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tuple(tensor.shape) for name, tensor in wanted.items()},
        str(path),
    )

    if kind == "untrained":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            net = resnet.ResNet(model)
    else:
        net.load_state_dict(tensors, assign=True)
    if known.adapt is not None:
        known.adapt(net)

    return Encoder(
        kind="trained",
        module=net.eval().requires_grad_(False),
        step=0,
        seed=config.seed,
        size=size,
        data=data,
        source=path,
        home=path.parent,
        run=None,
        model=model,
        library=source,
        notes=taken.notes,
    )


def _model(shapes: Mapping[str, tuple[int, ...]], path: Path) -> ModelConfig:
    """The ResNet with tensors of these shapes."""
    blocks = [0, 0, 0, 0]
    for name in shapes:
        if match := re.match(r"layer([1-4])\.(\d{1,3})\.", name):
            stage = int(match[1]) - 1
            blocks[stage] = max(blocks[stage], int(match[2]) + 1)

    basic = "layer1.0.conv3.weight" not in shapes
    named = [
        name
        for name, (block, depths) in resnet.LAYERS.items()
        if depths == tuple(blocks) and (block is Basic) == basic
    ]
    channels, _, kernel, _ = (*shapes["conv1.weight"], 0, 0, 0, 0)[:4]
    stem = {7: "imagenet", 3: "cifar"}.get(kernel)

    if not named or stem is None or not 1 <= channels <= 64 * _WIDTH:
        raise EvalError(
            f"{path} is no ResNet that is known: it has {'-'.join(map(str, blocks))} "
            f"{'basic blocks' if basic else 'bottlenecks'} and a first layer of {channels} "
            f"channels and {kernel}x{kernel} pixels"
        )

    return ModelConfig.model_validate({"name": named[0], "width": channels / 64, "stem": stem})
