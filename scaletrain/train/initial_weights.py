"""Initial weights of a backbone from a file: exported by scaletrain, or from torchvision, timm or
another trainer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from scaletrain.checkpoint import files
from scaletrain.engines.base import Engine
from scaletrain.engines.placement import TrainingError

# Classifiers, which a backbone does not have.
HEADS = ("fc.", "head.", "classifier.")
# Missing in old files, and without effect on the output of the network.
COUNTER = "num_batches_tracked"
OURS = "method.backbone."

Shape = tuple[int, ...]


def start_from(engine: Engine, path: Path) -> str:
    """Load the backbone and target backbones from a safetensors file. Returns remarks for the log.

    Names may have a prefix such as `module.` or `backbone.`, and batch norms may lack their
    counters. Raises TrainingError for a file of another network.
    """
    tensors, _ = files.load_file(path)
    mine = {
        name.removeprefix(OURS): at.shape
        for name, at in engine.placed().items()
        if name.startswith(OURS)
    }

    prefix = _prefix(tensors, mine, path)
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    heads = [name for name in inside if name.startswith(HEADS) and name not in mine]
    taken = {name: tensor for name, tensor in inside.items() if name not in heads}

    _check(taken, mine, path)

    backbones = (
        "backbone",
        *(target for target, online in engine.method.targets.items() if online == "backbone"),
    )

    for module in backbones:
        for name, tensor in taken.items():
            engine.write(f"{module}.{name}", tensor)

    notes = [f"its names begin with '{prefix}'"] if prefix else []
    if without := [name for name in mine if name not in taken]:
        notes.append(f"{len(without)} counters {COUNTER} are not in it and start at zero")

    left_out = [
        *(prefix + name for name in heads),
        *(name for name in tensors if not name.startswith(prefix)),
    ]

    if left_out:
        notes.append(
            f"{len(left_out)} of its tensors are not of the backbone and were left out: "
            f"{_some(left_out)}"
        )

    return "; ".join(notes)


def _prefix(tensors: Collection[str], mine: Collection[str], path: Path) -> str:
    """The prefix of the backbone's names in the file: the one with which most of them occur."""
    wanted = [name for name in mine if not name.endswith(COUNTER)]
    before = {
        name[: -len(wanted[0])]
        for name in tensors
        if name == wanted[0] or name.endswith(f".{wanted[0]}")
    }

    there = {prefix: sum(prefix + name in tensors for name in wanted) for prefix in sorted(before)}
    best = [prefix for prefix, count in there.items() if count == max(there.values())]
    if len(best) > 1 and there[best[0]] == len(wanted):
        listed = ", ".join(f"'{prefix}'" for prefix in best)
        raise TrainingError(
            f"{path} holds several networks that fit this model, behind {listed}; keep one of them "
            "in the file"
        )

    return best[0] if best else ""


def _check(taken: Mapping[str, Tensor], mine: Mapping[str, Shape], path: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in taken.items()}
    needed = [name for name in mine if name in shapes or not name.endswith(COUNTER)]
    wrong = [name for name in needed if shapes.get(name) != mine[name]] or sorted(
        set(shapes) - set(mine)
    )

    if wrong:
        there, here = (side.get(wrong[0], "absent") for side in (shapes, mine))
        raise TrainingError(
            f"{path} does not fit this model: {wrong[0]} is {there} in the file and {here} in the "
            "model "
            f"(the file has {_some(taken)})"
        )


def _some(names: Collection[str]) -> str:
    first = list(names)[:3]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "")
