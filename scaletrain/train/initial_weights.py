"""Gives modules the saved weights that they start from, in a new run, and loads constant modules
at every start.

Checkpoints record where each came from, with a sha256 of the tensors: a resumed run never has
another teacher than the one that it began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletrain import dist, exit_codes
from scaletrain.checkpoint.files import CheckpointError
from scaletrain.checkpoint.reader import SavedStep
from scaletrain.config.recipe import ConfigError
from scaletrain.core import Method, Source
from scaletrain.engines.base import Engine
from scaletrain.engines.placement import TrainingError
from scaletrain.train import weight_sources
from scaletrain.train.weight_sources import ENCODER, Shape, Weights

# In the metadata of a checkpoint: {module: path, module there, step, sha256}.
META = "initial_weights"
# Digits of a sha256 in messages.
_SHOWN = 12

Origins = dict[str, dict[str, Any]]


def start_from(
    engine: Engine, sources: Mapping[str, Source], images: Mapping[str, Any] | None = None
) -> tuple[Origins, list[str]]:
    """Load the modules of a new run from their sources. Returns where they came from, as
    checkpoints record it, and a line for the log on each. Every rank calls it.

    images: as weight_sources.images_of, what the run's encoder sees. Raises ConfigError for an
    encoder that saw another model.input.
    """
    origins: Origins = {}
    steps: dict[Path, int | None] = {}
    lines = []

    for module, source in sources.items():
        # one step of a run for all modules, although it may be in training
        weights = _read(source, _shapes(engine, module), steps.get(source.path))
        steps[source.path] = weights.origin["step"]
        targets = engine.method.targets
        follow = (t for t, online in targets.items() if online == module and t not in sources)
        for name in (module, *follow):
            _write(engine, name, weights)

        origins[module] = weights.origin
        remarks = [weights.notes]
        if module == ENCODER and images and weights.images:
            what = f"the encoder of {source.path}"
            remarks.append(weight_sources.check_images(weights.images, images, what))

        notes = f" ({text})" if (text := "; ".join(filter(None, remarks))) else ""
        lines.append(f"{module} from {source.path}{notes}")

    return origins, lines


def sources_of(method: Method, init: Path | None = None) -> dict[str, Source]:
    """The sources of a method; `init` is a further one, of the backbone. Raises ConfigError."""
    sources = dict(method.sources())
    if init is not None:
        if ENCODER in sources:
            raise ConfigError(
                f"--init {init}: the method takes its backbone from {sources[ENCODER].path}; leave "
                "out one of them"
            )
        sources[ENCODER] = Source(init)

    named = dict(method.named_modules())
    if unknown := [module for module in sources if module not in named]:
        raise ValueError(
            f"{type(method).__module__} has no module '{unknown[0]}', for which it gives a source"
        )
    if lacking := [module for module in method.constant if module not in sources]:
        raise ValueError(
            f"{type(method).__module__} gives no source for its constant module '{lacking[0]}'"
        )

    return sources


def load_constant(engine: Engine, saved: SavedStep, change: bool) -> tuple[Origins, list[str]]:
    """Load the constant modules of a run that resumes from a checkpoint.

    Returns the origins of all modules, and a line for each constant one that is no longer what it
    was; without `change` that is a ConfigError. Every rank calls it.
    """
    origins: Origins = dict(saved.meta.get(META, {}))
    lines = []

    for module, source in _constant(engine.method).items():
        shapes, before = _shapes(engine, module), origins.get(module)
        try:
            weights = _same(module, source, shapes, before, saved.path)
        except (ConfigError, CheckpointError) as error:
            if not change or exit_codes.of(error) == exit_codes.RETRY:
                raise
            weights = _read(source, shapes)
            lines.append(f"{module}: {_described(before)} -> {_described(weights.origin)}")

        _write(engine, module, weights)
        origins[module] = weights.origin

    return origins, lines


def fill_constant(method: Method, saved: SavedStep) -> None:
    """Load the constant modules of a method outside an engine, as the checkpoint was trained with
    them. Raises ConfigError where they are others.
    """
    for module, source in _constant(method).items():
        target = method.get_submodule(module)
        shapes = {name: tuple(tensor.shape) for name, tensor in target.state_dict().items()}
        before = saved.meta.get(META, {}).get(module)
        target.load_state_dict(_same(module, source, shapes, before, saved.path).tensors)


def _constant(method: Method) -> dict[str, Source]:
    sources = sources_of(method) if method.constant else {}
    return {module: sources[module] for module in method.constant}


def _same(
    module: str,
    source: Source,
    shapes: Mapping[str, Shape],
    before: Mapping[str, Any] | None,
    saved: Path,
) -> Weights:
    """The weights of a constant module, which must be those that a checkpoint was trained with."""
    fix = "Restore them; to resume training with what is there now, use --change"
    step = before["step"] if before else None
    try:
        weights = _read(source, shapes, step)
    except (CheckpointError, TrainingError) as error:
        text = f"the constant module '{module}' cannot be loaded: {error}. {fix}"
        raise CheckpointError(text, exit_codes.of(error)) from None

    if before is None or weights.origin["sha256"] != before["sha256"]:
        raise ConfigError(
            f"the weights of the constant module '{module}' are not those that {saved} was trained "
            f"with: {_described(before)} -> {_described(weights.origin)}\n{fix}"
        )

    return weights


def _read(source: Source, shapes: Mapping[str, Shape], step: int | None = None) -> Weights:
    weights = weight_sources.read(source, shapes, step)
    if len(set(dist.gather_objects(weights.origin["sha256"]))) > 1:
        raise TrainingError(
            f"{source.path}: ranks read different weights; put it where all nodes see the same file"
        )

    return weights


def _shapes(engine: Engine, module: str) -> dict[str, Shape]:
    return {name: part.shape for name, part in engine.parts_of(module).items()}


def _write(engine: Engine, module: str, weights: Weights) -> None:
    for name, tensor in weights.tensors.items():
        engine.write(f"{module}.{name}", tensor)


def _described(origin: Mapping[str, Any] | None) -> str:
    if origin is None:
        return "not recorded"

    step = "" if origin["step"] is None else f", step {origin['step']}"
    return f"{origin['path']}{step} (sha256 {origin['sha256'][:_SHOWN]})"
