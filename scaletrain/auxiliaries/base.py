"""Objectives that a recipe adds to a method, one file each; here: how they are attached."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import nn

from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import ComponentConfig
from scaletrain.core import Auxiliary, Batch, Clock, Method, MethodOutput, ParameterGroup, RunInfo


def attach(method: Method, leaves: Sequence[ComponentConfig], run_info: RunInfo) -> Method:
    """The same method, whose forward also computes the auxiliaries; its parameters keep their
    names. Raises ConfigError.

    Drawn after the method's own, the auxiliaries' parameters leave its initial values as they are.
    """
    if not leaves:
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
        (leaf, importlib.import_module(f"scaletrain.auxiliaries.{leaf.name}")) for leaf in leaves
    )
    method.auxiliaries = nn.ModuleDict(
        {leaf.name: room.Model(leaf, method, run_info) for leaf, room in parts}
    )
    method.global_loss |= any(part.global_loss for part in method.auxiliaries.values())

    return method


class _Joint(Method):
    auxiliaries: nn.ModuleDict

    def groups(self) -> Sequence[ParameterGroup]:
        """The auxiliaries' come first: a method's rule such as `all biases` is about its own."""
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
