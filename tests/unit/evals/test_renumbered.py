"""No figure of any benchmark depends on how the classes are numbered, on data full of ties."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kit.evals import run_folder, shards
from kit.heads import knn
from torch import Tensor

from scaletrain.evals import benchmark, run
from scaletrain.evals.scores import accuracy, ranks

CLASSES = 7


def renumbered(seed: int) -> Tensor:
    """A new label for each class: neither dense nor in the old order."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randperm(1000, generator=random) * 10**9)[:CLASSES]


@pytest.mark.parametrize("seed", range(20))
def test_votes_with_many_ties(seed: int) -> None:
    """A few distinct vectors, each in the bank for several classes."""
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-1, 2, (6, 3), generator=random).float()
    bank, queries = (vectors[torch.randint(6, (n,), generator=random)] for n in (40, 60))
    labels, truth = (torch.randint(CLASSES, (n,), generator=random) for n in (40, 60))
    truth[:CLASSES] = labels[:CLASSES] = torch.arange(CLASSES)
    new, ks = torch.randperm(CLASSES, generator=random), (1, 2, 3, 8, 40)
    for temperature in (0.07, 1e6):
        before = knn(bank, labels, queries, truth, ks, temperature)
        assert knn(bank, new[labels], queries, new[truth], ks, temperature) == before
    assert set(before) == {f"knn_{k}{part}" for k in ks for part in ("", "_top5", "_per_class")}


@pytest.mark.parametrize("seed", range(20))
def test_ranks_and_means_with_many_ties(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    scores, truth = (
        torch.randint(3, (200, CLASSES), generator=random).float(),
        torch.randint(CLASSES, (200,), generator=random),
    )
    order = torch.randperm(CLASSES, generator=random)
    moved = torch.empty_like(scores)
    moved[:, order] = scores
    rank = ranks(scores, truth)
    assert ranks(moved, order[truth]).equal(rank)
    assert accuracy(rank, order[truth], CLASSES) == accuracy(rank, truth, CLASSES)


@pytest.mark.parametrize("changes", [(), ("linear.augment=false", "linear.refit=true")])
def test_every_benchmark_from_the_shards_on(tmp_path: Path, changes: tuple[str, ...]) -> None:
    """Each of three pictures occurs with the labels of several classes, which no classifier can
    tell apart.
    """
    numbers, queries = [*range(6), *(i * i % 6 for i in range(42))], [i % 6 for i in range(18)]
    # the classifier of a run is bound to the numbers that it was trained with
    names = [name for name in benchmark.names() if name != "predict"]
    quick = ("features.workers=0", "linear.epochs=2", "linear.batch=12", "linear.rates=[3,1]")
    quick += ("logistic.strengths=5", "svm.costs=[1,10]", "fewshot.shots=[1]")
    found = []
    for trial in range(3):
        new = renumbered(trial).tolist() if trial else range(6)
        place = tmp_path / str(trial)
        train = shards(place / "train", [new[n] for n in numbers], colours=[n % 3 for n in numbers])
        test = shards(place / "test", [new[n] for n in queries], colours=[n % 3 for n in queries])
        results = run.run(run_folder(place, train), names, test=test, overrides=(*quick, *changes))
        found.append(
            {name: value for result in results for name, value in result["metrics"].items()}
        )
    assert found[0] == found[1] == found[2]
    assert {"knn_20_per_class", "linear_top5", "logistic", "svm", "fewshot_ridge_1"} <= set(
        found[0]
    )
