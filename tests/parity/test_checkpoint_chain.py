"""One run handed from engine to engine and from world size to world size, by checkpoints alone.

Each link restores what the one before saved, saves that again, trains two steps and saves. What is
restored is what was saved, bit for bit; the whole chain computes what one undisturbed process
computes; every engine exports the same file.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from kit import ranks, small

from scaletrain.checkpoint.files import export
from scaletrain.checkpoint.reader import SavedStep, folder_of, open_step
from scaletrain.checkpoint.writer import Writer
from scaletrain.config.schema import Config, components
from scaletrain.core import DeferredState
from scaletrain.engines.base import Engine
from scaletrain.nn.norm import BatchNorm

STEPS = 2  # of each link
METHODS = {  # with targets; with banks and clusterings; with queues and frozen prototypes
    "fp32": ("byol", "deepcluster_v2", "swav"),
    "fp64": ("byol",),
}


# Those that keep more than parameters, targets and running statistics, and two of the others.
STATEFUL = (
    "deepcluster",
    "deepcluster_v2",
    "densecl",
    "directpred",
    "moco",
    "nnclr",
    "pcl",
    "pirl",
    "swav",
)
OBJECTIVES = ("byol", "supcon+suncet", *STATEFUL)
Chain = tuple[
    Path, dict[str, list[float]]
]  # the folder of all checkpoints, and all losses by "precision/method"


class Link(NamedTuple):
    ranks: int
    engine: dict[str, Any]
    precisions: tuple[str, ...] = ("fp32", "fp64")


CHAIN = (
    Link(4, {"name": "ddp"}),
    Link(2, {"name": "fsdp2"}),
    Link(3, {"name": "deepspeed", "stage": 1}, ("fp32",)),
    Link(2, {"name": "deepspeed", "stage": 3}, ("fp32",)),
    Link(2, {"name": "fairscale"}),
    Link(1, {"name": "ddp"}),
)
LINKS = {precision: sum(precision in link.precisions for link in CHAIN) for precision in METHODS}
CASES = [(precision, method) for precision in METHODS for method in METHODS[precision]]
# Rounding errors must not grow: in fp32 steps are so short that training is hardly chaotic.
OPTIM: dict[str, dict[str, float]] = {
    "fp32": {"lr": 1e-4, "trust_coefficient": 0.5},
    "fp64": {"lr": 0.05},
}
LINK_TOLERANCE = {
    "fp32": 1e-3,
    "fp64": 1e-9,
}  # of the state after a link, relative to the distance that it moved
CHAIN_TOLERANCE = {"fp32": 1e-3, "fp64": 1e-9}  # after the chain: twelve steps of single precision
LOSS_TOLERANCE = {"fp32": 1e-4, "fp64": 1e-9}  # relative


def config(method: str, precision: str, engine: dict[str, Any]) -> Config:
    views = [{"size": 16, "count": 2}]
    return small.config(
        method,
        data={"views": views},
        engine={**engine, "precision": precision},
        optim=OPTIM[precision],
    )


def save(root: Path, step: int, trainer: Engine) -> None:
    writer = Writer(root, keep_last=99, timeout=60)
    writer.save(step, trainer.state(), {})
    writer.close()


def step_of(root: Path, step: int) -> SavedStep:
    return open_step(folder_of(root, step))


def run(trainer: Engine, cfg: Config, start: int, stop: int) -> list[float]:
    with small.smooth() if trainer.config.precision == "fp32" else nullcontext():
        return small.run(trainer, cfg, start, stop)


def forge(folder: Path, place: int) -> dict[str, torch.Tensor]:
    """Train one link of the chain; its losses by "precision/method"."""
    link, losses = CHAIN[place], {}
    for precision in link.precisions:
        start = STEPS * sum(precision in before.precisions for before in CHAIN[:place])
        for method in METHODS[precision]:
            root, cfg = folder / precision / method, config(method, precision, link.engine)
            trainer = small.engine(cfg, perturb=start == 0)
            if start:
                trainer.restore(step_of(root, start))
                save(root / "again", start, trainer)
            losses[f"{precision}/{method}"] = torch.tensor(
                run(trainer, cfg, start, start + STEPS), dtype=torch.float64
            )
            save(root, start + STEPS, trainer)
    return losses


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    losses: dict[str, list[float]] = {f"{precision}/{method}": [] for precision, method in CASES}
    for place, link in enumerate(CHAIN):
        alone = link.ranks == 1
        for case, found in (
            forge(folder, place)
            if alone
            else ranks.run(link.ranks, forge, folder, folder, place)[0]
        ).items():
            losses[case] += found.tolist()
    return folder, losses


@pytest.mark.parametrize(("precision", "method"), CASES)
def test_every_link_restores_bit_for_bit_and_exports_the_same_file(
    precision: str, method: str, chain: Chain, tmp_path: Path
) -> None:
    root = chain[0] / precision / method
    for place in range(1, LINKS[precision]):
        before, after = step_of(root, STEPS * place), step_of(root / "again", STEPS * place)
        assert before.names() == after.names()
        for name in before.names():
            assert torch.equal(before.read(name), after.read(name)), f"{name} at link {place}"
            assert before.shape(name) == after.shape(name)
        for saved, file in ((before, "before"), (after, "after")):
            export(
                {n: saved.read(n) for n in saved.names() if n.startswith("method.backbone.")},
                tmp_path / file,
                {},
            )
        assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def deviation(begin: SavedStep, a: SavedStep, b: SavedStep) -> tuple[float, str]:
    """Largest |a - b| / |a - begin| of the parts of the state, "optim projector momentum_buffer" or
    the like, and which.
    """
    assert a.names() == b.names()
    apart, moved = Counter[str](), Counter[str]()
    for name in a.names():
        x, y = a.read(name).double(), b.read(name).double()
        start = (
            begin.read(name).double() if name in begin.names() else torch.zeros_like(x)
        )  # optimizer states begin at zero
        words = name.split(".")
        part = " ".join((*words[:2], words[-1]))
        apart[part] += (x - y).square().sum().item()  # type: ignore[assignment]
        moved[part] += (x - start).square().sum().item()  # type: ignore[assignment]
    return max((math.sqrt(apart[part] / max(1e-12, moved[part])), part) for part in apart)


@pytest.mark.parametrize(("precision", "method"), CASES)
def test_every_link_computes_what_one_process_computes(
    precision: str, method: str, chain: Chain, tmp_path: Path
) -> None:
    root, cfg = chain[0] / precision / method, config(method, precision, {"name": "ddp"})
    for start in range(STEPS, STEPS * LINKS[precision], STEPS):
        alone = small.engine(cfg)
        alone.restore(step_of(root, start))
        run(alone, cfg, start, start + STEPS)
        save(tmp_path, start + STEPS, alone)
        begin, a, b = (
            step_of(root, start),
            step_of(tmp_path, start + STEPS),
            step_of(root, start + STEPS),
        )
        worst, where = deviation(begin, a, b)
        assert worst < LINK_TOLERANCE[precision], f"{where} from step {start} on"


@pytest.mark.parametrize(("precision", "method"), CASES)
def test_the_chain_computes_what_one_undisturbed_process_computes(
    precision: str, method: str, chain: Chain, tmp_path: Path
) -> None:
    folder, losses = chain
    cfg, stop = config(method, precision, {"name": "ddp"}), STEPS * LINKS[precision]
    alone = small.engine(cfg)
    save(tmp_path, 0, alone)
    assert losses[f"{precision}/{method}"] == pytest.approx(
        run(alone, cfg, 0, stop), rel=LOSS_TOLERANCE[precision]
    )
    save(tmp_path, stop, alone)
    worst, where = deviation(
        step_of(tmp_path, 0), step_of(tmp_path, stop), step_of(folder / precision / method, stop)
    )
    assert worst < CHAIN_TOLERANCE[precision], where


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Every method past an epoch's end, so that queues, memories and clusterings are in use."""
    for name in OBJECTIVES:
        cfg = small.config(name)
        trainer = small.engine(cfg)
        small.run(trainer, cfg, 0, small.STEPS_PER_EPOCH + 1)
        save(folder / name / "0", 1, trainer)
    return {}


def handed_on(folder: Path, place: int) -> dict[str, torch.Tensor]:
    """Restored on these ranks from what was saved before, and saved again."""
    for name in OBJECTIVES:
        trainer = small.engine(small.config(name, seed=5))  # other initial values
        trainer.restore(step_of(folder / name / f"{place - 1}", 1))
        save(folder / name / f"{place}", 1, trainer)
    return {}


@pytest.fixture(scope="module")
def resharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it written by 2 ranks, then by 3, then by 1."""
    folder = tmp_path_factory.mktemp("resharded")
    ranks.run(2, trained, folder, folder)
    ranks.run(3, handed_on, folder, folder, 1)
    handed_on(folder, 2)
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_state_of_every_method_survives_any_number_of_ranks(name: str, resharded: Path) -> None:
    first, *others = (step_of(resharded / name / f"{place}", 1) for place in range(3))
    assert any(first.read(tensor).abs().max() > 0 for tensor in first.names())
    for other in others:
        assert first.names() == other.names()
        for tensor in first.names():
            assert torch.equal(first.read(tensor), other.read(tensor)), tensor


def test_every_method_with_more_state_is_here() -> None:
    def stateful(method: str) -> bool:
        modules = small.engine(small.config(method)).method.modules()
        return any(isinstance(m, DeferredState) and not isinstance(m, BatchNorm) for m in modules)

    assert tuple(filter(stateful, components("methods"))) == STATEFUL
