"""One process against 2 and 4 gloo ranks, in float64: the same losses, parameters, targets, statistics and memories.

Every method in methods/ (by listing the folder) with LARS, moving averages and cross-rank normalisation, six steps across an
epoch boundary. The tolerance is fixed beforehand; every planted bug deviates at least 100 times more than it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import small
import torch
from bugs import BUGS
from toys import ADVERSARY, toy_engine

from scaletrain.config import leaves

TOLERANCE = 1e-9  # relative, of losses and of every tensor of the state after STEPS steps
STEPS = 6
METHODS = (*leaves("methods"), ADVERSARY)
CAUGHT_BY = {  # which method exercises what a bug breaks
    "lost_gather_gradient": "simclr",
    "allreduce_without_autograd": ADVERSARY,
    "local_norm": "simclr",
    "local_batch_norm": "byol",
    "ema_before_step": "byol",
}


def train(methods: tuple[str, ...], bug: str | None = None) -> dict[str, torch.Tensor]:
    """Train each method on this rank's slices; "method/loss" and all of "method/<tensor>" that this rank holds."""
    found: dict[str, torch.Tensor] = {}
    for method in methods:
        cfg = small.config("byol" if method == ADVERSARY else method)
        if bug is None:
            trainer = toy_engine(cfg) if method == ADVERSARY else small.engine(cfg)
            losses = small.run(trainer, cfg, 0, STEPS)
        else:
            with BUGS[bug]():
                trainer = toy_engine(cfg) if method == ADVERSARY else small.engine(cfg)
                losses = small.run(trainer, cfg, 0, STEPS)
        found[f"{method}/loss"] = torch.tensor(losses, dtype=torch.float64)
        for name, piece in trainer.state().items():
            found[f"{method}/{name}@{piece.start}"] = piece.data.double()
    return found


def train_bugs(cases: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    return {f"{bug}:{k}": v for bug, method in cases for k, v in train((method,), bug).items()}


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


def of(method: str, result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in result.items() if k.startswith(f"{method}/")}


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return whole([train(METHODS)])


@pytest.fixture(scope="module", params=[2, 4])
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder: Path = tmp_path_factory.mktemp(f"world{request.param}")
    return whole(ranks.run(request.param, train, folder, METHODS))


@pytest.mark.parametrize("method", METHODS)
def test_ranks_do_not_matter(method: str, reference: dict[str, torch.Tensor], spread: dict[str, torch.Tensor]) -> None:
    worst, where = deviation(of(method, reference), of(method, spread))
    assert worst < TOLERANCE, f"{where} deviates by {worst:.1e}"


def test_every_planted_bug_is_seen(reference: dict[str, torch.Tensor], tmp_path: Path) -> None:
    results = whole(ranks.run(2, train_bugs, tmp_path, tuple(CAUGHT_BY.items())))
    assert set(CAUGHT_BY) == set(BUGS)
    for bug, method in CAUGHT_BY.items():
        broken = {k.removeprefix(f"{bug}:"): v for k, v in results.items() if k.startswith(f"{bug}:")}
        worst, _ = deviation(of(method, reference), broken)
        assert worst > 100 * TOLERANCE, f"{bug} in {method} deviates by only {worst:.1e}"


def test_training_moves_everything(reference: dict[str, torch.Tensor]) -> None:
    """The comparison would prove nothing if the parameters stood still."""
    for method in METHODS:
        assert reference[f"{method}/loss"].std() > 1e-6
        assert any(v.abs().max() > 0 for k, v in of(method, reference).items() if "momentum_buffer" in k)
