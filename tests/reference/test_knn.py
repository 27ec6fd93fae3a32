"""The weighted vote against a transcription in plain Python: one query at a time, sorted lists, no tensors."""

from __future__ import annotations

import math

import pytest
import torch

from scaletrain.evals import knn as module
from scaletrain.evals.knn import knn, nearest


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def slow(bank: list[list[float]], labels: list[int], query: list[float], k: int, temperature: float) -> list[int]:
    """Classes in the order of their votes; ties go to the earlier neighbour and the lower class."""
    classes = max(labels) + 1
    near = sorted(range(len(bank)), key=lambda i: (-round(cosine(query, bank[i]), 6), i))[:k]
    votes = [0.0] * classes
    for i in near:
        votes[labels[i]] += math.exp(cosine(query, bank[i]) / temperature)
    return sorted(range(classes), key=lambda c: (-votes[c], c))


@pytest.mark.parametrize("rows", [1 << 25, 37 * 4])  # one chunk of queries, or four queries at a time
@pytest.mark.parametrize("temperature", [0.07, 2.0])
def test_against_plain_python(rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", rows)
    random = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(37, 5, generator=random), torch.randn(23, 5, generator=random)
    labels, truth = torch.randint(7, (37,), generator=random), torch.randint(7, (23,), generator=random)
    ks = (1, 5, 20, 200)  # the last is above the 37 of the bank
    got = knn(bank, labels, queries, truth, ks, temperature)
    for k in ks:
        orders = [slow(bank.tolist(), labels.tolist(), q, k, temperature) for q in queries.tolist()]
        top = {n: [t in order[:n] for t, order in zip(truth.tolist(), orders, strict=True)] for n in (1, 5)}
        recalls = [
            sum(hits := [hit for hit, t in zip(top[1], truth.tolist(), strict=True) if t == c]) / len(hits)
            for c in sorted(set(truth.tolist()))
        ]
        assert got[f"knn_{k}"] == pytest.approx(100 * sum(top[1]) / 23)
        assert got[f"knn_{k}_top5"] == pytest.approx(100 * sum(top[5]) / 23)
        assert got[f"knn_{k}_per_class"] == pytest.approx(100 * sum(recalls) / len(recalls))
    assert temperature < 1 or len({got[f"knn_{k}"] for k in ks}) > 1  # else the test could not tell one k from another


def test_equal_votes_go_to_the_lowest_class() -> None:
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    query = torch.tensor([[2.0, 0.0]])
    for labels in ([1, 0], [0, 1]):
        assert knn(bank, torch.tensor(labels), query, torch.tensor([0]), (2,))["knn_2"] == 100.0
        assert knn(bank, torch.tensor(labels), query, torch.tensor([1]), (2,))["knn_2"] == 0.0


@pytest.mark.parametrize("k", [1, 3, 8, 40, 64])
def test_equal_neighbours_come_in_bank_order(k: int) -> None:
    """Four distinct vectors, sixteen copies of each, interleaved: the edge of the k always falls among equals."""
    bank = torch.eye(4)[torch.arange(64) % 4]
    queries = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    near, where = nearest(queries, bank, k)
    for row, query in enumerate(queries.tolist()):
        order = sorted(range(64), key=lambda i: (-query[i % 4], i))[:k]
        assert where[row].tolist() == order
        assert near[row].tolist() == [query[i % 4] for i in order]


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


def test_labels_of_another_data_set_are_refused() -> None:
    with pytest.raises(ValueError, match=r"label 3.*ends at 1"):
        knn(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 3]))
