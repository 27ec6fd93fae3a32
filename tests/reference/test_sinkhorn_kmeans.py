"""Balanced assignment and spherical k-means against plain loops, and what must hold whatever the
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from kit import plain_losses as plain
from torch import Tensor

from scaletrain.ops.kmeans import spherical_kmeans
from scaletrain.ops.sinkhorn import sinkhorn


def unit_rows(n: int, dim: int, seed: int = 0) -> Tensor:
    rows = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / rows.square().sum(1, keepdim=True).sqrt()


# --- Sinkhorn -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "prototypes"), [(1, 1), (1, 4), (2, 3), (9, 4), (5, 1), (16, 20)]
)
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.03, 1), (0.5, 7)])
def test_assignments_are_those_of_the_plain_loops(
    samples: int, prototypes: int, epsilon: float, iterations: int
) -> None:
    scores = unit_rows(samples, 6) @ unit_rows(prototypes, 6, seed=1).T
    slow = torch.tensor(plain.sinkhorn(scores.tolist(), epsilon, iterations), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(scores, epsilon, iterations), slow, rtol=1e-10, atol=1e-13)
    fast = sinkhorn(scores.float(), epsilon, iterations)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast.double(), slow, rtol=1e-4, atol=1e-6)


def test_samples_have_mass_one_and_prototypes_share_it_evenly_in_the_end() -> None:
    scores = unit_rows(12, 6) @ unit_rows(5, 6, seed=1).T
    few, many = sinkhorn(scores, 0.05, 3), sinkhorn(scores, 0.05, 3000)
    for q in (few, many):
        torch.testing.assert_close(q.sum(1), torch.ones(12, dtype=torch.float64))
        assert q.min() >= 0
    torch.testing.assert_close(many.sum(0), torch.full((5,), 12 / 5, dtype=torch.float64))
    assert (
        few.sum(0) - 12 / 5
    ).abs().max() > 1e-3  # three iterations are not the limit: the code is compared above


def test_a_constant_added_to_all_scores_changes_nothing() -> None:
    scores = unit_rows(8, 6) @ unit_rows(5, 6, seed=1).T
    for constant in (-1e3, 7.0, 1e3):
        torch.testing.assert_close(
            sinkhorn(scores + constant, 0.05), sinkhorn(scores, 0.05), rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("scale", [10.0, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_huge_scores_stay_finite(scale: float, dtype: torch.dtype) -> None:
    """Rows and columns whose every exponential is zero beside the largest one."""
    scores = (scale * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    q = sinkhorn(scores, 0.05)
    assert q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(8, dtype=q.dtype))


def test_equal_scores_are_shared_evenly() -> None:
    torch.testing.assert_close(sinkhorn(torch.full((6, 4), 0.3), 0.05), torch.full((6, 4), 0.25))


# --- k-means --------------------------------------------------------------------------------------


def nearest(row: Sequence[float], centroids: Sequence[Sequence[float]]) -> int:
    similarity = [sum(a * b for a, b in zip(row, c, strict=True)) for c in centroids]
    return similarity.index(max(similarity))


def plain_kmeans(
    rows: list[list[float]], centroids: list[list[float]], iterations: int
) -> tuple[list[list[float]], list[int]]:
    """DeepCluster v2: assign to the most similar centroid, take the normalised mean; empty clusters
    keep theirs.
    """
    present = [any(row) for row in rows]
    for _ in range(iterations):
        members: list[list[list[float]]] = [[] for _ in centroids]
        for row in (r for r, here in zip(rows, present, strict=True) if here):
            members[nearest(row, centroids)].append(row)
        for k, inside in enumerate(members):
            if inside:
                middle = [sum(column) / len(inside) for column in zip(*inside, strict=True)]
                norm = math.sqrt(sum(x * x for x in middle))
                centroids[k] = [x / norm for x in middle]
    return centroids, [
        nearest(row, centroids) if here else -1 for row, here in zip(rows, present, strict=True)
    ]


def seeds(rows: Tensor, clusters: int, key: int) -> Tensor:
    return spherical_kmeans(rows, 0, clusters, 0, key)[0]


@pytest.mark.parametrize(
    ("n", "dim", "clusters", "iterations"),
    [(30, 4, 5, 10), (12, 3, 12, 2), (40, 2, 7, 4), (6, 5, 1, 3)],
)
@pytest.mark.parametrize("absent", [0, 3])
def test_clusters_are_those_of_the_plain_loop(
    n: int, dim: int, clusters: int, iterations: int, absent: int
) -> None:
    rows = unit_rows(n + absent, dim)
    rows[::4][:absent] = 0
    centroids, assigned = spherical_kmeans(rows, 0, clusters, iterations, key=5)
    slow, slow_assigned = plain_kmeans(rows.tolist(), seeds(rows, clusters, 5).tolist(), iterations)
    torch.testing.assert_close(
        centroids, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=1e-14
    )
    assert assigned.tolist() == slow_assigned
    assert (assigned == -1).sum() == absent
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(clusters, dtype=torch.float64))


def test_seeds_are_distinct_samples_that_depend_on_the_key() -> None:
    rows = unit_rows(50, 4)
    rows[10:20] = 0
    chosen = {}
    for key in range(20):
        found = (seeds(rows, 8, key)[:, None] == rows[None]).all(2).nonzero()[:, 1].tolist()
        assert len(found) == len(set(found)) == 8
        assert not set(found) & set(range(10, 20))
        chosen[key] = tuple(found)
    assert len(set(chosen.values())) == 20
    assert set().union(*chosen.values()) == set(range(50)) - set(range(10, 20))
    assert torch.equal(seeds(rows, 8, 3), seeds(rows, 8, 3))


def test_an_empty_cluster_keeps_its_centroid() -> None:
    """Two copies of one sample as seeds: the first takes all, the second stays where it was."""
    rows = torch.tensor(
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]], dtype=torch.float64
    )
    for key in range(200):
        start = seeds(rows, 3, key)
        copies = (start == rows[0]).all(1).nonzero()[:, 0].tolist()
        if len(copies) == 2 and (start == rows[2]).all(1).any():
            break
    assert copies[1] not in spherical_kmeans(rows, 0, 3, 0, key)[1].tolist()
    centroids, _ = spherical_kmeans(rows, 0, 3, 1, key)
    assert torch.equal(centroids[copies[1]], rows[0])
    assert not torch.equal(centroids[copies[0]], rows[0])


def test_the_start_index_names_the_samples_and_too_few_of_them_are_refused() -> None:
    rows = unit_rows(12, 3)
    shifted = spherical_kmeans(rows, 1000, 4, 0, key=1)[0]
    assert not torch.equal(shifted, seeds(rows, 4, 1))
    rows[2:] = 0
    with pytest.raises(
        ValueError, match=r"k-means into 3 clusters needs as many samples; only 2 have an embedding"
    ):
        spherical_kmeans(rows, 0, 3, 1, key=1)
