"""Builds the optimizer of a recipe from the parameter groups that a method declares: which
parameters are decayed, adapted by LARS or frozen, and at what learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import OptimConfig
from scaletrain.core import Method, ParameterGroup
from scaletrain.optim.lars import LARS

ParamGroup = dict[str, Any]


def parameter_groups(method: Method, optim: OptimConfig) -> list[ParamGroup]:
    """Parameter groups for a torch optimizer, in the order of method.groups(), then "all".

    The first group that matches a trainable parameter takes it. Each is cut in two halves of the
    same `name`: the first is decayed and, under LARS, adapted; the second has the parameters that
    `optim.exclude` names, without weight decay and adaptation. A group's `weight_decay` replaces
    the optimizer's in the first half only; its `adapt`, unless None, applies to both halves. Keys:
    params, names (aligned with params), name, lr_multiplier, constant, frozen_steps, weight_decay,
    adapt, momentum. Empty halves are left out. Raises ValueError for a group that takes no
    parameter and for names that are not unique.
    """
    declared = [*method.groups(), ParameterGroup("all", lambda name, param: True)]

    names = [group.name for group in declared]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{type(method).__name__}.groups() must have unique names other than 'all', got "
            f"{names[:-1]}"
        )

    excluded = _excluded(method, optim.exclude)
    halves: list[tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]] = [
        ([], []) for _ in declared
    ]

    for name, p in method.named_parameters():
        if p.requires_grad:
            owner = next(i for i, group in enumerate(declared) if group.match(name, p))
            halves[owner][id(p) in excluded].append((name, p))

    for group, (plain, exempt) in zip(declared[:-1], halves, strict=False):
        if not plain and not exempt:
            raise ValueError(
                f"{type(method).__name__}: group '{group.name}' takes no trainable parameter; "
                "correct its match, its place in the order of groups, or remove it"
            )

    return [
        _param_group(group, optim, half, exempt=bool(i))
        for group, pair in zip(declared, halves, strict=True)
        for i, half in enumerate(pair)
        if half
    ]


def _excluded(method: nn.Module, rule: str) -> set[int]:
    """ids of the parameters that `optim.exclude` takes from weight decay and adaptation.

    Normalisation layers are known by their class and not by their name, which for a shortcut's norm
    is `downsample.1`.
    """
    if rule == "none":
        return set()
    if rule == "ndim1":
        return {id(p) for p in method.parameters() if p.ndim <= 1}

    result = {
        id(p) for name, p in method.named_parameters() if name.rpartition(".")[2].endswith("bias")
    }
    norms = (module for module in method.modules() if "Norm" in type(module).__name__)
    return result | {id(p) for norm in norms for p in norm.parameters(recurse=False)}


def _param_group(
    group: ParameterGroup, optim: OptimConfig, members: list[tuple[str, Tensor]], *, exempt: bool
) -> ParamGroup:
    decay = optim.weight_decay if group.weight_decay is None else group.weight_decay
    momentum = optim.betas[0] if optim.name == "adamw" else optim.momentum
    return {
        "params": [p for _, p in members],
        "names": [name for name, _ in members],
        "name": group.name,
        "lr_multiplier": group.lr,
        "constant": group.constant,
        "frozen_steps": group.frozen_steps,
        "weight_decay": 0.0 if exempt else decay,
        "adapt": not exempt if group.adapt is None else group.adapt,
        "momentum": momentum if group.momentum is None else group.momentum,
    }


def set_rates(groups: Iterable[ParamGroup], lr: float, base: float) -> None:
    """Write group["lr"] for a step: the scheduled `lr`, or the undecayed `base` for constant
    groups, times the multiplier.
    """
    for group in groups:
        group["lr"] = (base if group["constant"] else lr) * group["lr_multiplier"]


def drop_frozen(groups: Iterable[ParamGroup], step: int) -> None:
    """Drop the gradients of groups that are frozen at `step`: None and not zero, or decay and
    momentum would move them.
    """
    for group in groups:
        if step < group["frozen_steps"]:
            for p in group["params"]:
                p.grad = None


def build(groups: list[ParamGroup], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a recipe over parameter_groups(), or over these groups of what a rank holds
    of the parameters.

    Rates are zero until set_rates(). Raises ConfigError.

    SGD and AdamW leave the choice of kernel to torch (foreach on accelerators, a loop on the CPU).
    Their fused kernels read raw memory: a gradient or a restored buffer in another layout than its
    parameter gives wrong numbers without an error, and fused SGD fails on a parameter whose first
    gradient comes after the first step.
    """
    if optim.nesterov and (optim.name != "sgd" or optim.momentum == 0):
        raise ConfigError(
            "optim.nesterov needs optim.name=sgd and optim.momentum above 0; set "
            "optim.nesterov=false"
        )
    if not groups:
        raise ConfigError("the method has no trainable parameter to optimise")
    if optim.name == "lars":
        return LARS(
            groups,
            lr=0.0,
            eta=optim.trust_coefficient,
            clip=optim.trust_clip,
            placement=optim.lars_momentum,
            norm=optim.lars_norm,
        )
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum, nesterov=optim.nesterov)

    # Adam's momentum is its first beta
    adam = [group | {"betas": (group["momentum"], optim.betas[1])} for group in groups]
    return torch.optim.AdamW(adam, lr=0.0)
