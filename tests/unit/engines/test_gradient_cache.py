"""Gradient caching against the step of the whole batch: the same losses, parameters, targets and
statistics in float64.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import ranks, small
from torch import Tensor

from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config
from scaletrain.core import Batch, Clock, Method

METHODS = ("simclr", "relicv2")
STEPS, ROWS = 4, 24
CLOCK = Clock(0, 20, 0, 5)


def config(method: str, parts: int) -> Config:
    """6 samples share batch-norm statistics: the micro-batch of two parts on two ranks."""
    return small.config(
        method,
        batch=ROWS,
        model={"norm_group": 6},
        engine={"grad_accum_steps": parts, "gradient_cache": parts > 1, "channels_last": False},
    )


def train(parts: int) -> dict[str, Tensor]:
    """LARS steps with moving averages: the losses and all that this rank holds."""
    found = {}
    for method in METHODS:
        cfg = config(method, parts)
        engine = small.engine(cfg)
        found[f"{method}/loss"] = torch.tensor(
            small.run(engine, cfg, 0, STEPS), dtype=torch.float64
        )
        found |= {
            f"{method}/{name}": tensor.detach().double()
            for name, tensor in engine.method.state_dict().items()
        }
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    return train(1)


def deviation(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max() / a[k].abs().max().clamp_min(1e-3)).item() for k in a)


@pytest.mark.parametrize("parts", [2, 4])
def test_it_equals_the_whole_batch(parts: int, whole: dict[str, Tensor]) -> None:
    assert deviation(whole, train(parts)) < 1e-9


def test_two_ranks_equal_the_whole_batch_in_one_process(
    whole: dict[str, Tensor], tmp_path: Path
) -> None:
    for found in ranks.run(2, train, tmp_path, 2):
        assert deviation(whole, found) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_without_it_gives_another_gradient(method: str) -> None:
    """So the comparisons above can fail."""
    engines = [small.engine(config(method, n)) for n in (1, 2)]
    batch = small.batch(config(method, 1), 0)
    norms = []
    for engine in engines:
        parts = engine.micro_batches(batch)
        engine.accumulate(parts, CLOCK, 1 / len(parts))
        norms.append(engine.gradient_norm().item())
    assert norms[1] != pytest.approx(norms[0], rel=1e-2)


def test_the_encoder_sees_each_micro_batch_twice_and_keeps_one_graph_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, bool]] = []
    cfg = config("simclr", 4)
    engine = small.engine(cfg)
    embed = type(engine.method).embed

    def watched(self: Method, batch: Batch, clock: Clock) -> tuple[Tensor, ...]:
        seen.append((len(batch), torch.is_grad_enabled()))
        return embed(self, batch, clock)

    monkeypatch.setattr(type(engine.method), "embed", watched)
    small.run(engine, cfg, 0, 1)
    assert seen == [(6, False)] * 4 + [(6, True)] * 4
    assert not any(m.staged for m in engine.staged)  # type: ignore[attr-defined]
    assert "forward" not in vars(engine.method)


def test_a_step_that_is_not_finite_leaves_no_trace() -> None:
    cfg = config("relicv2", 2)
    engine = small.engine(cfg)
    small.run(engine, cfg, 0, 1)
    before = {name: tensor.clone() for name, tensor in engine.method.state_dict().items()}
    good = small.batch(cfg, 1)
    broken = dataclasses.replace(good, views=(good.views[0] * float("inf"), *good.views[1:]))
    assert engine.step(broken, CLOCK, 0.1, 0.1).skipped
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in engine.method.state_dict().items()
    )
    assert not any(m.staged for m in engine.staged)  # type: ignore[attr-defined]
    assert not engine.step(good, CLOCK, 0.1, 0.1).skipped


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no micro-batches": (
        "simclr",
        {"engine": {"gradient_cache": True}},
        r"engine.gradient_cache=true works on micro-batches: set engine.grad_accum_steps",
    ),
    "offered": (
        "simclr",
        {"engine": {"grad_accum_steps": 2}},
        r"grad_accum_steps=2: .* couples all samples .* set engine.gradient_cache=true",
    ),
    "no embed": (
        "swav",
        {"engine": {"grad_accum_steps": 2, "gradient_cache": True}},
        r"which swav does not: set engine.grad_accum_steps=1",
    ),
    "not offered": (
        "swav",
        {"engine": {"grad_accum_steps": 2}},
        r"split; set engine.grad_accum_steps=1 and save memory by engine.activation_checkpointing",
    ),
    "not needed": (
        "byol",
        {"engine": {"grad_accum_steps": 2, "gradient_cache": True}},
        r"exact for byol.*: set engine.gradient_cache=false",
    ),
    "one norm over the batch": (
        "simclr",
        {"engine": {"grad_accum_steps": 2, "gradient_cache": True}},
        r"norm_group=0 would change .* \(6 / ranks\)",
    ),
    "groups across micro-batches": (
        "simclr",
        {"engine": {"grad_accum_steps": 2, "gradient_cache": True}, "model": {"norm_group": 4}},
        r"norm_group=4 would change the batch norm: set model.norm_group to a divisor",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_when_the_recipe_is_read(case: str) -> None:
    method, changes, text = REFUSED[case]
    with pytest.raises(ConfigError, match=text):
        small.config(method, **changes)


def test_groups_that_do_not_fit_the_ranks_are_refused_at_the_first_step() -> None:
    cfg = config("simclr", 2)
    engine = small.engine(cfg)
    with pytest.raises(ConfigError, match=r"leaves 3 samples per rank and micro-batch.*norm_group"):
        engine.step(small.batch(cfg, 0).split(4)[0], CLOCK, 0.1, 0.1)
