"""One process against 2 and 4 gloo ranks, in float64: the same losses, parameters, targets, statistics and memories.

Every method in methods/ (by listing the folder) with LARS, moving averages and cross-rank normalisation, six steps across an
epoch boundary; those that allow it once more with gradients accumulated over micro-batches. The tolerance is fixed
beforehand; every planted bug deviates at least 100 times more than it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import ranks
import small
import torch
from bugs import BUGS
from toys import ADVERSARY, toy_engine

from scaletrain.config import leaves

TOLERANCE = 1e-9  # relative, of losses and of every tensor of the state after STEPS steps
STEPS = 6
# A micro-batch then holds different samples at every world size. Groups of few samples (2 grow rounding errors a hundredfold
# with each step, 6 less than tenfold) would drown what is compared.
ACCUMULATED: dict[str, Any] = {"batch": 48, "engine": {"accumulate": 2}, "model": {"norm_group": 6}}
CASES = {  # name: (method, changes of its configuration)
    **{name: (name, {}) for name in (*leaves("methods"), ADVERSARY)},
    **{
        f"{name} accumulated": (name, ACCUMULATED)
        for name in leaves("methods")
        if not importlib.import_module(f"scaletrain.methods.{name}").Model.global_loss
    },
}
CAUGHT_BY = {  # which case exercises what a bug breaks
    "lost_gather_gradient": "simclr",
    "allreduce_without_autograd": ADVERSARY,
    "local_norm": "simclr",
    "local_batch_norm": "byol",
    "ema_before_step": "byol",
    "last_micro_batch_not_summed": "byol accumulated",
    "statistics_per_micro_batch": "byol accumulated",
}


def train(cases: tuple[str, ...], bug: str | None = None) -> dict[str, torch.Tensor]:
    """Train each case on this rank's slices; "case/loss" and all of "case/<tensor>" that this rank holds."""
    found: dict[str, torch.Tensor] = {}
    for case in cases:
        method, changes = CASES[case]
        cfg = small.config("byol" if method == ADVERSARY else method, **changes)
        if bug is None:
            trainer = toy_engine(cfg) if method == ADVERSARY else small.engine(cfg)
            losses = small.run(trainer, cfg, 0, STEPS)
        else:
            with BUGS[bug]():
                trainer = toy_engine(cfg) if method == ADVERSARY else small.engine(cfg)
                losses = small.run(trainer, cfg, 0, STEPS)
        found[f"{case}/loss"] = torch.tensor(losses, dtype=torch.float64)
        for name, piece in trainer.state().items():
            found[f"{case}/{name}@{piece.start}"] = piece.data.double()
    return found


def train_bugs(cases: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    return {f"{bug}:{k}": v for bug, case in cases for k, v in train((case,), bug).items()}


def whole(results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What all ranks wrote, put together; losses are the same on every rank."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for result in results:
        for key, value in result.items():
            name, _, start = key.partition("@")
            pieces.setdefault(name, {})[int(start or 0)] = value
    return {name: torch.cat([parts[s] for s in sorted(parts)]) for name, parts in pieces.items()}


def deviation(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest difference relative to the tensor's own size, and where."""
    assert a.keys() == b.keys()
    worst = [((a[k] - b[k]).abs().max().item() / max(1e-3, a[k].abs().max().item()), k) for k in a if a[k].numel()]
    return max(worst)


def of(case: str, result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in result.items() if k.startswith(f"{case}/")}


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return whole([train(tuple(CASES))])


@pytest.fixture(scope="module", params=[2, 4])
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder: Path = tmp_path_factory.mktemp(f"world{request.param}")
    return whole(ranks.run(request.param, train, folder, tuple(CASES)))


@pytest.mark.parametrize("case", CASES)
def test_ranks_do_not_matter(case: str, reference: dict[str, torch.Tensor], spread: dict[str, torch.Tensor]) -> None:
    worst, where = deviation(of(case, reference), of(case, spread))
    assert worst < TOLERANCE, f"{where} deviates by {worst:.1e}"


def test_every_planted_bug_is_seen(reference: dict[str, torch.Tensor], tmp_path: Path) -> None:
    results = whole(ranks.run(2, train_bugs, tmp_path, tuple(CAUGHT_BY.items())))
    assert set(CAUGHT_BY) == set(BUGS)
    for bug, case in CAUGHT_BY.items():
        broken = {k.removeprefix(f"{bug}:"): v for k, v in results.items() if k.startswith(f"{bug}:")}
        worst, _ = deviation(of(case, reference), broken)
        assert worst > 100 * TOLERANCE, f"{bug} in {case} deviates by only {worst:.1e}"


def test_training_moves_everything(reference: dict[str, torch.Tensor]) -> None:
    """The comparison would prove nothing if the parameters stood still."""
    for case in CASES:
        assert reference[f"{case}/loss"].std() > 1e-6
        assert any(v.abs().max() > 0 for k, v in of(case, reference).items() if "momentum_buffer" in k)
