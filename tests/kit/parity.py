"""A method under an engine, trained for some steps on made-up batches, and how far two such runs
are apart.

Compared are losses, optimizer state, and how far each parameter, target, statistic and memory has
moved. DeepSpeed computes in float32, where rounding differs with the order of sums; at a ReLU's
kink that grows a thousandfold, so there they are smooth.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from kit import small
from kit.planted_bugs import BUGS
from kit.toys import ADVERSARY, TOYS, toy_engine
from scaletrain.config.schema import Config, components
from scaletrain.engines.base import Engine

STEPS = 6
EXACT = 1e-9  # deviations of float64 that pass: fixed beforehand, as is the next
# of float32: twice what it brings to SimCLR, which amplifies rounding most, under ddp as under any
# engine
SINGLE = 2e-3
DOUBLE = {"precision": "fp64"}
ZERO = {"name": "deepspeed", "precision": "fp32", "channels_last": False}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp", **DOUBLE},
    "fsdp2": {"name": "fsdp2", **DOUBLE},
    "fsdp2 reshard=false": {"name": "fsdp2", "reshard": False, **DOUBLE},
    **{f"deepspeed stage={stage}": {**ZERO, "stage": stage} for stage in range(4)},
    "fairscale": {"name": "fairscale", **DOUBLE},
}
Case = tuple[str, dict[str, Any]]  # method, and what differs from small.config
Run = dict[str, torch.Tensor]


# A micro-batch then holds different samples at every world size. Groups of few samples (2 grow
# rounding errors a hundredfold with each step, 6 less than tenfold) would drown what is compared.
ACCUMULATED: dict[str, Any] = {
    "batch": 48,
    "engine": {"grad_accum_steps": 2},
    "model": {"norm_group": 6},
}
# what the parity of ranks compares under ddp
CASES: dict[str, Case] = {
    **{name: (name, {}) for name in (*components("methods"), *small.JOINED, ADVERSARY)},
    **{
        f"{name} accumulated": (name, ACCUMULATED)
        for name in components("methods")
        if not importlib.import_module(f"scaletrain.methods.{name}").Model.global_loss
    },
    "moco shuffled": (
        "moco",
        {"batch": 24, "model": {"norm_group": 6}, "method": {"shuffle": True}},
    ),
    "pirl nce": ("pirl", {"method": {"loss": "nce"}}),
}


def under(method: str, engine: str, group: int = 12) -> Case:
    """By default with batch norm over groups that two of four ranks share."""
    options = ENGINES[engine]
    gentle = {"optim": {"lr": 0.02}} if single(options) else {}
    return method, {"batch": 24, "model": {"norm_group": group}, "engine": options, **gentle}


def single(options: Mapping[str, Any]) -> bool:
    return options.get("precision") == "fp32"


def tolerance(case: Case) -> float:
    return SINGLE if single(case[1].get("engine", {})) else EXACT


def alone(case: Case) -> Case:
    """The same for one process: the engine is ddp."""
    method, changes = case
    engine = {
        "name": "ddp",
        **{
            k: v
            for k, v in changes.get("engine", {}).items()
            if k not in ("name", "stage", "reshard")
        },
    }
    return method, {**changes, "engine": engine}


def configuration(case: Case) -> Config:
    method, changes = case
    return small.config("byol" if method in TOYS else method, **changes)


def engine_of(case: Case) -> Engine:
    cfg = configuration(case)
    return toy_engine(cfg, case[0]) if case[0] in TOYS else small.engine(cfg)


def train(cases: Mapping[str, Case], bug: str | None = None, steps: int = STEPS) -> Run:
    """Each on this rank's slices: "case/loss" and "case/<tensor>@<start>" of all that this rank
    would save.
    """
    found: Run = {}
    for name, case in cases.items():
        cfg = configuration(case)
        with ExitStack() as stack:
            if bug is not None:
                stack.enter_context(BUGS[bug]())
            if single(case[1].get("engine", {})):
                stack.enter_context(small.smooth())
            trainer = engine_of(case)
            before = {
                n: at.tensor.detach().double().reshape(-1).clone()
                for n, at in trainer.placed().items()
            }
            found[f"{name}/loss"] = torch.tensor(
                small.run(trainer, cfg, 0, steps), dtype=torch.float64
            )
        for tensor, piece in trainer.state().items():
            start = before[tensor] if tensor.startswith("method.") else 0
            if piece.data.numel():
                found[f"{name}/{tensor}@{piece.start}"] = piece.data.double() - start
    return found


def whole(results: list[Run]) -> Run:
    """What all ranks wrote, put together; losses are the same on every rank."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for result in results:
        for key, value in result.items():
            name, _, start = key.partition("@")
            pieces.setdefault(name, {})[int(start or 0)] = value
    return {name: torch.cat([parts[s] for s in sorted(parts)]) for name, parts in pieces.items()}


def of(case: str, result: Run) -> Run:
    """One case's part, without its name."""
    return {k.removeprefix(f"{case}/"): v for k, v in result.items() if k.startswith(f"{case}/")}


def deviation(a: Run, b: Run, case: Case) -> tuple[float, str]:
    """Largest difference relative to the tensor's own largest movement, and where. What hardly
    moves has a floor.
    """
    assert a.keys() == b.keys()
    floor = 1e-2 if single(case[1].get("engine", {})) else 1e-3
    return max(
        ((a[k] - b[k]).abs().max().item() / max(floor, a[k].abs().max().item()), k) for k in a
    )
