"""Reads the saved weights of one module: from a run, a step of its checkpoints, or a safetensors
file that was exported by scaletrain or comes from torchvision, timm or another trainer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaletrain.checkpoint import files, reader
from scaletrain.checkpoint.files import CheckpointError
from scaletrain.config import renamed
from scaletrain.config.recipe import ConfigError
from scaletrain.core import Source
from scaletrain.engines.placement import TrainingError

# What an encoder does not have: classifiers, projectors and the like of other libraries.
HEADS = re.compile(
    r"(fc|heads?|classifier|last_linear|projection_head|prediction_head|projector|predictor|"
    r"prototypes)\."
)
# Networks that follow another one, which is preferred where a file has both.
FOLLOWERS = re.compile(r"(target|momentum|teacher|ema)(_|$)|.*_(k|target|momentum|teacher|ema)$")
# Missing in old files, and without effect on the output of the network.
COUNTER = "num_batches_tracked"
ENCODER = "backbone"
# What precedes the names of a method's tensors in a checkpoint.
METHOD = "method."

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The weights of one module."""

    # by their names in the module
    tensors: dict[str, Tensor]
    # what checkpoints record of them: path, module, step if known, sha256
    origin: dict[str, Any]
    # remarks for the log
    notes: str
    # what its network saw, as `images_of`; None where the source does not say
    images: dict[str, Any] | None


@dataclass(frozen=True)
class _Stored:
    """Tensors of a source, whatever holds them."""

    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]
    step: int | None = None
    images: dict[str, Any] | None = None
    # sha256 of the data sets of its training, as far as they are known
    data: tuple[str, ...] = ()


def read(source: Source, shapes: Mapping[str, Shape], step: int | None = None) -> Weights:
    """The weights of a module from its source. Every rank calls it.

    shapes: those of the module's tensors by name. step: of a run, in place of its newest one.
    Names may have a prefix such as `module.` or `backbone.`, and batch norms may lack their
    counters. Raises CheckpointError, or TrainingError where the source is of another network.
    """
    path = source.path
    stored = _of_run(path, step) if path.is_dir() else _of_file(path)
    wanted = [name for name in shapes if not name.endswith(COUNTER)]
    prefix = _prefix(stored.shapes, wanted, source)
    inside = {
        name.removeprefix(prefix): shape
        for name, shape in stored.shapes.items()
        if name.startswith(prefix)
    }

    heads = [name for name in inside if HEADS.match(name) and name not in shapes]
    taken = {name: shape for name, shape in inside.items() if name not in heads}
    _check(taken, shapes, path)

    tensors = {name: stored.read(prefix + name) for name in taken}
    origin = {
        "path": str(path.absolute()),
        "module": source.module,
        "step": stored.step,
        "sha256": files.fingerprint(tensors, {}),
        "data": list(stored.data),
    }

    without = [name for name in shapes if name not in taken]
    left_out = [
        *(prefix + name for name in heads),
        *(name for name in stored.shapes if not name.startswith(prefix)),
    ]
    notes = _notes(source, stored.step if path.is_dir() else None, prefix, without, left_out)
    zero = dict.fromkeys(without, torch.zeros((), dtype=torch.int64))
    return Weights(tensors | zero, origin, notes, stored.images)


def images_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved configuration makes of images before the first layer of its encoder: no tensor
    shows it.
    """
    raw = renamed.translated({section: config.get(section, {}) for section in ("model", "data")})
    normalised = {key: list(raw["data"][key]) for key in ("mean", "std") if key in raw["data"]}
    return {"input": raw["model"].get("input", "rgb"), **normalised}


def check_images(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> str:
    """Raise ConfigError for weights that were trained on another model.input; a remark on another
    normalisation, or "".
    """
    if before["input"] != now["input"]:
        raise ConfigError(
            f"{what} was trained with model.input={before['input']}, and this run has "
            f"model.input={now['input']}: set model.input={before['input']}"
        )

    other = [key for key in ("mean", "std") if before.get(key, now[key]) != now[key]]
    listed = " and ".join(f"data.{key}={before[key]}" for key in other)
    return f"its images were normalised with {listed}, here they are not" if other else ""


def _of_file(path: Path) -> _Stored:
    tensors, meta = files.load_file(path)
    step = meta.get("step", "")
    return _Stored(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        tensors.__getitem__,
        int(step) if step.isdecimal() else None,
        _images_of_file(path, meta),
    )


def _images_of_file(path: Path, meta: Mapping[str, str]) -> dict[str, Any] | None:
    """What the encoder of a file that scaletrain exported saw; None for a file of others."""
    if not {"model", "data"} <= meta.keys():
        return None
    try:
        return images_of({key: json.loads(meta[key]) for key in ("model", "data")})
    except (ValueError, AttributeError, TypeError):
        # text that others put under these names
        return None


def _of_run(path: Path, step: int | None) -> _Stored:
    """The tensors of a method in a run's newest or given step, or in the step at `path`."""
    root = path / "checkpoints"

    if root.is_dir():
        saved = reader.latest(root) if step is None else _step_of(root, step)
    elif (path / reader.MANIFEST).is_file():
        saved = reader.open_step(path)
    else:
        raise CheckpointError(
            f"{path} is a folder, but neither a run nor a step of one; give one of these or one "
            ".safetensors file (`scaletrain export RUN FILE` makes one)"
        )

    if saved is None:
        raise CheckpointError(f"{root}: no good checkpoint yet; let that run save one")

    step_read = saved
    return _Stored(
        {
            name.removeprefix(METHOD): tuple(saved.shape(name))
            for name in saved.names()
            if name.startswith(METHOD)
        },
        lambda name: step_read.read(METHOD + name).view(step_read.shape(METHOD + name)),
        saved.step,
        images_of(saved.meta["config"]) if "config" in saved.meta else None,
        data_of(saved.meta),
    )


def data_of(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """sha256 of the data sets of a checkpoint's run and of those that its weights came from."""
    before = (
        data
        for origin in meta.get("initial_weights", {}).values()
        for data in origin.get("data", ())
    )
    sources = (meta.get("data") or {}).get("sources", ())
    own = (source["sha256"] for source in sources if source.get("sha256"))
    return tuple(dict.fromkeys([*own, *before]))


def _step_of(root: Path, step: int) -> reader.SavedStep:
    folder = reader.folder_of(root, step)
    if not (folder / reader.MANIFEST).is_file():
        raise CheckpointError(f"{folder} is no longer there: restore it from a copy")
    return reader.open_step(folder)


def _prefix(names: Collection[str], wanted: list[str], source: Source) -> str:
    """What precedes the module's names in the source.

    A named module is looked for by its name. An encoder without its name, and a file of one
    network, by the prefix with which most of the module's names occur.
    """
    before = {
        name[: -len(wanted[0])]
        for name in names
        if name == wanted[0] or name.endswith(f".{wanted[0]}")
    }
    own = f".{source.module}."
    if source.module and any(own in f".{name}" for name in names):
        exact = {prefix for prefix in before if f".{prefix}".endswith(own)}
        before = exact or {prefix for prefix in before if own in f".{prefix}"}
    elif source.module not in ("", ENCODER):
        raise TrainingError(
            f"{source.path} has no module '{source.module}'; it has {_modules(names)}"
        )

    there = {prefix: sum(prefix + name in names for name in wanted) for prefix in sorted(before)}
    best = [prefix for prefix, count in there.items() if count == max(there.values())]
    leading = [
        prefix for prefix in best if not any(FOLLOWERS.match(part) for part in prefix.split("."))
    ]
    best = leading or best

    if len(best) > 1 and there[best[0]] == len(wanted):
        listed = ", ".join(f"'{prefix}'" for prefix in best)
        raise TrainingError(
            f"{source.path} holds several networks that fit this model, behind {listed}; keep one "
            "of them in the file"
        )

    return best[0] if best else ""


def _check(taken: Mapping[str, Shape], shapes: Mapping[str, Shape], path: Path) -> None:
    needed = [name for name in shapes if name in taken or not name.endswith(COUNTER)]
    wrong = [name for name in needed if taken.get(name) != shapes[name]] or sorted(
        set(taken) - set(shapes)
    )

    if wrong:
        there, here = (side.get(wrong[0], "absent") for side in (taken, shapes))
        raise TrainingError(
            f"{path} does not fit this model: {wrong[0]} is {there} in the file and {here} in the "
            f"model (the file has {_some(taken)})"
        )


def _notes(
    source: Source, step: int | None, prefix: str, without: list[str], left_out: list[str]
) -> str:
    # a run is expected to have more than this module
    plain = step is not None and prefix == f"{source.module}."
    notes = []

    if step is not None:
        notes.append(f"step {step}")
    if prefix and not plain:
        notes.append(f"its names begin with '{prefix}'")
    if without:
        notes.append(f"{len(without)} counters {COUNTER} are not in it and start at zero")
    if left_out and not plain:
        notes.append(
            f"{len(left_out)} of its tensors are not of the {source.module or 'network'} and were "
            f"left out: {_some(left_out)}"
        )

    return "; ".join(notes)


def _modules(names: Collection[str]) -> str:
    return _some(dict.fromkeys(name.partition(".")[0] for name in names))


def _some(names: Collection[str]) -> str:
    first = list(names)[:3]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "")
