"""engine.name=deepspeed: every ZeRO stage at 2 ranks computes what ddp computes in one process, and
refuses what it cannot.

ZeRO is float32, where rounding differs with the order of sums. At a ReLU's kink that grows a
thousandfold, so activations are smooth here, and parameters are compared by how far they have
moved. ddp in float32 deviates by up to 1e-4 between 1 and 2 ranks that way, a target that moves
before the step by 0.04 or more.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import ranks, small
from kit.toys import Toy

from scaletrain import dist
from scaletrain.checkpoint import reader
from scaletrain.checkpoint import writer as checkpoint
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config
from scaletrain.core import Clock
from scaletrain.engines import deepspeed
from scaletrain.engines.base import Engine

TOLERANCE = 5e-4  # of losses, of optimizer state, and of what moved
STAGES = (0, 1, 2, 3)
START, STOP = 2, 8
ACCUMULATED: dict[str, Any] = {"model": {"norm_group": 6}}
StepResult = dict[str, torch.Tensor]


def config(method: str, engine: dict[str, Any], **changes: Any) -> Config:
    plain = {"precision": "fp32", "channels_last": False, **engine}
    return small.config(method, batch=24, optim={"lr": 0.02}, engine=plain, **changes)


def run(engine: Engine, cfg: Config, start: int, stop: int) -> StepResult:
    """Losses, optimizer state and the movement of all else, as "name@start" of what this rank
    writes.
    """
    with small.smooth():
        before = {
            name: at.tensor.detach().double().reshape(-1).clone()
            for name, at in engine.placed().items()
        }
        losses = small.run(engine, cfg, start, stop)
    moved = {f"loss@{0}": torch.tensor(losses, dtype=torch.float64)}
    for name, piece in engine.state().items():
        if piece.data.numel():
            moved[f"{name}@{piece.start}"] = piece.data.double() - (
                before[name] if name.startswith("method.") else 0
            )
    return moved


def save(engine: Engine, folder: Path) -> None:
    writer = checkpoint.Writer(folder)
    writer.save(START, engine.state(), {})
    writer.close()
    dist.barrier()


def restored(cfg: Config, folder: Path) -> Engine:
    engine = small.engine(cfg, perturb=False)
    saved = reader.latest(folder)
    assert saved is not None
    engine.restore(saved)
    return engine


def bits(engine: Engine) -> StepResult:
    return {name: at.tensor.detach().clone() for name, at in engine.placed().items()}


def skip(engine: Engine, cfg: Config) -> bool:
    """Whether a step with a NaN on rank 1 leaves no trace, and the next good one trains."""
    before, good = bits(engine), small.batch(cfg, STOP)
    broken = dataclasses.replace(
        good, views=(good.views[0] * (float("nan") if dist.rank() else 1), *good.views[1:])
    )
    clock = Clock(STOP, 20, 2, 4)
    traceless = engine.step(broken, clock, 0.02, 0.02).skipped
    traceless &= all(torch.equal(before[name], tensor) for name, tensor in bits(engine).items())
    return traceless and not engine.step(good, clock, 0.02, 0.02).skipped


def on_ranks(folder: Path) -> StepResult:
    found: StepResult = {}
    for stage in STAGES:
        cfg = config("byol", {"name": "deepspeed", "stage": stage, "max_grad_norm": 0.5})
        engine = restored(cfg, folder / "ddp")
        save(engine, folder / f"zero{stage}")
        found |= {f"byol {stage}/{k}": v for k, v in run(engine, cfg, START, STOP).items()}
        found[f"skip {stage}"] = torch.tensor(skip(engine, cfg))
    for stage in (1, 3):
        cfg = config("swav", {"name": "deepspeed", "stage": stage})
        found |= {f"swav {stage}/{k}": v for k, v in run(small.engine(cfg), cfg, 0, 4).items()}
    for stage in (1, 2, 3):
        cfg = config(
            "byol", {"name": "deepspeed", "stage": stage, "grad_accum_steps": 2}, **ACCUMULATED
        )
        found |= {
            f"accumulated {stage}/{k}": v for k, v in run(small.engine(cfg), cfg, 0, 2).items()
        }
    cfg = config("deepcluster_v2", {"name": "deepspeed", "stage": 3})
    found |= {f"deepcluster 3/{k}": v for k, v in run(small.engine(cfg), cfg, 0, 2).items()}
    cfg = config(
        "byol", {"name": "deepspeed", "stage": 3, "precision": "bf16", "channels_last": True}
    )
    engine = small.engine(cfg)
    found |= {f"bf16 3/{k}": v for k, v in run(engine, cfg, 0, 1).items()}
    assert {at.tensor.dtype for at in engine.shards.values()} == {torch.float32}
    return found


def on_one(folder: Path) -> StepResult:
    """The only process of a run, which has no process group before."""
    cfg = config("byol", {"name": "deepspeed", "stage": 3, "max_grad_norm": 0.5})
    return run(restored(cfg, folder / "ddp"), cfg, START, STOP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def alone(folder: Path) -> StepResult:
    """What ddp finds in one process. Its checkpoint is where the ranks begin."""
    found: StepResult = {}
    cfg = config("byol", {"max_grad_norm": 0.5})
    engine = small.engine(cfg)
    run(engine, cfg, 0, START)
    save(engine, folder / "ddp")
    found |= {f"byol/{k}": v for k, v in run(engine, cfg, START, STOP).items()}
    cfg = config("swav", {})
    found |= {f"swav/{k}": v for k, v in run(small.engine(cfg), cfg, 0, 4).items()}
    cfg = config("byol", {"grad_accum_steps": 2}, **ACCUMULATED)
    found |= {f"accumulated/{k}": v for k, v in run(small.engine(cfg), cfg, 0, 2).items()}
    cfg = config("deepcluster_v2", {})
    found |= {f"deepcluster/{k}": v for k, v in run(small.engine(cfg), cfg, 0, 2).items()}
    cfg = config("byol", {"precision": "bf16"})
    found |= {f"bf16/{k}": v for k, v in run(small.engine(cfg), cfg, 0, 1).items()}
    return found


@pytest.fixture(scope="module")
def spread(alone: StepResult, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StepResult:
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for result in ranks.run(2, on_ranks, tmp_path_factory.mktemp("ranks"), folder):
        for key, value in result.items():
            name, _, start = key.partition("@")
            pieces.setdefault(name, {})[int(start or 0)] = value
    return {
        name: torch.cat([parts[s] for s in sorted(parts)]) if "/" in name else parts[0]
        for name, parts in pieces.items()
    }


def deviation(case: str, stage: int, alone: StepResult, spread: StepResult) -> tuple[float, str]:
    """The largest, relative to the tensor, or to 0.01: biases before a norm have no gradient but
    rounding errors.
    """
    a = {
        k.partition("/")[2].partition("@")[0]: v
        for k, v in alone.items()
        if k.startswith(f"{case}/")
    }
    b = {k.partition("/")[2]: v for k, v in spread.items() if k.startswith(f"{case} {stage}/")}
    assert a.keys() == b.keys()
    return max(
        ((a[k] - b[k]).abs().max().item() / max(1e-2, a[k].abs().max().item()), k) for k in a
    )


@pytest.mark.parametrize(
    ("case", "stage"),
    [
        *(("byol", s) for s in STAGES),
        ("swav", 1),
        ("swav", 3),
        *(("accumulated", s) for s in (1, 2, 3)),
    ],
)
def test_every_stage_computes_what_ddp_does(
    case: str, stage: int, alone: StepResult, spread: StepResult
) -> None:
    worst, where = deviation(case, stage, alone, spread)
    assert worst < TOLERANCE, f"{where} deviates by {worst:.1e}"
    assert alone[f"{case}/loss@0"].std() > 1e-3


def test_a_single_process(alone: StepResult, folder: Path, tmp_path: Path) -> None:
    (found,) = ranks.run(1, on_one, tmp_path, folder)
    worst, where = deviation(
        "byol", 3, alone, {f"byol 3/{k.partition('@')[0]}": v for k, v in found.items()}
    )
    assert worst < TOLERANCE / 10, (
        f"{where} deviates by {worst:.1e}"
    )  # sums have one order, but for the norm that clips


def test_features_of_parameters_that_are_not_whole(alone: StepResult, spread: StepResult) -> None:
    assert deviation("deepcluster", 3, alone, spread)[0] < TOLERANCE


def test_bf16_is_autocast(alone: StepResult, spread: StepResult) -> None:
    assert spread["bf16 3/loss"].item() == pytest.approx(alone["bf16/loss@0"].item(), rel=1e-2)
    assert spread["bf16 3/loss"].item() != alone["byol/loss@0"][0].item()


@pytest.mark.parametrize("stage", STAGES)
def test_a_non_finite_step_leaves_no_trace(stage: int, spread: StepResult) -> None:
    assert bool(spread[f"skip {stage}"])


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_go_to_and_from_ddp_bit_for_bit(
    stage: int, spread: StepResult, folder: Path
) -> None:
    cfg = config("byol", {})
    ours, theirs = (bits(restored(cfg, folder / name)) for name in ("ddp", f"zero{stage}"))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert any(name.endswith("momentum_buffer") and tensor.any() for name, tensor in ours.items())


def test_a_file_of_settings_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    settings = {
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.5,
        "fp16": {"enabled": False},
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": False,
            "offload_param": {"device": "none"},
        },
    }
    path.write_text(json.dumps(settings))
    engine: Any = config(
        "byol", {"name": "deepspeed", "stage": 1, "max_grad_norm": 0.5, "deepspeed": str(path)}
    ).engine
    assert engine.deepspeed == settings
    assert not engine.talk
    told = engine.settings()
    assert told["zero_optimization"]["overlap_comm"] is False
    assert told["zero_optimization"]["stage"] == 1
    assert told["gradient_clipping"] == 0.0  # base.Engine clips
    assert "fp16" not in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"precision": "fp64"},
            "engine: ZeRO keeps fp32 masters: set precision=fp32, or engine.name=ddp or fsdp2",
        ),
        ({"compile": True, "stage": 3}, "set compile=false or stage=2"),
        ({"stage": 4}, "engine.stage"),
        ({"deepspeed": "nowhere.json"}, "engine.deepspeed: cannot read nowhere.json: No such file"),
        (
            {"deepspeed": {"train_batch_size": 8}},
            r"train_batch_size=8 belongs to the recipe: remove it and set batch",
        ),
        ({"deepspeed": {"gradient_clipping": 1.0}}, r"remove it and set engine.max_grad_norm"),
        ({"deepspeed": {"optimizer": {"type": "Adam"}}}, r"remove it and set optim"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, r"remove it and set engine.precision"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}}},
            r"zero_optimization.stage=3 .* set engine.stage",
        ),
        (
            {"deepspeed": {"zero_optimization": {"offload_param": {"device": "cpu"}}}},
            "engine.name=fsdp2",
        ),
        (
            {"deepspeed": {"zero_optimization": {"overlap_com": True}}},
            "did you mean 'zero_optimization.overlap_comm'",
        ),
        ({"deepspeed": {"zero_optimisation": {}}}, "zero_optimisation is not supported"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config("byol", {"name": "deepspeed", "stage": 2, **changes})


def test_several_backward_passes_are_refused() -> None:
    cfg = config("byol", {"name": "deepspeed"})
    with pytest.raises(
        ConfigError, match=r"one backward pass per step.*use engine.name=ddp or fsdp2"
    ):
        deepspeed.Engine(Toy(cfg), cfg.engine, cfg.optim, torch.device("cpu"))  # type: ignore[arg-type]
