"""A new run that starts from the whole state of another one: its weights, targets, memories and
optimizer.

The new run has a recipe and a schedule of its own: its steps, epochs, learning rate and every other
schedule begin at 0, only what is in tensors is kept (AdamW's own step counter, momentum, queues).
So it may have other image sizes, rates and lengths, but not another network, method or optimizer.
Once it has checkpoints of its own, it resumes from those alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain.checkpoint import files, reader
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config
from scaletrain.engines.base import Engine
from scaletrain.engines.placement import TrainingError
from scaletrain.nn.bank import has_banks
from scaletrain.train.resume import other_data
from scaletrain.train.weight_sources import check_images, images_of


@dataclass(frozen=True)
class Source:
    """The checkpoint that a run has started from."""

    # None once the run has checkpoints of its own, so that the source may be gone.
    saved: reader.SavedStep | None
    # path, step, samples, and the sha256 of the manifest: in the run's own checkpoints
    meta: Mapping[str, Any]


def find(path: Path | None, init: Path | None, saved: reader.SavedStep | None) -> Source | None:
    """The source of a new run, given as a run folder (its newest good checkpoint) or a step, or
    that of a run which is resumed from `saved`. Every rank calls it. Raises ConfigError.
    """
    if path is not None and init is not None:
        raise ConfigError("--init and --continue exclude each other: both start a new run")
    if saved is not None:
        return _recorded(path, saved)
    if path is None:
        return None

    path = path.absolute()
    step = path.parent.name == "checkpoints"
    found = reader.open_step(path) if step else reader.latest(path / "checkpoints")
    if found is None:
        raise ConfigError(
            f"--continue {path}: there is no checkpoint; give a run folder or one step of its "
            "checkpoints"
        )

    body = files.unseal(found.path / reader.MANIFEST)
    meta = {
        "path": str(found.path),
        "step": found.step,
        "samples": found.meta.get("samples"),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    return Source(found, meta)


def _recorded(path: Path | None, saved: reader.SavedStep) -> Source | None:
    """The source that a run's own checkpoint names. Raises ConfigError for another `path`."""
    meta = saved.meta.get("continues")
    if path is not None:
        step = Path(meta["path"]) if meta else None
        known = [os.path.realpath(one) for one in (step, step.parents[1])] if step else []
        if os.path.realpath(path) not in known:
            came = f"{step} and not of {path}" if step else "no other run"
            raise ConfigError(
                f"{saved.path} is of a run that started from the state of {came}: leave out "
                "--continue to resume it, or use another --run"
            )

    return None if meta is None else Source(None, meta)


def restore(engine: Engine, config: Config, data: Mapping[str, Any], source: Source) -> str:
    """Give the engine the state of the source; returns where that came from. data: what the run's
    checkpoints record of its data. Raises TrainingError where it does not fit, naming the tensor.
    """
    saved = source.saved
    assert saved is not None
    where = f"--continue {saved.path}"

    before = saved.meta.get("config", {}).get("optim", {})
    for key in ("name", "lars_momentum"):
        old, new = before.get(key), getattr(config.optim, key)
        if old not in (None, new) and "lars" in (config.optim.name, before.get("name")):
            raise TrainingError(
                f"{where}: the momentum of optim.{key}={old} is not that of optim.{key}={new}; "
                f"set optim.{key}={old}, or start from the encoder alone with --init"
            )

    network = images_of(saved.meta.get("config", {}))
    check_images(network, images_of(config.model_dump(mode="json")), f"{where}: the network")

    if has_banks(engine.method) and (changes := other_data(saved.meta.get("data"), data)):
        listed = "".join(f"\n  {line}" for line in changes)
        raise TrainingError(
            f"{where}: {config.method.name} keeps every sample's embedding, and the data is not "
            f"the same:{listed}\nUse that data, or start from the encoder alone with --init"
        )

    try:
        engine.restore(saved)
    except TrainingError as error:
        raise TrainingError(f"{where}: {error}") from None

    return f"continues the whole state of {saved.path}, step {saved.step}, at step 0 of its own"
