"""The engine fairscale beside ddp: who holds what, clipping, accumulation, frozen groups, two
losses, kernels, bad steps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kit import ranks, small
from kit.toys import ADVERSARY, toy_engine

from scaletrain import dist
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config
from scaletrain.core import Clock
from scaletrain.engines.base import Engine
from scaletrain.runtime import versions

STEPS = (1, 2)
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name: (method, changes of its configuration)
    "clipped and accumulated": (
        "byol",
        {
            "batch": 24,
            "engine": {"grad_accum_steps": 2, "max_grad_norm": 0.5},
            "model": {"norm_group": 6},
        },
    ),
    # its first pass has no gradient, where ShardedDataParallel cannot hang its hooks yet
    "cached": (
        "simclr",
        {
            "batch": 24,
            "engine": {"grad_accum_steps": 2, "gradient_cache": True},
            "model": {"norm_group": 6},
        },
    ),
    "frozen": ("swav", {}),  # prototypes have no gradient before step 2
    "adamw": ("byol", {"optim": {"name": "adamw", "lr": 1e-3}}),
    "fused": (
        "simclr",
        {"engine": {"precision": "fp32"}, "optim": {"lr": 1e-4}},
    ),  # LARS' kernels of float32 on the CPU
    "two losses": (ADVERSARY, {}),
}
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-2}


def config(case: str, name: str) -> Config:
    method, changes = CASES[case]
    engine = {"precision": "fp64", **changes.get("engine", {}), "name": name}
    return small.config("byol" if method == ADVERSARY else method, **changes | {"engine": engine})


def build(case: str, name: str) -> tuple[Engine, Config]:
    cfg = config(case, name)
    return toy_engine(cfg) if CASES[case][0] == ADVERSARY else small.engine(cfg), cfg


def train(name: str) -> dict[str, torch.Tensor]:
    """Losses, norms and trust ratios, what this rank holds of the optimizer, and its copy of the
    method, of every case.
    """
    found: dict[str, torch.Tensor] = {}
    for case in CASES:
        trainer, cfg = build(case, name)
        for step in STEPS:
            result = trainer.step(
                small.batch(cfg, step), Clock(step, 20, 0, 4), cfg.optim.lr, cfg.optim.lr
            )
            shown = [
                torch.tensor(result.loss),
                result.grad_norm,
                *(result.trust[k] for k in sorted(result.trust)),
            ]
            found[f"{case}/result{step}"] = torch.stack([x.double() for x in shown])
        found |= {f"{case}/method.{k}": v.clone() for k, v in trainer.method.state_dict().items()}
        found |= {
            f"{case}/{k}": v.data.clone()
            for k, v in trainer.state().items()
            if k.startswith("optim.") and len(v.data)
        }
    return found


def poisoned() -> dict[str, torch.Tensor]:
    """What a step that rank 1 spoils changes: nothing."""
    trainer, cfg = build("clipped and accumulated", "fairscale")
    small.run(trainer, cfg, 0, 1)
    before = {name: at.tensor.detach().clone() for name, at in trainer.placed().items()}
    bad = small.batch(cfg, 1)
    if dist.rank() == 1:
        bad.views[0][0, 1, 0, 0, 0] = float("nan")
    skipped = trainer.step(bad, Clock(1, 20, 0, 4), 0.2, 0.2).skipped
    changed = [
        name for name, at in trainer.placed().items() if not torch.equal(before[name], at.tensor)
    ]
    gradients = [p for p in trainer.method.parameters() if p.grad is not None]
    return {
        "skipped": torch.tensor(skipped),
        "changed": torch.tensor(len(changed)),
        "kept": torch.tensor(len(gradients)),
    }


def work() -> dict[str, torch.Tensor]:
    return train("fairscale") | poisoned()


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return train("ddp")


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    return ranks.run(2, work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_process_of_ddp_computes(
    case: str, alone: dict[str, torch.Tensor], spread: list[dict[str, torch.Tensor]]
) -> None:
    tolerance = TOLERANCE[config(case, "ddp").engine.precision]  # type: ignore[attr-defined]
    wanted = {k: v for k, v in alone.items() if k.startswith(f"{case}/")}
    assert {k for rank in spread for k in rank if k.startswith(f"{case}/")} == wanted.keys()
    for name, a in wanted.items():
        for rank in spread:  # every rank has all of the method and of the results
            if name in rank:
                b = rank[name].view(a.shape)
                assert (a - b).abs().max() <= tolerance * max(1e-3, a.abs().max()), name
            else:
                assert "/optim." in name


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_replicas_and_each_rank_keeps_about_half_of_the_optimizer_state(
    case: str, spread: list[dict[str, torch.Tensor]]
) -> None:
    a, b = ({k: v for k, v in rank.items() if k.startswith(f"{case}/")} for rank in spread)
    both = a.keys() & b.keys()
    assert all(torch.equal(a[k], b[k]) for k in both)
    assert not any("/optim." in k for k in both)
    first, second = (sum(v.nbytes for k, v in rank.items() if "/optim." in k) for rank in (a, b))
    # whole parameters are dealt out, and this network has few large ones
    assert 0.35 < first / (first + second) < 0.65


def test_a_bad_sample_of_one_rank_leaves_no_trace_on_any(
    spread: list[dict[str, torch.Tensor]],
) -> None:
    for rank in spread:
        assert (rank["skipped"], rank["changed"], rank["kept"]) == (True, 0, 0)


@pytest.mark.parametrize("name", ["deepspeed", "fairscale"])
def test_a_missing_library_is_named_by_the_engine_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that only evaluates reads the recipe all the same."""
    monkeypatch.setattr(versions, "installed", lambda library: "")
    cfg = small.config("byol", engine={"name": name})
    with pytest.raises(
        ConfigError, match=rf"engine.name={name} needs {name}: pip install 'scaletrain\[{name}\]'"
    ):
        small.engine(cfg)
