"""PIRL and PCL against loops over samples, memories and prototypes: loss, gradient, memory,
clustering and concentration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from kit import plain_losses as plain
from kit.plain_losses import Rows
from kit.tiny import CLOCK, agrees, commit, encode, make, make_batch, repeated
from test_losses_keys import in_bfloat16, nce
from torch import Tensor

from scaletrain import rng
from scaletrain.core import Batch, Clock
from scaletrain.ops.kmeans import kmeans

SAMPLES = 40  # of tiny.make

# --- PIRL -----------------------------------------------------------------------------------------

VIEWS = ((12, 1), (4, 1))  # (pixels, count): nine patches of 4 x 4, and the image


def noise_contrast(x: Rows, m: Rows, negatives: Rows, temperature: float, z: float) -> Tensor:
    """PIRL, eq. 4, with P = exp(s / T) / Z and h = P / (P + n / N)."""
    share = len(negatives) / SAMPLES

    def h(a: Tensor, b: Tensor) -> Tensor:
        p = torch.exp((plain.unit(a) * b).sum() / temperature) / z
        return p / (p + share)

    losses = [
        -torch.log(h(a, b)) - sum(torch.log(1 - h(a, other)) for other in negatives)
        for a, b in zip(x, m, strict=True)
    ]
    return plain.mean(losses)


def normaliser(x: Rows, m: Rows, negatives: Rows, temperature: float) -> float:
    rows = [
        torch.exp((plain.unit(a) * other).sum() / temperature)
        for a, b in zip(x, m, strict=True)
        for other in (b, *negatives)
    ]
    return SAMPLES * plain.mean(rows).item()


def embeddings(model: Any, batch: Batch) -> tuple[Rows, Rows]:
    """Of the image and of the patches that the encoder has just seen, in the order that the keys
    give.
    """
    image = plain.head(model.projector, encode(model.backbone, batch.views[1:])[0])
    patches = model.backbone.seen[-1].unflatten(0, (9, len(batch)))
    order = rng.uniform(batch.keys, "jigsaw", 9).argsort(dim=1).tolist()
    joined = []
    for n, places in enumerate(order):
        assert sorted(places) == list(range(9))
        parts = plain.head(
            model.patch_projector, [h[n] for h in encode(model.backbone, (patches[places],))]
        )
        joined.append(model.join.weight @ torch.cat(parts) + model.join.bias)
    return image, joined


@pytest.mark.parametrize(
    ("rows", "hidden", "negatives", "temperature", "share"),
    [(2, 0, 1, 0.07, 0.5), (3, 6, 5, 0.1, 0.3), (4, 0, 9, 1.0, 1.0)],
)
@pytest.mark.parametrize("loss", ["nce", "infonce"])
def test_pirl(
    rows: int, hidden: int, negatives: int, temperature: float, share: float, loss: str
) -> None:
    options = {
        "hidden": hidden,
        "dim": 4,
        "patch": 4,
        "momentum": 0.3,
        "jigsaw": share,
        "temperature": temperature,
    }
    model = make("pirl", rows, VIEWS, negatives=negatives, loss=loss, **options)
    memory, z = list(model.bank.rows.clone()), None
    assert [row.norm().item() for row in memory] == pytest.approx([1] * SAMPLES)
    for step in range(3):
        clock, batch = Clock(step, 10, 0, 10), make_batch(rows, VIEWS, seed=3 * step)
        batch = repeated(batch) if step == 2 else batch
        fast = model(batch, clock).losses["all"]
        image, patches = embeddings(model, batch)
        m, others = (
            [memory[i] for i in batch.index],
            [memory[i] for i in model._drawn(clock, batch.index)],
        )
        if loss == "nce":
            z = z or normaliser(
                patches, m, others, temperature
            )  # of the first step, from the patches
            parts = [noise_contrast(x, m, others, temperature, z) for x in (patches, image)]
        else:
            parts = [nce(x, m, others, temperature) for x in (patches, image)]
        agrees(model, fast, share * parts[0] + (1 - share) * parts[1])
        commit(model)
        for i, v in zip(batch.index.tolist(), image, strict=True):
            memory[i] = plain.unit(0.3 * memory[i] + 0.7 * plain.unit(v)).detach()
        torch.testing.assert_close(model.bank.rows, torch.stack(memory), rtol=1e-12, atol=1e-14)


def test_pirl_is_exact_although_heads_compute_in_bfloat16() -> None:
    model = make("pirl", 6, VIEWS, dim=4, patch=4, negatives=5, loss="infonce", momentum=0.0)
    batch = make_batch(6, VIEWS)
    rows = model.bank.rows.float().double()
    m, others = list(rows[batch.index]), list(rows[model._drawn(CLOCK, batch.index)])
    loss, parts = in_bfloat16(model, batch, ("join", "projector"))
    assert loss.item() == pytest.approx(
        plain.mean(nce(list(x), m, others, 0.07) for x in parts).item(), rel=2e-5
    )
    commit(model)
    torch.testing.assert_close(model.bank.rows.norm(dim=1), torch.ones(SAMPLES), rtol=1e-6, atol=0)


def test_pirl_cuts_a_square_out_of_each_cell() -> None:
    rows, side, patch = 300, 20, 4  # cells of 6, so that a patch has nine places
    model = make("pirl", rows, ((side, 1), (4, 1)), dim=4, patch=patch)
    place = (
        torch.arange(side * side, dtype=torch.float64)
        .view(1, 1, side, side)
        .expand(rows, 3, -1, -1)
    )
    patches = model._patches(place, torch.arange(rows))
    assert patches.shape == (9, rows, 3, patch, patch)
    corners = set()
    for cell, n in itertools.product(range(9), range(rows)):
        top, left = divmod(int(patches[cell, n, 0, 0, 0]), side)
        corners.add((cell, top - 6 * (cell // 3), left - 6 * (cell % 3)))
        assert torch.equal(patches[cell, n, 1], place[0, 0, top : top + patch, left : left + patch])
    assert corners == set(itertools.product(range(9), range(3), range(3)))


def test_pirl_draws_negatives_evenly_and_anew_in_each_step() -> None:
    model = make("pirl", 2, VIEWS, dim=4, patch=4, negatives=4000)
    drawn = [model._drawn(Clock(step, 10, 0, 10), torch.zeros(2)) for step in range(3)]
    count = torch.bincount(torch.cat(drawn), minlength=SAMPLES).tolist()
    assert len(count) == SAMPLES
    assert count == pytest.approx([300] * SAMPLES, rel=0.25)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("views", "patch", "message"),
    [(((12, 2), (4, 1)), 4, "takes two views"), (((12, 1), (4, 1)), 5, "ninth .* 4 pixels wide")],
)
def test_pirl_refuses_views_that_do_not_fit(
    views: tuple[tuple[int, int], ...], patch: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make("pirl", 2, views, patch=patch)


# --- PCL ------------------------------------------------------------------------------------------


def proto_nce(
    q: Rows, own: Sequence[int], prototypes: Tensor, phi: Tensor, drawn: Sequence[int]
) -> Tensor:
    """PCL, eq. 11's second term as in the authors' code: the prototypes of all samples of the
    batch, and drawn ones.
    """
    columns = [i for i in own if i >= 0]
    losses = []
    for n, i in enumerate(own):
        if i >= 0:
            others = [j for m, j in enumerate(own) if m != n and j >= 0]
            logits = [
                (plain.unit(q[n]) * prototypes[j]).sum() / phi[j] for j in (i, *others, *drawn)
            ]
            losses.append(-plain.log_softmax(logits)[0])
    assert len(losses) == len(columns)
    return plain.mean(losses)


def make_pcl(rows: int, clusters: tuple[int, ...], **options: Any) -> Any:
    model = make("pcl", rows, hidden=6, dim=4, queue=5, clusters=clusters, **options)
    draw = torch.Generator().manual_seed(1)
    for m, k in enumerate(clusters):
        unit = torch.nn.functional.normalize(
            torch.randn(k, 4, generator=draw, dtype=torch.float64), dim=1
        )
        model.get_buffer(f"prototypes{m}").copy_(unit)
        model.get_buffer(f"concentration{m}").copy_(0.1 + torch.rand(k, generator=draw))
    return model


@pytest.mark.parametrize(
    ("labels", "clusters", "warmup"),
    [
        ([[0, 1, 1]], (3,), 0),  # two samples of one prototype
        ([[2, -1, 4, 0], [1, 1, 1, 1]], (6, 2), 0),  # a sample that no pass has embedded
        ([[0, 0]], (1,), 0),  # a single prototype
        ([[-1, -1]], (3,), 0),
        ([[0, 1, 1]], (3,), 1),  # before the clustering
    ],
)
def test_pcl(labels: list[list[int]], clusters: tuple[int, ...], warmup: int) -> None:
    rows = len(labels[0])
    model, batch = make_pcl(rows, clusters, negatives=100, warmup_epochs=warmup), make_batch(rows)
    model.assignments.write(batch.index, torch.tensor(labels).T)
    q = plain.head(model.projector, encode(model.backbone, batch.views)[0])
    k = plain.head(model.target_projector, encode(model.target_backbone, batch.views)[1])
    slow = nce(q, k, list(model.queue.rows), 0.2)
    if not warmup:
        heads = []
        for m, own in enumerate(labels):
            rest = [i for i in range(clusters[m]) if i not in own]
            heads.append(
                proto_nce(
                    q,
                    own,
                    model.get_buffer(f"prototypes{m}"),
                    model.get_buffer(f"concentration{m}"),
                    rest,
                )
            )
        slow = slow + plain.mean(heads)
    agrees(model, model(batch, CLOCK).losses["all"], slow)


def test_pcl_is_exact_although_heads_compute_in_bfloat16() -> None:
    model, batch, own = make_pcl(4, (5,), negatives=9, warmup_epochs=0), make_batch(4), [0, 3, 3, 1]
    model.assignments.write(batch.index, torch.tensor(own)[:, None])
    queue = list(model.queue.rows.float().double())
    loss, (q, k) = in_bfloat16(model, batch, ("projector", "target_projector"))
    prototypes, phi = (
        model.get_buffer(f"{name}0").double() for name in ("prototypes", "concentration")
    )
    slow = nce(list(q), list(k), queue, 0.2) + proto_nce(list(q), own, prototypes, phi, [2, 4])
    assert loss.item() == pytest.approx(slow.item(), rel=2e-5)


def test_pcl_draws_other_prototypes_for_each_step() -> None:
    """With one of three spare prototypes: each is drawn at some step."""
    model, batch = make_pcl(3, (5,), negatives=1, warmup_epochs=0), make_batch(3)
    model.assignments.write(batch.index, torch.tensor([[0], [3], [3]]))
    prototypes, phi = model.get_buffer("prototypes0"), model.get_buffer("concentration0")
    q = plain.head(model.projector, encode(model.backbone, batch.views)[0])
    possible = [proto_nce(q, [0, 3, 3], prototypes, phi, [i]).item() for i in (1, 2, 4)]
    found = set()
    for step in range(12):
        loss = model(batch, Clock(step, 20, 0, 10)).scalars["prototype_loss"].item()
        found.add(min(range(3), key=lambda i: abs(possible[i] - loss)))
        assert min(abs(p - loss) for p in possible) < 1e-12
    assert found == {0, 1, 2}


def test_pcl_clusters_the_momentum_embeddings() -> None:
    """One pass over all samples but two; centroids, concentration and assignments by hand from what
    the pass gave.
    """
    model = make(
        "pcl",
        4,
        hidden=6,
        dim=4,
        queue=5,
        clusters=(3, 7),
        iterations=50,
        temperature=0.3,
        warmup_epochs=2,
    )
    batches = [make_batch(2, seed=2 * i) for i in range(SAMPLES // 2 - 1)]

    def features(embed: Any, every: bool) -> Iterator[tuple[Tensor, Tensor]]:
        assert not every
        for batch in batches:
            with torch.no_grad():
                yield batch.index, embed(batch)

    model.on_epoch(Clock(10, 100, 1, 10), features, lambda *_: None)
    assert not model.get_buffer("prototypes0").any()
    model.on_epoch(Clock(20, 100, 2, 10), features, lambda *_: None)
    z = [
        plain.unit(plain.head(model.target_projector, [h])[0])
        for b in batches
        for h in encode(model.target_backbone, b.views)[0]
    ]
    for m, clusters in enumerate((3, 7)):
        labels = model.assignments.rows[:, m].tolist()
        assert labels[-2:] == [-1, -1]
        members = [
            [x.detach() for x, label in zip(z, labels, strict=False) if label == i]
            for i in range(clusters)
        ]
        middles = [plain.mean(rows) for rows in members]
        prototypes = torch.stack([plain.unit(c) for c in middles])
        torch.testing.assert_close(
            model.get_buffer(f"prototypes{m}"), prototypes, rtol=1e-9, atol=1e-9
        )
        phi: list[float] = []
        for rows, middle in zip(members, middles, strict=True):
            spread = plain.mean([(x - middle).norm() for x in rows]).item() / math.log(
                len(rows) + 10
            )
            phi.append(spread if len(rows) > 1 else -1)
        phi = [max(phi) if x < 0 else x for x in phi]
        clipped = np.clip(phi, np.percentile(phi, 10), np.percentile(phi, 90))
        expected = 0.3 * clipped / clipped.mean()
        assert model.get_buffer(f"concentration{m}").tolist() == pytest.approx(
            expected.tolist(), rel=1e-9
        )
        largest, empty = (
            max(map(len, members)) / len(z),
            sum(not rows for rows in members) / clusters,
        )
        assert (
            model.assignments.largest[m].item(),
            model.assignments.empty[m].item(),
        ) == pytest.approx((largest, empty))


def test_pcl_refuses_more_clusters_than_samples_at_once() -> None:
    with pytest.raises(ValueError, match=r"method\.clusters=41 is more than the 40 samples"):
        make("pcl", 4, clusters=(3, 41))


def test_pcl_of_equal_embeddings_stays_finite() -> None:
    model = make("pcl", 4, hidden=6, dim=4, queue=5, clusters=(3,), warmup_epochs=0)
    batch = repeated(make_batch(4))
    model.on_epoch(
        CLOCK, lambda embed, every: iter([(batch.index, embed(batch).detach())]), lambda *_: None
    )
    loss = model(batch, CLOCK).losses["all"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.projector.parameters())


def test_plain_kmeans_reaches_a_fixed_point_of_means_and_nearest_centroids() -> None:
    draw = torch.Generator().manual_seed(2)
    rows = torch.randn(60, 3, generator=draw, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.2])
    rows[17] = 0  # absent
    centroids, assigned = kmeans(rows, 0, 5, 60, key=1)
    assert assigned[17] == -1
    for n, row in enumerate(rows):
        if n != 17:
            distances = [(row - c).norm().item() for c in centroids]
            assert distances.index(min(distances)) == assigned[n]
    for i, c in enumerate(centroids):
        torch.testing.assert_close(c, rows[assigned == i].mean(0))
