"""Networks of torchvision and timm, tv/NAME[:FILE] and timm/NAME[:FILE]. Without a file, their
weights are drawn from a seed: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision import models

from scaletrain.config.recipe import nearest
from scaletrain.config.schema import DataConfig, ModelConfig, View
from scaletrain.evals.encoders import layout
from scaletrain.evals.encoders.encoder import Encoder, EncoderConfig, EncoderKind, load
from scaletrain.evals.encoders.layout import COUNTER, MEAN, STD, Layout
from scaletrain.evals.errors import EvalError
from scaletrain.nn import backbone

# Results of networks without a file.
HOME = Path("results")
# Their published weights expect images that are normalised in another way.
_OTHER_INPUT = ("googlenet", "inception_v3")


class _Built(NamedTuple):
    net: nn.Module
    # beginnings of the names of the classifier, which was removed
    heads: tuple[str, ...]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def find(text: str, kind: EncoderKind, config: EncoderConfig) -> Encoder:
    """The encoder tv/NAME[:FILE] or timm/NAME[:FILE]. Raises EvalError, ConfigError or
    CheckpointError.
    """
    network, _, file = text.partition(":")
    library, _, name = network.partition("/")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        built = LIBRARIES[library](name)

    net, source, home, notes = built.net, Path(network), HOME, ""
    if file:
        source = Path(file).absolute()
        home = source.parent
    if file and kind == "trained":
        notes = _load(built, source, library)
    elif kind == "trained":
        kind = "untrained"

    data = DataConfig(
        mean=config.mean or built.mean,
        std=config.std or built.std,
        views=(View(size=built.size),),
    )
    return Encoder(
        kind=kind,
        module=net.eval().requires_grad_(False),
        step=0,
        seed=config.seed,
        size=built.size,
        data=data,
        source=source,
        home=home,
        run=None,
        model=ModelConfig(name=network),
        library=library,
        notes=notes,
    )


def _load(built: _Built, path: Path, library: str) -> str:
    """Load a file of weights; returns a note on what was left out."""
    wanted = built.net.state_dict()
    first = [name for name in wanted if not name.endswith(COUNTER)][:1]
    known = Layout(prefixes=("", "module.", "model."), heads=built.heads)
    taken = layout.take(path, known, first, library)
    zero = {n: torch.zeros((), dtype=torch.int64) for n in wanted if n.endswith(COUNTER)}
    tensors = zero | taken.tensors

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    load(built.net, (shapes, tensors.__getitem__), str(path))
    return taken.notes


def _torchvision(name: str) -> _Built:
    names = models.list_models(module=models)
    if name not in names:
        raise EvalError(f"tv/{name}: torchvision has no such classifier{nearest(name, names)}")
    if name in _OTHER_INPUT:
        raise EvalError(f"tv/{name}: its published weights expect another normalisation: refused")

    net: nn.Module = models.get_model(name, weights=None)
    linear = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise EvalError(f"tv/{name}: its classifier is no linear layer, so that it has no features")

    net.set_submodule(linear[-1], nn.Identity())
    shown: Any = next(iter(models.get_model_weights(name))).transforms()
    size = int(getattr(net, "image_size", shown.crop_size[0]))
    return _Built(net, (f"{linear[-1]}.",), size, tuple(shown.mean), tuple(shown.std))


def _timm(name: str) -> _Built:
    net: Any = backbone.build(ModelConfig(name=f"{backbone.TIMM}{name}"))
    facts = getattr(net, "pretrained_cfg", None) or {}
    heads = facts.get("classifier") or ()
    return _Built(
        net,
        tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads)),
        int(facts.get("input_size", (3, 224, 224))[-1]),
        tuple(facts.get("mean", MEAN)),
        tuple(facts.get("std", STD)),
    )


LIBRARIES: dict[str, Callable[[str], _Built]] = {"tv": _torchvision, "timm": _timm}
