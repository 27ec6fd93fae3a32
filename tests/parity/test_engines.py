"""Every engine at 2 ranks beside one process: LARS, momentum, moving averages, norms over groups,
six steps; and planted bugs.

A slice of the matrix that `make parity` prints: there is every method, at 2 and 4 ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import pytest
import torch
from kit import ranks, small
from kit.parity import (
    ENGINES,
    STEPS,
    Case,
    Run,
    alone,
    configuration,
    deviation,
    of,
    tolerance,
    train,
    under,
    whole,
)
from kit.toys import ADVERSARY, MOMENT

from scaletrain.checkpoint.files import export
from scaletrain.core import Source
from scaletrain.engines import placement
from scaletrain.train.initial_weights import start_from

# what an engine may get wrong: targets; parameters that are frozen, written, read directly; banks;
# two losses
SLICE = {
    "ddp": ("byol",),
    "fsdp2": ("relicv2", "swav", "deepcluster", ADVERSARY),
    "fsdp2 reshard=false": ("byol",),
    "deepspeed stage=0": ("byol",),
    "deepspeed stage=1": ("swav", "moco"),
    "deepspeed stage=2": ("byol", "deepcluster_v2"),
    "deepspeed stage=3": ("relicv2", "deepcluster"),
    "fairscale": ("byol", "swav", "deepcluster_v2", ADVERSARY),
}
BROKEN_STEPS = 3  # show a planted bug
TARGET = "method.target_backbone."
CAUGHT_BY = {
    "lost_gather_gradient": "simclr",
    "allreduce_without_autograd": MOMENT,
    "local_norm": "simclr",
    "local_batch_norm": "byol",
    "ema_before_step": "byol",
}
CASES: dict[str, Case] = {
    f"{method} under {engine}": under(method, engine)
    for engine in SLICE
    for method in SLICE[engine]
}
FAST = {
    "ema_before_step": {"method": {"tau": 0.5}}
}  # a target that hardly moves would hide it in float32


def planted(bug: str, engine: str) -> Case:
    method, changes = under(CAUGHT_BY[bug], engine, group=0)
    return method, {**changes, **FAST.get(bug, {})}


BROKEN = {
    f"{bug} under {engine}": (bug, planted(bug, engine))
    for bug, engine in product(CAUGHT_BY, ENGINES)
}


def started(file: Path) -> Run:
    """The encoder that each engine holds, target included, when a run starts from a file."""
    found: Run = {}
    for engine in ENGINES:
        trainer = small.engine(configuration(under("byol", engine)))
        start_from(trainer, {"backbone": Source(file)})
        target = {
            name: placement.whole(at)
            for name, at in trainer.placed().items()
            if name.startswith(TARGET)
        }
        here = trainer.export() | target
        found |= {
            f"from a file under {engine}/{name}": tensor.reshape(-1)
            for name, tensor in here.items()
        }
    return found


def everything(file: Path) -> Run:
    found = train(CASES) | started(file)
    for name, (bug, case) in BROKEN.items():
        found |= train({name: case}, bug, BROKEN_STEPS)
    return found


@pytest.fixture(scope="module")
def encoder() -> Run:
    return small.engine(
        small.config("byol", seed=5, engine={"name": "ddp", "precision": "fp32"})
    ).export()


@pytest.fixture(scope="module")
def spread(encoder: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("ranks")
    export(encoder, folder / "encoder.safetensors", {})
    return whole(ranks.run(2, everything, folder, folder / "encoder.safetensors"))


@pytest.fixture(scope="module")
def reference() -> Run:
    """What one process computes; engines of one precision share it."""
    return once_each(CASES) | once_each({n: case for n, (_, case) in BROKEN.items()}, BROKEN_STEPS)


def once_each(cases: Mapping[str, Case], steps: int = STEPS) -> Run:
    named = {name: alone(case) for name, case in cases.items()}
    kept: dict[str, str] = {}
    firsts = {
        name: case for name, case in named.items() if kept.setdefault(repr(case), name) == name
    }
    found = whole([train(firsts, steps=steps)])
    return {
        f"{name}/{k}": v
        for name, case in named.items()
        for k, v in of(kept[repr(case)], found).items()
    }


def test_every_engine_is_here() -> None:
    assert set(SLICE) == set(ENGINES)


@pytest.mark.parametrize("name", CASES)
def test_engines_compute_the_same(name: str, reference: Run, spread: Run) -> None:
    worst, where = deviation(of(name, reference), of(name, spread), CASES[name])
    assert worst < tolerance(CASES[name]), f"{where} deviates by {worst:.1e}"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_starts_from_an_exported_encoder(engine: str, encoder: Run, spread: Run) -> None:
    got = of(f"from a file under {engine}", spread)
    assert set(got) == {*encoder, *(TARGET + name for name in encoder)}
    for name, tensor in got.items():
        assert torch.equal(
            tensor, encoder[name.removeprefix(TARGET)].reshape(-1).to(tensor.dtype)
        ), name


@pytest.mark.parametrize("name", BROKEN)
def test_planted_bugs_are_seen(name: str, reference: Run, spread: Run) -> None:
    case = BROKEN[name][1]
    worst, _ = deviation(of(name, reference), of(name, spread), case)
    limit = 100 * tolerance(case)
    assert worst > limit, f"it deviates by only {worst:.1e}, and {limit:.0e} is wanted"
