"""MoCo, DenseCL and NNCLR against loops over samples and queue rows: loss, gradient, and the queue
that each step leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from kit import plain_losses as plain
from kit import tiny
from kit.plain_losses import Rows
from kit.tiny import CLOCK, agrees, commit, encode, make, make_batch, repeated
from torch import Tensor, nn

from scaletrain.core import Batch
from scaletrain.ops.contrastive import key_contrast

# --- the formulas ---------------------------------------------------------------------------------


def nce(q: Rows, k: Rows, queue: Rows, temperature: float) -> Tensor:
    """MoCo, eq. 1."""
    losses = []
    for query, key in zip(q, k, strict=True):
        others = [(plain.unit(query) * row).sum() for row in queue]
        losses.append(
            -plain.log_softmax(
                [s / temperature for s in (plain.cos(query, key.detach()), *others)]
            )[0]
        )
    return plain.mean(losses)


def pushed(queue: Sequence[Tensor], rows: Rows, written: int) -> list[Tensor]:
    """A ring: each new row takes the oldest place."""
    result = list(queue)
    for i, row in enumerate(rows):
        result[(written + i) % len(result)] = plain.unit(row).detach()
    return result


def closest(x: Tensor, rows: Rows) -> int:
    similarity = [plain.cos(x, row).item() for row in rows]
    return similarity.index(max(similarity))


# --- MoCo -----------------------------------------------------------------------------------------


def plain_moco(
    model: Any, batch: Batch, queues: Sequence[Rows]
) -> tuple[Tensor, list[list[Tensor]]]:
    """The loss, and the keys of each direction."""
    q = [plain.head(model.projector, h) for h in encode(model.backbone, batch.views)]
    k = [plain.head(model.target_projector, h) for h in encode(model.target_backbone, batch.views)]
    sides = [(q[0], k[1]), (q[1], k[0])][: len(queues)]
    losses = [
        nce(*side, queue, model.config.temperature)
        for side, queue in zip(sides, queues, strict=True)
    ]
    return plain.mean(losses), [keys for _, keys in sides]


@pytest.mark.parametrize(
    ("rows", "hidden", "dim", "queue", "temperature"),
    [(2, 0, 3, 1, 0.07), (3, 6, 4, 7, 0.2), (5, 6, 1, 4, 1.0), (6, 0, 4, 6, 0.1)],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_moco(
    rows: int, hidden: int, dim: int, queue: int, temperature: float, symmetric: bool
) -> None:
    """Three steps, so that the queue of before each step is used and its places are taken
    in turn.
    """
    model = make(
        "moco",
        rows,
        hidden=hidden,
        dim=dim,
        queue=queue,
        temperature=temperature,
        symmetric=symmetric,
    )
    queues = [list(q.rows.clone()) for q in model.queues]
    assert all(row.norm().item() == pytest.approx(1) for rows in queues for row in rows)
    with torch.no_grad():
        next(model.target_backbone.parameters()).mul_(-0.7)  # no longer a copy
    for step in range(3):
        batch = make_batch(rows, seed=10 * step)
        batch = repeated(batch) if step == 1 else batch
        slow, keys = plain_moco(model, batch, queues)
        agrees(model, model(batch, CLOCK).losses["all"], slow)
        commit(model)
        queues = [pushed(q, k, step * rows) for q, k in zip(queues, keys, strict=True)]
        for kept, expected in zip(model.queues, queues, strict=True):
            torch.testing.assert_close(kept.rows, torch.stack(expected), rtol=1e-12, atol=1e-14)


def test_moco_of_equal_directions_is_the_logarithm_of_the_candidates() -> None:
    ones = torch.ones(4, 3, dtype=torch.float64)
    loss, shown = key_contrast(ones, ones, ones[:2] / math.sqrt(3), 0.1)
    assert loss.item() == pytest.approx(math.log(3))
    assert shown["positive_similarity"].item() == pytest.approx(1)
    assert shown["negative_similarity"].item() == pytest.approx(1)


def test_moco_says_how_alike_keys_and_negatives_are() -> None:
    q, k, negatives = (
        torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        for n in (5, 5, 4)
    )
    negatives = torch.nn.functional.normalize(negatives, dim=1)
    k[3] = q[3]  # at least one hit
    shown = key_contrast(q, k, negatives, 0.2)[1]
    own, others = (
        [plain.cos(a, b) for a, b in zip(q, k, strict=True)],
        [[plain.cos(a, b) for b in negatives] for a in q],
    )
    assert shown["positive_similarity"].item() == pytest.approx(plain.mean(own).item())
    assert shown["negative_similarity"].item() == pytest.approx(
        plain.mean(map(plain.mean, others)).item()
    )
    assert shown["contrast_accuracy"].item() == pytest.approx(
        sum(a > max(b) for a, b in zip(own, others, strict=True)) / 5
    )


def test_momentum_encoders_start_as_copies() -> None:
    for name, options in (("moco", {}), ("pcl", {"clusters": (3,)})):
        model = make(name, 4, hidden=6, dim=4, queue=5, **options)
        for target, online in model.targets.items():
            pairs = zip(
                model.get_submodule(target).parameters(),
                model.get_submodule(online).parameters(),
                strict=True,
            )
            # `make` moves biases off their special values
            assert all(torch.equal(a, b) for a, b in pairs if a.dim() > 1)


# --- DenseCL --------------------------------------------------------------------------------------


class Mapped(tiny.Tiny):
    """A linear encoder of single pixels, 2 x 2 cells."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.pool = nn.Linear(3, 5, bias=False), True

    def forward(self, x: Tensor) -> Tensor:
        cells = self.dense(x[..., :2, :2].movedim(1, -1)).movedim(-1, 1)
        return cells.mean((2, 3)) if self.pool else cells


def cells(backbone: Any, view: Tensor) -> list[list[Tensor]]:
    return [[backbone.dense.weight @ x[:, i, j] for i in range(2) for j in range(2)] for x in view]


def plain_densecl(
    model: Any, batch: Batch, queue: Rows, dense_queue: Rows
) -> tuple[Tensor, Rows, Rows]:
    config, (first, second) = model.config, batch.views[0]
    f, g = cells(model.backbone, first), cells(model.target_backbone, second)
    q, k = (
        plain.head(model.projector, [plain.mean(x) for x in f]),
        plain.head(model.target_projector, [plain.mean(x) for x in g]),
    )
    dense_q = [plain.head(model.dense_projector, x) for x in f]
    dense_k = [plain.head(model.target_dense_projector, x) for x in g]
    same = [[closest(cell, theirs) for cell in own] for own, theirs in zip(f, g, strict=True)]
    pairs = [
        (dense_q[n][s], dense_k[n][t]) for n, row in enumerate(same) for s, t in enumerate(row)
    ]
    whole = nce(q, k, queue, config.temperature)
    dense = nce([a for a, _ in pairs], [b for _, b in pairs], dense_queue, config.temperature)
    return (1 - config.dense) * whole + config.dense * dense, k, [plain.mean(x) for x in dense_k]


@pytest.mark.parametrize(
    ("rows", "queue", "temperature", "dense"),
    [(2, 1, 0.2, 0.5), (3, 7, 0.07, 0.3), (4, 5, 1.0, 1.0)],
)
def test_densecl(rows: int, queue: int, temperature: float, dense: float) -> None:
    with mock.patch.object(tiny, "Tiny", Mapped):
        model = make(
            "densecl", rows, hidden=6, dim=4, queue=queue, temperature=temperature, dense=dense
        )
    with torch.no_grad():
        model.target_backbone.dense.weight.mul_(-0.7)  # no longer a copy
    first, second = list(model.queue.rows.clone()), list(model.dense_queue.rows.clone())
    for step in range(2):
        batch = make_batch(rows, seed=10 * step)
        slow, k, pooled = plain_densecl(model, batch, first, second)
        agrees(model, model(batch, CLOCK).losses["all"], slow)
        commit(model)
        first, second = pushed(first, k, step * rows), pushed(second, pooled, step * rows)
        for kept, expected in ((model.queue, first), (model.dense_queue, second)):
            torch.testing.assert_close(kept.rows, torch.stack(expected), rtol=1e-12, atol=1e-14)


def test_densecl_needs_a_feature_map() -> None:
    with pytest.raises(ValueError, match="feature map before pooling"):
        make("densecl", 4)


# --- NNCLR ----------------------------------------------------------------------------------------


def plain_nnclr(model: Any, batch: Batch, queue: Rows) -> tuple[Tensor, Rows]:
    z = [plain.head(model.projector, h) for h in encode(model.backbone, batch.views)]
    p = [plain.head(model.predictor, x) for x in z]
    losses = []
    for view, other in ((0, 1), (1, 0)):
        for n, x in enumerate(z[view]):
            neighbour = queue[closest(x, queue)]
            logits = [
                (neighbour * plain.unit(y)).sum() / model.config.temperature for y in p[other]
            ]
            losses.append(-plain.log_softmax(logits)[n])
    return plain.mean(losses), z[0]


@pytest.mark.parametrize(
    ("rows", "dim", "queue", "temperature"), [(2, 3, 1, 0.1), (3, 4, 7, 0.07), (5, 2, 4, 1.0)]
)
def test_nnclr(rows: int, dim: int, queue: int, temperature: float) -> None:
    model = make(
        "nnclr", rows, hidden=6, dim=dim, predictor=5, queue=queue, temperature=temperature
    )
    kept = list(model.queue.rows.clone())
    for step in range(3):
        batch = make_batch(rows, seed=10 * step)
        slow, z = plain_nnclr(model, batch, kept)
        out = model(batch, CLOCK)
        agrees(model, out.losses["all"], slow)
        commit(model)
        kept = pushed(kept, z, step * rows)
        torch.testing.assert_close(model.queue.rows, torch.stack(kept), rtol=1e-12, atol=1e-14)


def test_nnclr_of_equal_samples_is_the_logarithm_of_the_batch() -> None:
    model = make("nnclr", 4, hidden=6, dim=4, predictor=5, queue=3)
    assert model(repeated(make_batch(4)), CLOCK).losses["all"].item() == pytest.approx(math.log(4))


# --- layers and precision -------------------------------------------------------------------------


def test_heads_have_the_papers_layers() -> None:
    from test_losses import describe

    def layers(name: str, head: str, **options: Any) -> str:
        return " ".join(map(describe, make(name, 8, dim=4, **options).get_submodule(head)))

    assert layers("moco", "projector", hidden=0) == "5>4+bias"
    assert layers("moco", "target_projector", hidden=6) == "5>6+bias relu 6>4+bias"
    assert (
        layers("nnclr", "predictor", hidden=6, predictor=7)
        == "4>7+bias norm(scale,shift) relu 7>4+bias"
    )
    norm = "norm(scale,shift)"
    assert (
        layers("nnclr", "projector", hidden=6)
        == f"5>6+bias {norm} relu 6>6+bias {norm} relu 6>4+bias {norm}"
    )


def in_bfloat16(model: Any, batch: Batch, heads: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """The loss, and what the heads put out on the way, in float64."""
    found: dict[str, Tensor] = {}
    for head in heads:
        model.get_submodule(head).register_forward_hook(
            lambda _m, _i, out, head=head: found.update({head: out.detach()})
        )
    batch = Batch(
        tuple(v.float() for v in batch.views), batch.index, batch.keys, batch.pixel_range.float()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.float()(batch, CLOCK).losses["all"]
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    return loss, [found[head].double() for head in heads]


def test_moco_is_exact_although_heads_compute_in_bfloat16() -> None:
    model = make("moco", 6, hidden=6, dim=4, queue=8)
    queue = list(model.queues[0].rows.float().double())
    loss, (q, k) = in_bfloat16(model, make_batch(6), ("projector", "target_projector"))
    assert loss.item() == pytest.approx(nce(list(q), list(k), queue, 0.2).item(), rel=2e-5)
    commit(model)
    torch.testing.assert_close(
        model.queues[0].rows[:6].norm(dim=1), torch.ones(6), rtol=1e-6, atol=0
    )


def test_nnclr_is_exact_although_heads_compute_in_bfloat16() -> None:
    model = make("nnclr", 6, hidden=6, dim=4, predictor=5, queue=8)
    queue = list(model.queue.rows.float().double())
    loss, found = in_bfloat16(model, make_batch(6), ("projector", "predictor"))
    z, p = (x.unflatten(0, (2, 6)) for x in found)
    losses = []
    for view in range(2):
        logits = [
            [(queue[closest(x, queue)] * plain.unit(y)).sum() / 0.1 for y in p[1 - view]]
            for x in z[view]
        ]
        losses += [-plain.log_softmax(row)[n] for n, row in enumerate(logits)]
    assert loss.item() == pytest.approx(plain.mean(losses).item(), rel=2e-5)


def test_densecl_keeps_unit_rows_although_heads_compute_in_bfloat16() -> None:
    with mock.patch.object(tiny, "Tiny", Mapped):
        model = make("densecl", 6, hidden=6, dim=4, queue=8)
    in_bfloat16(model, make_batch(6), ("projector", "target_dense_projector"))
    commit(model)
    for queue in (model.queue, model.dense_queue):
        torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(8), rtol=1e-6, atol=0)
