"""Grouping, rates, freezing, and SGD and AdamW as built, against slow float64 transcriptions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import OptimConfig
from scaletrain.core import Method, ParameterGroup
from scaletrain.optim import groups as grouping
from scaletrain.optim.groups import drop_frozen, parameter_groups, set_rates
from scaletrain.optim.lars import LARS


def build(method: Method, optim: OptimConfig) -> torch.optim.Optimizer:
    return grouping.build(parameter_groups(method, optim), optim)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(3, 4, 1, bias=True), nn.BatchNorm2d(4))


class Toy(Method):
    def __init__(self, *groups: ParameterGroup) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Block()
        self.scale = nn.Parameter(torch.ones(4))
        self.norms = nn.Linear(4, 2)  # a name that only looks like a norm
        self.target = nn.Linear(4, 2).requires_grad_(False)
        self.declared = groups

    def groups(self) -> Sequence[ParameterGroup]:
        return self.declared


NORM_BIAS = {
    "backbone.bn1.weight",
    "backbone.bn1.bias",
    "backbone.downsample.0.bias",
    "backbone.downsample.1.weight",
    "backbone.downsample.1.bias",
    "norms.bias",
}
WEIGHTS = {"backbone.conv1.weight", "backbone.downsample.0.weight", "norms.weight"}
BIAS_GROUP = ParameterGroup("bias", lambda name, p: name.endswith("bias"), lr=0.5)
HEAD = ParameterGroup(
    "head", lambda name, p: name.startswith("norms"), lr=2.0, constant=True, frozen_steps=3
)


@pytest.mark.parametrize(
    ("rule", "excluded"),
    [("norm_bias", NORM_BIAS), ("ndim1", NORM_BIAS | {"scale"}), ("none", set[str]())],
)
def test_exclusion(rule: str, excluded: set[str]) -> None:
    groups = parameter_groups(Toy(), OptimConfig(exclude=rule, weight_decay=0.1))
    assert [g["name"] for g in groups] == ["all", "all"][: len(groups)]
    assert set().union(*(g["names"] for g in groups if not g["adapt"])) == excluded
    assert (
        set().union(*(g["names"] for g in groups if g["adapt"]))
        == (WEIGHTS | NORM_BIAS | {"scale"}) - excluded
    )
    assert all(g["weight_decay"] == (0.1 if g["adapt"] else 0) for g in groups)


def test_every_trainable_parameter_once_and_names_align() -> None:
    method = Toy(HEAD, BIAS_GROUP)
    groups = parameter_groups(method, OptimConfig())
    known = dict(method.named_parameters())
    pairs = [(name, p) for g in groups for name, p in zip(g["names"], g["params"], strict=True)]
    assert all(known[name] is p for name, p in pairs)
    assert sorted(name for name, _ in pairs) == sorted(
        name for name, p in known.items() if p.requires_grad
    )


def test_first_matching_group_takes_the_parameter() -> None:
    groups = parameter_groups(Toy(HEAD, BIAS_GROUP), OptimConfig())
    head = [g for g in groups if g["name"] == "head"]
    assert [g["names"] for g in head] == [["norms.weight"], ["norms.bias"]]
    assert [(g["lr_multiplier"], g["constant"], g["frozen_steps"]) for g in head] == [
        (2.0, True, 3)
    ] * 2
    (bias,) = (g for g in groups if g["name"] == "bias")
    assert bias["names"] == [
        "backbone.bn1.bias",
        "backbone.downsample.0.bias",
        "backbone.downsample.1.bias",
    ]
    assert [g["name"] for g in groups] == ["head", "head", "bias", "all", "all"]


def test_group_overrides() -> None:
    own = ParameterGroup(
        "head", lambda name, p: name.startswith("norms"), weight_decay=0.3, momentum=0.0, adapt=True
    )
    head = [
        g for g in parameter_groups(Toy(own), OptimConfig(weight_decay=0.1)) if g["name"] == "head"
    ]
    assert [(g["weight_decay"], g["momentum"], g["adapt"]) for g in head] == [
        (0.3, 0.0, True),
        (0.0, 0.0, True),
    ]
    off = ParameterGroup("head", lambda name, p: name.startswith("norms"), adapt=False)
    head = [
        g for g in parameter_groups(Toy(off), OptimConfig(weight_decay=0.1)) if g["name"] == "head"
    ]
    assert [(g["weight_decay"], g["momentum"], g["adapt"]) for g in head] == [
        (0.1, 0.9, False),
        (0.0, 0.9, False),
    ]


def test_bad_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Toy: group 'prototypes' takes no trainable parameter"):
        parameter_groups(
            Toy(ParameterGroup("prototypes", lambda name, p: "prototypes" in name)), OptimConfig()
        )
    with pytest.raises(ValueError, match=r"group 'target' takes no trainable parameter"):
        parameter_groups(
            Toy(ParameterGroup("target", lambda name, p: "target" in name)), OptimConfig()
        )
    with pytest.raises(ValueError, match=r"group 'bias' takes no"):
        parameter_groups(
            Toy(ParameterGroup("first", lambda name, p: True), BIAS_GROUP), OptimConfig()
        )
    with pytest.raises(ValueError, match="unique names"):
        parameter_groups(Toy(ParameterGroup("all", lambda name, p: p.ndim > 1)), OptimConfig())
    with pytest.raises(ConfigError, match=r"optim\.nesterov needs"):
        build(Toy(), OptimConfig(nesterov=True))
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build(Toy().requires_grad_(False), OptimConfig())


def test_set_rates() -> None:
    groups = parameter_groups(Toy(HEAD, BIAS_GROUP), OptimConfig())
    set_rates(groups, lr=0.1, base=0.8)
    assert {(g["name"], g["lr"]) for g in groups} == {("head", 1.6), ("bias", 0.05), ("all", 0.1)}


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_frozen_group_does_not_move(name: str) -> None:
    """Neither by decay nor by the momentum of an earlier step; it moves as soon as it thaws."""
    method = Toy(HEAD)
    optimizer = build(method, OptimConfig(name=name, weight_decay=0.1))
    before = {n: p.detach().clone() for n, p in method.named_parameters()}
    for step in range(4):
        for p in method.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        drop_frozen(optimizer.param_groups, step)
        set_rates(optimizer.param_groups, 0.1, 0.1)
        optimizer.step()
        for n, p in method.named_parameters():
            frozen = n.startswith("target") or (n.startswith("norms") and step < 3)
            assert torch.equal(p, before[n]) == frozen, (n, step)


def sgd(
    p: Tensor, g: Tensor, s: dict[str, Any], lr: float, wd: float, m: float, nesterov: bool
) -> Tensor:
    g = g + wd * p
    s["v"] = m * s["v"] + g if "v" in s else g
    move: Tensor = g + m * s["v"] if nesterov else s["v"]
    return p - lr * move


def adamw(
    p: Tensor, g: Tensor, s: dict[str, Any], lr: float, wd: float, b1: float, b2: float
) -> Tensor:
    s["t"] = s.get("t", 0) + 1
    s["m"] = b1 * s.get("m", torch.zeros_like(p)) + (1 - b1) * g
    s["v"] = b2 * s.get("v", torch.zeros_like(p)) + (1 - b2) * g * g
    p = p - lr * wd * p
    move: Tensor = (s["m"] / (1 - b1 ** s["t"])) / ((s["v"] / (1 - b2 ** s["t"])).sqrt() + 1e-8)
    return p - lr * move


def gradient(name: str, p: Tensor, step: int) -> Tensor | None:
    """None for one parameter in part of the steps, the first included."""
    if name == "scale" and step in (0, 1, 4):
        return None
    gen = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype)


def drive(method: Toy, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for name, p in method.named_parameters():
            p.grad = gradient(name, p, step) if p.requires_grad else None
        drop_frozen(optimizer.param_groups, step)
        set_rates(optimizer.param_groups, 0.1 / (1 + step), 0.1)
        optimizer.step()


OWN_MOMENTUM = ParameterGroup(
    "head",
    lambda name, p: name.startswith("norms"),
    lr=2.0,
    constant=True,
    frozen_steps=3,
    momentum=0.0,
)


@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(name="sgd", weight_decay=0.1),
        OptimConfig(name="sgd", weight_decay=0.1, nesterov=True, exclude="none"),
        OptimConfig(name="adamw", weight_decay=0.1, betas=(0.8, 0.95), exclude="ndim1"),
    ],
    ids=["sgd", "nesterov", "adamw"],
)
def test_built_optimizer_equals_transcription(optim: OptimConfig) -> None:
    method = Toy(OWN_MOMENTUM).double()
    wanted = {n: p.detach().clone() for n, p in method.named_parameters()}
    states: dict[str, dict[str, Any]] = {n: {} for n in wanted}
    excluded = {"norm_bias": NORM_BIAS, "ndim1": NORM_BIAS | {"scale"}, "none": set[str]()}[
        optim.exclude
    ]
    for step in range(8):
        for n, p in wanted.items():
            head = n.startswith("norms")
            g = gradient(n, p, step)
            if g is None or n.startswith("target") or (head and step < 3):
                continue
            lr, wd = (0.2 if head else 0.1 / (1 + step)), (0.0 if n in excluded else 0.1)
            if optim.name == "sgd":
                wanted[n] = sgd(p, g, states[n], lr, wd, 0.0 if head else 0.9, optim.nesterov)
            else:
                wanted[n] = adamw(p, g, states[n], lr, wd, 0.0 if head else 0.8, 0.95)
    drive(method, build(method, optim), range(8))
    for n, p in method.named_parameters():
        torch.testing.assert_close(p.detach(), wanted[n], rtol=1e-12, atol=1e-14, msg=n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_resume_is_bit_exact(name: str, dtype: torch.dtype) -> None:
    optim = OptimConfig(name=name, weight_decay=0.1, trust_coefficient=0.02)
    whole = Toy(OWN_MOMENTUM).to(dtype)
    drive(whole, build(whole, optim), range(8))
    first = Toy(OWN_MOMENTUM).to(dtype)
    before = build(first, optim)
    drive(first, before, range(2))  # the head is still frozen and has no state
    second = copy.deepcopy(first)
    after = build(second, optim)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    drive(second, after, range(2, 8))
    for (n, a), b in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), n


def test_recipe_reaches_lars() -> None:
    optimizer = build(
        Toy(),
        OptimConfig(
            trust_coefficient=0.02,
            trust_clip=True,
            lars_momentum="inside",
            lars_norm="parts",
            momentum=0.8,
        ),
    )
    assert isinstance(optimizer, LARS)
    assert (optimizer.eta, optimizer.clip, optimizer.placement, optimizer.norm) == (
        0.02,
        True,
        "inside",
        "parts",
    )
    assert [g["momentum"] for g in optimizer.param_groups] == [0.8, 0.8]
    assert [g["adapt"] for g in optimizer.param_groups] == [True, False]
