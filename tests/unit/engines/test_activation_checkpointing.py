"""Stages that run again in backward: not a bit of the result changes, less is kept, and nothing is
sent twice.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from kit import ranks, small
from kit.toys import toy_engine

from scaletrain import dist
from scaletrain.config.recipe import ConfigError
from scaletrain.engines.base import Engine

STEPS = 2
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "views apart": ("byol", {}),
    "groups of samples with all their views": ("swav", {"model": {"norm_group": 3}}),
    "a dilated network of lightness": (
        "byol",
        {"model": {"stem": "imagenet", "input": "lightness", "output_stride": 8}},
    ),
    "bf16": ("byol", {"engine": {"precision": "bf16"}}),
    "two losses": ("toy", {}),
}


def build(case: str, recompute: object) -> tuple[Engine, Any]:
    method, changes = CASES[case]
    engine = {
        "precision": "fp64",
        **changes.get("engine", {}),
        "activation_checkpointing": recompute,
    }
    cfg = small.config("byol" if method == "toy" else method, **{**changes, "engine": engine})
    return toy_engine(cfg) if method == "toy" else small.engine(cfg), cfg


def train(case: str, recompute: object) -> dict[str, torch.Tensor]:
    engine, cfg = build(case, recompute)
    kept, sent = 0, 0
    right = dist.sum_nograd

    def keep(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += x.nbytes
        return x

    def send(x: torch.Tensor) -> torch.Tensor:
        nonlocal sent
        sent += 1
        return right(x)

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        mock.patch.object(dist, "sum_nograd", send),
    ):
        losses = small.run(engine, cfg, 0, STEPS)
    state = {name: at.tensor.detach().clone() for name, at in engine.placed().items()}
    return {
        **state,
        "loss": torch.tensor(losses, dtype=torch.float64),
        "kept": torch.tensor(kept),
        "sent": torch.tensor(sent),
    }


def train_all() -> dict[str, torch.Tensor]:
    return {
        f"{case}/{recompute}/{k}": v
        for case in CASES
        for recompute in (False, True)
        for k, v in train(case, recompute).items()
    }


@pytest.fixture(scope="module", params=[1, 2])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, torch.Tensor]]:
    if request.param == 1:
        return [train_all()]
    return ranks.run(2, train_all, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_nothing_changes_but_the_memory(case: str, results: list[dict[str, torch.Tensor]]) -> None:
    for got in results:
        plain, again = (
            {
                k.removeprefix(f"{case}/{on}/"): v
                for k, v in got.items()
                if k.startswith(f"{case}/{on}/")
            }
            for on in (False, True)
        )
        assert again.pop("kept") < 0.6 * plain.pop("kept")
        assert plain.keys() == again.keys()
        assert any("momentum_buffer" in name for name in plain)
        assert [name for name in plain if not torch.equal(plain[name], again[name])] == []


def test_stages_are_chosen_and_those_that_are_not_there_refused() -> None:
    kept = [
        int(train("views apart", stages)["kept"]) for stages in ((), (1,), (1, 3), (1, 2, 3, 4))
    ]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4
    with pytest.raises(ConfigError, match="backbone has 4 stages, there is no stage 5"):
        build("views apart", (5,))
    with pytest.raises(
        ConfigError, match="activation_checkpointing and compile exclude each other"
    ):
        small.config("byol", engine={"activation_checkpointing": True, "compile": True})
