"""DeepCluster: the weighed loss and its gradient, whitening, splitting, agreement of clusterings,
each epoch's classifier.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kit import plain_losses as plain
from kit.tiny import CLOCK, LARGE, MULTI, agrees, encode, make, make_batch
from torch import Tensor

from scaletrain.core import Batch, Clock
from scaletrain.methods.deepcluster import _whitened
from scaletrain.nn.clusters import nmi
from scaletrain.ops.kmeans import kmeans

OPTIONS: dict[str, Any] = {"classes": 4, "whiten": 3, "iterations": 3}
SIZES = [10.0, 1.0, 0.0, 5.0]


def labelled(model: Any, batch: Batch, labels: list[int]) -> None:
    model.assignments.write(batch.index, torch.tensor(labels)[:, None])
    model.sizes.copy_(torch.tensor(SIZES))


def plain_loss(model: Any, h: plain.Views, labels: list[int]) -> Tensor:
    """Cross entropy, each sample weighed by (samples / non-empty clusters) / (size of its cluster);
    mean over all.
    """
    losses = []
    for view in h:
        for x, label in zip(view, labels, strict=True):
            log_p = plain.log_softmax(list(model.classifier.weight @ x + model.classifier.bias))
            losses.append(-log_p[label] * 16 / 3 / SIZES[label] if label >= 0 else 0 * log_p[0])
    return plain.mean(losses)


@pytest.mark.parametrize("views", [LARGE, MULTI, ((4, 1),)])
@pytest.mark.parametrize("labels", [[0, 3], [0, 0, 1, 3, -1], [-1, -1], [1, 1, 1]])
def test_loss(views: tuple[tuple[int, int], ...], labels: list[int]) -> None:
    model, batch = (
        make("deepcluster", len(labels), views, **OPTIONS),
        make_batch(len(labels), views),
    )
    labelled(model, batch, labels)
    agrees(
        model,
        model(batch, CLOCK).losses["all"],
        plain_loss(model, encode(model.backbone, batch.views), labels),
    )


def test_one_cluster_has_nothing_to_tell() -> None:
    model, batch = make("deepcluster", 3, classes=1, whiten=3), make_batch(3)
    model.assignments.write(batch.index, torch.zeros(3, 1, dtype=torch.int64))
    model.sizes.fill_(40)
    assert model(batch, CLOCK).losses["all"].item() == 0


def test_weights_make_every_cluster_count_alike() -> None:
    """Over the whole data set each cluster's samples weigh as much together as any other's."""
    model = make("deepcluster", 16, **OPTIONS)
    labels = [0] * 10 + [1] + [3] * 5
    batch = make_batch(16)
    labelled(model, batch, labels)
    even = torch.zeros(2, 16, 4, dtype=torch.float64)  # ln 4 for each sample
    assert model._loss(even, torch.tensor(labels))[0].item() == pytest.approx(math.log(4))
    for label in (0, 1, 3):
        other = even.clone()
        other[:, [n for n, y in enumerate(labels) if y == label], label] = (
            1e3  # found with certainty
        )
        assert model._loss(other, torch.tensor(labels))[0].item() == pytest.approx(
            math.log(4) * 2 / 3
        )


def test_whitened_rows_have_unit_length_and_even_variance() -> None:
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(4000, 5, generator=draw, dtype=torch.float64) @ torch.randn(
        5, 5, generator=draw, dtype=torch.float64
    )
    rows = mixed + 7
    rows[::50] = 0  # absent
    white = _whitened(rows, 3)
    assert white.shape == (4000, 3)
    assert torch.equal(white[::50], torch.zeros(80, 3, dtype=torch.float64))
    here = white[rows.abs().sum(1) > 0]
    torch.testing.assert_close(here.norm(dim=1), torch.ones(len(here), dtype=torch.float64))
    # Unit directions of a round Gaussian: no mean, a third of the variance along each axis.
    torch.testing.assert_close(
        here.T @ here / len(here), torch.eye(3).double() / 3, rtol=0, atol=0.03
    )
    assert here.mean(0).abs().max() < 0.05
    present = rows[rows.abs().sum(1) > 0]
    _, deviations, axes = torch.linalg.svd(present - present.mean(0), full_matrices=False)
    expected = plain.unit(((rows[1] - present.mean(0)) @ axes[:3].T / deviations[:3]).abs())
    torch.testing.assert_close(white[1].flip(0).abs(), expected, rtol=1e-9, atol=1e-11)
    two = _whitened(rows[1:3].float(), 3)  # differ in one direction only; rounding is none
    torch.testing.assert_close(two.abs(), torch.tensor([[0.0, 0.0, 1.0]] * 2))


def test_empty_clusters_take_half_of_large_ones() -> None:
    """Six equal seeds leave clusters empty, although there are four different points; splitting
    finds them all.
    """
    rows = torch.ones(40, 2, dtype=torch.float64)
    rows[:3] += torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.4, 0.4]])
    key = next(k for k in range(100) if len(kmeans(rows, 0, 6, 0, k)[0].unique(dim=0)) == 1)
    filled = [
        kmeans(rows, 0, 6, n, key, split=split)[1].unique().numel()
        for n, split in ((6, False), (6, True))
    ]
    assert filled == [2, 4]
    centroids = kmeans(rows, 0, 6, 1, key, split=True)[0]
    pair = centroids[(centroids - rows.mean(0)).abs().amax(1) < 1e-2]
    assert len(pair) == 2
    assert ((pair[0] / pair[1] - 1).abs() - 2**-9).abs().max() < 1e-5


def plain_nmi(a: list[int], b: list[int]) -> float:
    both = [(x, y) for x, y in zip(a, b, strict=True) if x >= 0 and y >= 0]
    n = len(both)

    def entropy(labels: list[Any]) -> float:
        return -sum(labels.count(x) / n * math.log(labels.count(x) / n) for x in set(labels))

    h1, h2 = entropy([x for x, _ in both]), entropy([y for _, y in both])
    return (h1 + h2 - entropy(both)) / math.sqrt(h1 * h2)


def test_nmi() -> None:
    a, b = [0, 0, 1, 1, 2, -1, 2, 3], [1, 1, 0, 0, 0, 2, 3, -1]
    assert nmi(torch.tensor(a), torch.tensor(b), 8, 4).item() == pytest.approx(plain_nmi(a, b))
    assert nmi(
        torch.tensor(a), torch.tensor([(x + 1) % 4 if x >= 0 else -1 for x in a]), 9, 4
    ).item() == pytest.approx(1)
    assert nmi(torch.tensor([-1, -1]), torch.tensor([0, 1]), 2, 4).item() == 0


def test_an_epoch_finds_the_groups_of_the_features() -> None:
    model = make("deepcluster", 4, classes=3, whiten=2, iterations=5)
    groups = torch.arange(40) % 3
    points = (
        torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[groups]
        * 5
    )
    points += 0.01 * torch.randn(
        40, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )

    def features(_: Any, **__: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.arange(38).split(4):  # the last two samples are never seen
            yield rows, points[rows]

    written: list[dict[str, Tensor]] = []
    for epoch in (0, 1, 0):
        written.append({})
        model.on_epoch(Clock(10 * epoch, 20, epoch, 10), features, written[-1].__setitem__)
    found = model.assignments.rows[:, 0]
    assert found[38:].tolist() == [-1, -1]
    assert plain_nmi(found[:38].tolist(), groups[:38].tolist()) == pytest.approx(1)
    assert sorted(model.sizes.tolist()) == sorted(torch.bincount(groups[:38]).tolist())
    assert model.assignments.nmi.item() == pytest.approx(1)  # each epoch finds the same
    # Their numbers mean nothing in the next epoch, which begins with a new classifier.
    for values in written:
        assert {name: tuple(v.shape) for name, v in values.items()} == {
            "classifier.weight": (3, 5),
            "classifier.bias": (3,),
        }
        assert values["classifier.weight"].std().item() == pytest.approx(0.01, rel=0.5)
        assert not values["classifier.bias"].any()
    assert torch.equal(written[0]["classifier.weight"], written[2]["classifier.weight"])
    assert not torch.equal(written[0]["classifier.weight"], written[1]["classifier.weight"])


def test_more_components_than_features_or_clusters_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.whiten=6 is more than the 5 features"):
        make("deepcluster", 4, whiten=6)
    with pytest.raises(ValueError, match=r"method\.classes=41 is more than the 40 samples"):
        make("deepcluster", 4, whiten=3, classes=41)


def test_the_loss_is_exact_although_the_classifier_computes_in_bfloat16() -> None:
    model, batch = make("deepcluster", 5, **OPTIONS).float(), make_batch(5)
    batch = Batch(
        tuple(v.float() for v in batch.views), batch.index, batch.keys, batch.pixel_range.float()
    )
    labels = [0, 0, 1, 3, -1]
    labelled(model, batch, labels)
    found: list[Tensor] = []
    model.classifier.register_forward_hook(lambda _m, _i, out: found.append(out.detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch, CLOCK).losses["all"]
    assert (found[0].dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    weights = [16 / 3 / SIZES[y] if y >= 0 else 0.0 for y in labels]
    rows = [
        (z.double(), y, w)
        for view in found[0]
        for z, y, w in zip(view, labels, weights, strict=True)
    ]
    exact = plain.mean(-plain.log_softmax(list(z))[y] * w for z, y, w in rows)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-5)
