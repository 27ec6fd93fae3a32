"""One process against 2 and 4 gloo ranks, in float64: the same losses, parameters, targets,
statistics and memories.

Every method in methods/ (by listing the folder) with LARS, moving averages and cross-rank
normalisation, six steps across an epoch boundary; those that allow it once more with gradients
accumulated over micro-batches. All of them run on 2 ranks; on 4 ranks runs a choice that has every
mechanism, and `make parity` compares the others. The tolerance is fixed beforehand; every planted
bug deviates at least 100 times more than it. Other engines: test_engines.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from kit import ranks
from kit.parity import CASES, EXACT, Run, configuration, deviation, engine_of, of, train, whole
from kit.planted_bugs import BUGS
from kit.toys import ADVERSARY

from scaletrain.core import DeferredState, Method

# cases for 4 ranks: between them they have every mechanism, which a test verifies
ON_FOUR_RANKS = (
    "byol",  # a target network
    "relicv2",  # negatives of all ranks, masks
    "swav",  # a queue, balanced codes
    "pirl nce",  # a memory of every sample, a number that is fixed by the first step
    "deepcluster",  # clusters, parameters that are written
    "directpred",  # a correlation matrix that is staged
    "vicreg",  # statistics over the global batch
    "supcon+suncet",  # a batch of labelled samples
    ADVERSARY,  # two losses
    "byol accumulated",
    "moco shuffled",
)
WORLDS = {2: tuple(CASES), 4: ON_FOUR_RANKS}
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


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """spread(world): what `world` ranks computed, put together."""

    @functools.cache
    def trained(world: int) -> Run:
        folder = tmp_path_factory.mktemp(f"world{world}")
        return whole(ranks.run(world, train, folder, {name: CASES[name] for name in WORLDS[world]}))

    return trained


@pytest.mark.parametrize(
    ("world", "case"), [(world, case) for world, names in WORLDS.items() for case in names]
)
def test_ranks_do_not_matter(
    world: int, case: str, reference: Run, spread: Callable[[int], Run]
) -> None:
    worst, where = deviation(of(case, reference), of(case, spread(world)), CASES[case])
    assert worst < EXACT, f"{where} deviates by {worst:.1e}"


def mechanisms(case: str) -> set[str]:
    """What of a method depends on the number of ranks: modules with state, and declarations."""
    method, cfg = engine_of(CASES[case]).method, configuration(CASES[case])
    modules = {type(m).__name__ for m in method.modules() if isinstance(m, DeferredState)}
    declared = {
        "target": bool(method.targets),
        "global loss": method.global_loss,
        "two losses": method.separate_losses,
        "labels": method.classes is not None,
        "whole images": method.whole_images,
        "features of an epoch": type(method).on_epoch is not Method.on_epoch,
        "labelled samples": cfg.data.support is not None,
        "accumulated": getattr(cfg.engine, "grad_accum_steps", 1) > 1,
        "groups": len(method.groups()) > 0,
    }
    return modules | {name for name, there in declared.items() if there}


def test_four_ranks_have_every_mechanism() -> None:
    assert set().union(*map(mechanisms, ON_FOUR_RANKS)) == set().union(*map(mechanisms, CASES))


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
