"""The sharding engine on four ranks, where some hold no row of a parameter, against one process
with whole parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from kit import ranks, small
from kit.placement import Written
from kit.toys import ADVERSARY, Toy, toy_engine

from scaletrain import dist
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config
from scaletrain.engines import fsdp2
from scaletrain.engines.base import Engine

RANKS, STEPS, TOLERANCE = 4, 3, 1e-9
ADAMW = {"optim": {"name": "adamw", "lr": 1e-3}}
CASES: dict[
    str, tuple[str, dict[str, Any], dict[str, Any]]
] = {  # name: (method, changes of the recipe, options of fsdp2)
    "target, a copy per pair of ranks": ("byol", {}, {"replicate": 2, "max_grad_norm": 0.1}),
    "kept, run again": (
        "byol",
        {"model": {"norm_group": 3}},
        {"reshard": False, "activation_checkpointing": True},
    ),
    "written prototypes": ("swav", {}, {}),
    "embeddings before the first step": ("deepcluster_v2", {}, {"reshard": False, "offload": True}),
    "two losses": (ADVERSARY, {}, {}),
    "adamw, accumulated": (
        "byol",
        {"batch": 24, "model": {"norm_group": 3}, **ADAMW},
        {"grad_accum_steps": 2, "max_grad_norm": 0.1},
    ),
}


def written(engine: Engine) -> Written:
    return Written(dist.gather_objects(engine.state()))


def config(case: str, engine: Mapping[str, Any]) -> Config:
    method, changes, options = CASES[case]
    shared = {k: v for k, v in options.items() if k in ("grad_accum_steps", "max_grad_norm")}
    mine = options if engine["name"] == "fsdp2" else shared
    return small.config(
        "byol" if method == ADVERSARY else method,
        **changes,
        engine={"precision": "fp64", **mine, **engine},
    )


def build(case: str, engine: Mapping[str, Any]) -> tuple[Engine, Config]:
    cfg = config(case, engine)
    return (toy_engine(cfg) if CASES[case][0] == ADVERSARY else small.engine(cfg)), cfg


def train(name: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for case in CASES:
        engine, cfg = build(case, {"name": name})
        losses = small.run(engine, cfg, 0, STEPS)
        found |= {f"{case}/{k}": v for k, v in written(engine).flat.items()}
        found |= {f"{case}/export.{k}": v for k, v in engine.export().items()}
        found[f"{case}/loss"] = torch.tensor(losses, dtype=torch.float64)
        if name == "fsdp2" and dist.world() == RANKS:
            found[f"{case}/held"] = torch.tensor(
                sum(at.tensor.numel() for at in engine.shards.values())
            )
    return found


def resume() -> dict[str, torch.Tensor]:
    """Halfway from one layout to another and on to whole parameters: what each then holds and
    computes.
    """
    found: dict[str, torch.Tensor] = {}
    first, cfg = build("written prototypes", {"name": "fsdp2"})
    small.run(first, cfg, 0, STEPS)
    saved = written(first)
    layouts: tuple[dict[str, Any], ...] = (
        {"name": "fsdp2"},
        {"name": "fsdp2", "replicate": 2},
        {"name": "ddp"},
    )
    for number, engine in enumerate(layouts):
        following, cfg = build("written prototypes", engine)
        following.restore(saved)
        saved = written(following)
        found |= {f"{number}/{name}": value for name, value in saved.flat.items()}
        found[f"{number}/loss"] = torch.tensor(small.run(following, cfg, STEPS, STEPS + 1))
    return found


def refusals() -> dict[str, torch.Tensor]:
    cfg = config("two losses", {"name": "fsdp2"})
    scalar, plain = Toy(cfg), Toy(cfg)
    scalar.temperature = torch.nn.Parameter(torch.ones(()))
    for method, changes, words in (
        (scalar, {}, "temperature"),
        (plain, {"replicate": 3}, "must divide the 4 ranks"),
    ):
        with pytest.raises(ConfigError, match=words):
            fsdp2.Engine(
                method, cfg.engine.model_copy(update=changes), cfg.optim, torch.device("cpu")
            )  # type: ignore[arg-type]
    return {}


def everything() -> dict[str, torch.Tensor]:
    return {**train("fsdp2"), **{f"resume {k}": v for k, v in resume().items()}, **refusals()}


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    return ranks.run(RANKS, everything, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return train("ddp")


@pytest.mark.parametrize("case", CASES)
def test_shards_compute_what_whole_parameters_do(
    case: str, alone: dict[str, torch.Tensor], spread: list[dict[str, torch.Tensor]]
) -> None:
    names = [name for name in alone if name.startswith(f"{case}/")]
    assert f"{case}/export.conv1.weight" in names
    assert {*names, f"{case}/held"} == {name for name in spread[0] if name.startswith(f"{case}/")}
    for name in names:
        for rank in range(RANKS):
            error = (alone[name] - spread[rank][name]).abs().max() / alone[
                name
            ].abs().max().clamp_min(1e-3)
            assert error < TOLERANCE, f"{name} on rank {rank}"


@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_its_share(case: str, spread: list[dict[str, torch.Tensor]]) -> None:
    held = [int(rank[f"{case}/held"]) for rank in spread]
    whole = sum(
        v.numel()
        for k, v in spread[0].items()
        if k.startswith(f"{case}/method.") and not _is_buffer(k)
    )
    copies = 2 if "copy" in case else 1
    assert sum(held) == copies * whole
    assert max(held) < 0.4 * copies * whole


def _is_buffer(name: str) -> bool:
    words = (
        "running_",
        "num_batches",
        ".rows",
        ".written",
        ".prototypes0",
        "prototypes1",
        "prototypes2",
        ".assignments.",
    )
    return any(word in name for word in words)


def test_another_layout_takes_over_exactly(spread: list[dict[str, torch.Tensor]]) -> None:
    got = spread[0]
    names = [name.removeprefix("resume 0/") for name in got if name.startswith("resume 0/")]
    assert any("momentum_buffer" in name for name in names)
    for name in names:
        for number in (1, 2):
            torch.testing.assert_close(
                got[f"resume {number}/{name}"],
                got[f"resume 0/{name}"],
                rtol=0,
                atol=1e-12 * (name == "loss"),
            )


def test_a_compiled_network_is_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(ConfigError, match=r"engine.*set compile=false, or engine\.name=ddp"):
        small.config("byol", engine={"name": "fsdp2", "compile": True})
