"""The base class of auxiliary objectives, and how those of a recipe are attached to its method."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import nn

from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import ComponentConfig
from scaletrain.core import Batch, Clock, Method, MethodOutput, ParameterGroup, RunInfo


class Auxiliary(nn.Module):
    """An objective added to a method.

    Its file defines `Config` (a frozen `config.ComponentConfig`) and one subclass named `Model`,
    built as `Model(config, method, run_info)`. Parameters are in a group of the file's name, which
    is also that of the loss.
    """

    # as Method.global_loss
    global_loss: bool = False

    def forward(self, method: Method, batch: Batch, clock: Clock) -> MethodOutput:
        """`method`: the one it is added to, for its online networks."""
        raise NotImplementedError


def attach(method: Method, configs: Sequence[ComponentConfig], run_info: RunInfo) -> Method:
    """Make a method compute auxiliary objectives in its forward pass. Raises ConfigError.

    The method's parameters keep their names; their initial values do not change either, since those
    of the auxiliaries are drawn afterwards.
    """
    if not configs:
        return method

    kind = type(method)
    if kind.separate_losses:
        raise ConfigError(
            f"auxiliaries: the losses of {kind.__module__.rpartition('.')[2]} drive a part of its "
            "parameters each, so nothing "
            "can be added to them; remove the auxiliaries"
        )

    # A class and not a wrapper, so that the state's names do not depend on what is attached.
    method.__class__ = type(kind.__name__, (_Joint, kind), {"__module__": kind.__module__})
    parts = (
        (config, importlib.import_module(f"scaletrain.auxiliaries.{config.name}"))
        for config in configs
    )
    method.auxiliaries = nn.ModuleDict(
        {config.name: module.Model(config, method, run_info) for config, module in parts}
    )
    method.global_loss |= any(part.global_loss for part in method.auxiliaries.values())

    return method


class _Joint(Method):
    auxiliaries: nn.ModuleDict

    def groups(self) -> Sequence[ParameterGroup]:
        """The groups of the auxiliaries come first, so that a rule of the method such as `all
        biases` applies to its own parameters only.
        """
        own = [
            name for name, part in self.auxiliaries.items() if any(True for _ in part.parameters())
        ]
        return [*(_group(name) for name in own), *super().groups()]

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        out = super().forward(batch, clock)
        losses, scalars = dict(out.losses), dict(out.scalars)
        for part in self.auxiliaries.values():
            assert isinstance(part, Auxiliary)
            more: MethodOutput = part(self, batch, clock)
            losses |= more.losses
            scalars |= more.scalars

        return MethodOutput(losses, scalars, out.embedding)


def _group(name: str) -> ParameterGroup:
    return ParameterGroup(name, lambda parameter, _: parameter.startswith(f"auxiliaries.{name}."))
