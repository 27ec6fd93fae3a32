"""One process against 2 and 4 gloo ranks, in float64: the same losses, parameters, targets,
statistics and memories.

Every method in methods/ (by listing the folder) with LARS, moving averages and cross-rank
normalisation, six steps across an epoch boundary; those that allow it once more with gradients
accumulated over micro-batches. The tolerance is fixed beforehand; every planted bug deviates at
least 100 times more than it. Other engines: test_engines.py.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from kit import ranks, small
from kit.parity import EXACT, Case, Run, deviation, of, train, whole
from kit.planted_bugs import BUGS
from kit.toys import ADVERSARY

from scaletrain.config.schema import components

# A micro-batch then holds different samples at every world size. Groups of few samples (2 grow
# rounding errors a hundredfold with each step, 6 less than tenfold) would drown what is compared.
ACCUMULATED: dict[str, Any] = {
    "batch": 48,
    "engine": {"grad_accum_steps": 2},
    "model": {"norm_group": 6},
}
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
CAUGHT_BY = {  # which case exercises what a bug breaks
    "lost_gather_gradient": "simclr",
    "allreduce_without_autograd": ADVERSARY,
    "local_norm": "simclr",
    "local_batch_norm": "byol",
    "ema_before_step": "byol",
    "last_micro_batch_not_summed": "byol accumulated",
    "statistics_per_micro_batch": "byol accumulated",
    "queue_per_micro_batch": "moco accumulated",
    "keys_shuffled_within_a_rank": "moco shuffled",
    "codes_balanced_within_a_rank": "swav",
    "clusters_of_own_samples": "deepcluster",
    "memory_of_own_samples": "pirl",
}


def train_bugs(cases: tuple[tuple[str, str], ...]) -> Run:
    return {
        f"{bug}:{k}": v for bug, case in cases for k, v in train({case: CASES[case]}, bug).items()
    }


@pytest.fixture(scope="module")
def reference() -> Run:
    return whole([train(CASES)])


@pytest.fixture(scope="module", params=[2, 4])
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder: Path = tmp_path_factory.mktemp(f"world{request.param}")
    return whole(ranks.run(request.param, train, folder, CASES))


@pytest.mark.parametrize("case", CASES)
def test_ranks_do_not_matter(case: str, reference: Run, spread: Run) -> None:
    worst, where = deviation(of(case, reference), of(case, spread), CASES[case])
    assert worst < EXACT, f"{where} deviates by {worst:.1e}"


def test_every_planted_bug_is_seen(reference: Run, tmp_path: Path) -> None:
    results = whole(ranks.run(2, train_bugs, tmp_path, tuple(CAUGHT_BY.items())))
    assert set(CAUGHT_BY) == set(BUGS)
    for bug, case in CAUGHT_BY.items():
        broken = {
            k.removeprefix(f"{bug}:"): v for k, v in results.items() if k.startswith(f"{bug}:")
        }
        worst, _ = deviation(of(case, reference), of(case, broken), CASES[case])
        assert worst > 100 * EXACT, f"{bug} in {case} deviates by only {worst:.1e}"


def test_training_moves_everything(reference: Run) -> None:
    """The comparison would prove nothing if the parameters stood still."""
    for case in CASES:
        found = of(case, reference)
        assert found["loss"].std() > 1e-6
        assert any(v.abs().max() > 0 for k, v in found.items() if "momentum_buffer" in k)
