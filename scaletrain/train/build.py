"""From a configuration to a method and the engine that trains it."""

from __future__ import annotations

import importlib

import torch

from scaletrain.auxiliaries import base as auxiliaries
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config
from scaletrain.core import Method, RunInfo
from scaletrain.engines.base import Engine
from scaletrain.nn import backbone
from scaletrain.optim import schedule


def run_info_of(config: Config, samples: int, steps_per_epoch: int) -> RunInfo:
    """What the method is told of a run."""
    sizes: dict[int, int] = {}
    for view in config.data.views:
        sizes[view.size] = sizes.get(view.size, 0) + view.count

    views = tuple((size, count) for size, count in sorted(sizes.items(), reverse=True) if count)
    beside = config.data.support
    rows = 0 if beside is None else beside.classes * beside.per_class
    return RunInfo(
        samples, config.batch, steps_per_epoch, views, config.model.norm_group, config.seed, rows
    )


def build_method(config: Config, run_info: RunInfo) -> Method:
    """The method of a configuration with its auxiliaries, drawn from its seed alone."""
    torch.manual_seed(config.seed)
    leaf = importlib.import_module(f"scaletrain.methods.{config.method.name}")
    return auxiliaries.attach(
        leaf.Model(config.method, lambda: backbone.build(config.model), run_info),
        config.auxiliaries,
        run_info,
    )


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run. Raises ConfigError for what does not fit them."""
    total = config.steps or round(config.epochs * steps_per_epoch)
    if total < 1:
        raise ConfigError(
            f"epochs={config.epochs:g} is less than one step of the {steps_per_epoch} per epoch"
        )

    # raises when the warm-up is longer
    schedule.lr(config.optim, config.batch, 0, steps_per_epoch, total)
    return total


def build(config: Config, samples: int, steps_per_epoch: int, device: torch.device) -> Engine:
    """The method of a configuration inside its engine."""
    method = build_method(config, run_info_of(config, samples, steps_per_epoch))
    engine = importlib.import_module(f"scaletrain.engines.{config.engine.name}")
    return engine.Engine(method, config.engine, config.optim, device)  # type: ignore[no-any-return]
