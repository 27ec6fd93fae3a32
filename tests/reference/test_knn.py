"""The weighted vote against a transcription in plain Python: one query at a time, sorted lists, no
tensors.
"""

from __future__ import annotations

import math

import pytest
import torch
from kit.heads import knn

from scaletrain.evals.heads import knn as module
from scaletrain.evals.heads.knn import nearest, search, votes
from scaletrain.evals.scores import ranks


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def slow(
    bank: list[list[float]], labels: list[int], query: list[float], k: int, temperature: float
) -> list[int]:
    """The classes that have a vote, in the order of their votes; ties go to the class of the nearer
    neighbour.
    """
    near = sorted(range(len(bank)), key=lambda i: (-round(cosine(query, bank[i]), 6), i))[:k]
    votes: dict[int, float] = {}
    for i in near:
        votes[labels[i]] = votes.get(labels[i], 0.0) + math.exp(
            cosine(query, bank[i]) / temperature
        )
    return sorted(
        votes, key=lambda c: -votes[c]
    )  # a class enters `votes` by its nearest neighbour, and sorting is stable


@pytest.mark.parametrize(
    "rows", [1 << 25, 37 * 4]
)  # one chunk of queries, or four queries at a time
@pytest.mark.parametrize("temperature", [0.07, 2.0])
def test_against_plain_python(
    rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", rows)
    random = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(37, 5, generator=random), torch.randn(23, 5, generator=random)
    labels, truth = (
        torch.randint(7, (37,), generator=random),
        torch.randint(7, (23,), generator=random),
    )
    ks = (1, 5, 20, 200)  # the last is above the 37 of the bank
    got = knn(bank, labels, queries, truth, ks, temperature)
    for k in ks:
        orders = [slow(bank.tolist(), labels.tolist(), q, k, temperature) for q in queries.tolist()]
        top = {
            n: [t in order[:n] for t, order in zip(truth.tolist(), orders, strict=True)]
            for n in (1, 5)
        }
        recalls = [
            sum(hits := [hit for hit, t in zip(top[1], truth.tolist(), strict=True) if t == c])
            / len(hits)
            for c in sorted(set(truth.tolist()))
        ]
        assert got[f"knn_{k}"] == pytest.approx(100 * sum(top[1]) / 23)
        assert got[f"knn_{k}_top5"] == pytest.approx(100 * sum(top[5]) / 23)
        assert got[f"knn_{k}_per_class"] == pytest.approx(100 * sum(recalls) / len(recalls))
    assert (
        temperature < 1 or len({got[f"knn_{k}"] for k in ks}) > 1
    )  # else the test could not tell one k from another


def test_equal_votes_go_to_the_nearest_neighbour_then_to_the_first_of_the_bank() -> None:
    query = torch.tensor([[2.0, 0.0]])
    twins = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for labels in ([1, 0], [0, 1]):
        assert (
            knn(twins, torch.tensor(labels), query, torch.tensor([labels[0]]), (2,))["knn_2"]
            == 100.0
        )
        assert (
            knn(twins, torch.tensor(labels), query, torch.tensor([labels[1]]), (2,))["knn_2"] == 0.0
        )
    # nearest first: 7, 3, 3, 7, 3, 7, each vote as heavy as the one of the other class beside it
    bank = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 2.0], [3.0, 0.0], [2.0, 4.0]])
    labels = torch.tensor([3, 7, 7, 3, 3, 7])
    for k, winner in ((1, 7), (2, 7), (3, 3), (4, 7), (6, 7)):
        assert knn(bank, labels, query, torch.tensor([winner]), (k,), 1e6)[f"knn_{k}"] == 100.0, k


def test_only_classes_with_a_vote_are_predicted() -> None:
    """Ten classes of twenty like images; every query looks like class 9, so nothing but class 9 can
    be right at any depth.
    """
    bank, labels = torch.eye(10).repeat_interleave(20, 0), torch.arange(10).repeat_interleave(20)
    queries, truth = torch.eye(10)[[9] * 10], torch.arange(10)
    for k in (1, 10, 20):
        for numbers, own in ((labels, truth), (9 - labels, 9 - truth)):
            got = knn(bank, numbers, queries, own, (k,))
            assert got == {f"knn_{k}": 10.0, f"knn_{k}_top5": 10.0, f"knn_{k}_per_class": 10.0}
    # with the 180 others among the neighbours, classes have a vote and ties go by the bank
    assert knn(bank, labels, queries, truth, (200,))["knn_200_top5"] == 50.0


@pytest.mark.parametrize("k", [1, 3, 8, 40, 64])
def test_equal_neighbours_come_in_bank_order(k: int) -> None:
    """Four distinct vectors, sixteen copies of each, interleaved: the edge of the k always falls
    among equals.
    """
    bank = torch.eye(4)[torch.arange(64) % 4]
    queries = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    near, where = nearest(queries, bank, k)
    for row, query in enumerate(queries.tolist()):
        order = sorted(range(64), key=lambda i: (-query[i % 4], i))[:k]
        assert where[row].tolist() == order
        assert near[row].tolist() == [query[i % 4] for i in order]


@pytest.mark.parametrize("k", [1, 3, 8, 40, 64])
def test_a_bank_in_parts_is_one_bank(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where equals lie in several parts, and where a part has fewer rows than neighbours."""
    random = torch.Generator().manual_seed(2)
    # products with these are exact, in whatever order they are summed
    bank = torch.eye(5)[torch.randint(5, (64,), generator=random)]
    queries = torch.randn(9, 5, generator=random)
    near, where = search(queries, bank, k)
    monkeypatch.setattr(module, "_BANK_ROWS", 7)
    monkeypatch.setattr(module, "_ELEMENTS", 20)
    parts = search(queries, bank, k)
    assert parts[1].equal(where)
    assert parts[0].equal(near)


def test_votes_that_are_rounded_to_zero_still_count() -> None:
    """At the lowest temperature only the nearest neighbour has a weight above zero in float32."""
    bank, labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), torch.arange(3)
    query, truth = torch.tensor([[1.0, 0.0]]).expand(2, 2), torch.tensor([1, 2])
    near, where = search(query, bank, 3)
    scores = votes(near, labels[where], 3, 1e-6, 3)
    assert ranks(scores, truth).tolist() == [1, 2]
    assert (votes(near, labels[where], 2, 1e-6, 3)[:, 2] == 0).all()


def test_k_above_the_bank_is_the_whole_bank() -> None:
    random = torch.Generator().manual_seed(1)
    bank, labels = torch.randn(9, 3, generator=random), torch.arange(9) % 3
    got = knn(bank, labels, bank, labels, (9, 200))
    assert got["knn_9"] == got["knn_200"]
    assert "knn_9_top5" not in got  # three classes


def test_no_overflow_at_a_low_temperature() -> None:
    """exp(1 / .005) is infinite in float32."""
    bank, labels = torch.eye(6), torch.arange(6)
    assert knn(bank, labels, bank, labels, (1, 6), 0.005)["knn_6"] == 100.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_is_wrong(bad: float) -> None:
    queries = torch.eye(6)
    queries[2, 2] = bad
    got = knn(torch.eye(6), torch.arange(6), queries, torch.arange(6), (1, 6))
    assert got["knn_1"] == got["knn_6_top5"] == pytest.approx(500 / 6)
