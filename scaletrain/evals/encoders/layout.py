"""How the checkpoints of a library hold an encoder, and how its tensors are taken from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaletrain.data.errors import printable
from scaletrain.evals.encoders import torch_files
from scaletrain.evals.errors import EvalError

# of ImageNet, as most libraries have them
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Missing in old files, and without effect on the output of the network.
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Layout:
    """How the checkpoints of a library hold an encoder."""

    # what precedes the encoder's names, of which the first that occurs is taken
    prefixes: tuple[str, ...]
    # keys that lead to the tensors, of each kind of file; () is the file itself
    nests: tuple[tuple[str, ...], ...] = (("state_dict",), ("model",), ())
    # beginnings of names after the prefix that are not of the encoder
    heads: tuple[str, ...] = ("fc.",)
    # first part of a name after the prefix: torchvision's
    renamed: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Path], Mapping[str, Any]] = torch_files.read
    # pixels of the images that it was trained with
    size: int = 224
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    # changes a network of ours where that of the library computes something else
    adapt: Callable[[nn.Module], None] | None = None


@dataclass(frozen=True)
class Taken:
    """The tensors of an encoder, and the names of all others in its file."""

    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]

    @property
    def notes(self) -> str:
        """What was left out, by the first two parts of the names."""
        groups = Counter(".".join(name.split(".")[:2]) for name in self.left_out)
        listed = ", ".join(
            f"{printable(group)}{f' ({count})' if count > 1 else ''}"
            for group, count in groups.items()
        )
        return f"not of the encoder and left out: {listed}" if listed else ""


def take(path: Path, layout: Layout, first: Sequence[str], library: str) -> Taken:
    """The encoder's tensors [float32], by their names in the network. Raises EvalError.

    first: names in the network of which a file with the encoder has one.
    """
    table = _table(layout.read(path), layout.nests)
    tensors = {name: tensor for name, tensor in table.items() if isinstance(tensor, Tensor)}

    def short(name: str, prefix: str) -> str:
        head, dot, rest = name.removeprefix(prefix).partition(".")
        return layout.renamed.get(head, head) + dot + rest

    for prefix in layout.prefixes:
        inside = {short(name, prefix): name for name in tensors if name.startswith(prefix)}
        if any(name in inside for name in first):
            break
    else:
        some = ", ".join(printable(name) for name in list(tensors)[:3]) or "no tensors"
        raise EvalError(
            f"{path} holds no encoder where {library} keeps it: no tensor "
            f"{' or '.join(f'{prefix}{first[0]}' for prefix in layout.prefixes)}; it has {some}. "
            "Give the library that wrote it"
        )

    kept = {s: name for s, name in inside.items() if not s.startswith(layout.heads)}
    taken = {s: _plain(tensors[name], name, path) for s, name in kept.items()}
    placed = set(kept.values())
    return Taken(taken, tuple(str(name) for name in table if name not in placed))


def _table(content: Mapping[str, Any], nests: tuple[tuple[str, ...], ...]) -> Mapping[str, Any]:
    """The innermost dictionary that the first of the nests leads to."""
    for nest in nests:
        inner: Any = content
        for key in nest:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and any(isinstance(t, Tensor) for t in inner.values()):
            return inner

    return {}


def _plain(tensor: Tensor, name: str, path: Path) -> Tensor:
    """A copy in float32; counters stay integers."""
    size = tensor.numel() * tensor.element_size()
    if tensor.layout != torch.strided or size > tensor.untyped_storage().nbytes():
        raise EvalError(f"{path}: its tensor {printable(name)!r} has more elements than values")

    kind = tensor.dtype if name.endswith(COUNTER) else torch.float32
    return tensor.detach().to(kind).clone(memory_format=torch.contiguous_format)
