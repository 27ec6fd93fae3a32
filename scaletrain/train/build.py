"""Builds the method and the engine of a configuration."""

from __future__ import annotations

import importlib

import torch

from scaletrain.auxiliaries import base as auxiliaries
from scaletrain.checkpoint.reader import SavedStep
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config
from scaletrain.core import Method, RunInfo
from scaletrain.engines.base import Engine
from scaletrain.engines.placement import fill, method_shards
from scaletrain.nn import backbone
from scaletrain.optim import schedule
from scaletrain.train import initial_weights
from scaletrain.train.weight_sources import METHOD


def run_info_of(config: Config, samples: int, steps_per_epoch: int) -> RunInfo:
    """The part of a configuration and its data that methods may depend on."""
    counts: dict[int, int] = {}
    for view in config.data.views:
        counts[view.size] = counts.get(view.size, 0) + view.count

    views = tuple((size, count) for size, count in sorted(counts.items(), reverse=True) if count)
    support = config.data.support
    rows = 0 if support is None else support.classes * support.per_class
    return RunInfo(
        samples, config.batch, steps_per_epoch, views, config.model.norm_group, config.seed, rows
    )


def build_method(config: Config, run_info: RunInfo) -> Method:
    """The method of a configuration with its auxiliaries; drawn from its seed."""
    torch.manual_seed(config.seed)
    module = importlib.import_module(f"scaletrain.methods.{config.method.name}")
    return auxiliaries.attach(
        module.Model(config.method, lambda: backbone.build(config.model, config.data), run_info),
        config.auxiliaries,
        run_info,
    )


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run. Raises ConfigError where the schedule does not fit them."""
    total = config.steps or round(config.epochs * steps_per_epoch)
    if total < 1:
        raise ConfigError(
            f"epochs={config.epochs:g} is less than one step of the {steps_per_epoch} per epoch"
        )

    # Raises ConfigError where the warm-up is longer.
    schedule.lr(config.optim, config.batch, 0, steps_per_epoch, total)
    return total


def build(config: Config, samples: int, steps_per_epoch: int, device: torch.device) -> Engine:
    """The method of a configuration inside its engine."""
    method = build_method(config, run_info_of(config, samples, steps_per_epoch))
    engine = importlib.import_module(f"scaletrain.engines.{config.engine.name}")
    return engine.Engine(method, config.engine, config.optim, device)  # type: ignore[no-any-return]


def rebuild(config: Config, saved: SavedStep) -> Method:
    """The method of a saved step on the CPU, in evaluation mode and with its weights; the caller's
    random generator is not touched. Raises TrainingError, CheckpointError, ConfigError.
    """
    samples = saved.meta.get("samples_in_use")
    if samples is None:
        # of an earlier version
        data = saved.meta.get("data") or {}
        samples = sum(source["samples"] for source in data.get("sources", ()))

    steps_per_epoch = saved.meta.get("clock", {}).get("steps_per_epoch") or 1
    with torch.random.fork_rng(devices=[]):
        method = build_method(config, run_info_of(config, samples, steps_per_epoch))

    fill(method_shards(method, {}), saved, METHOD)
    initial_weights.fill_constant(method, saved)
    return method.eval().requires_grad_(False)
