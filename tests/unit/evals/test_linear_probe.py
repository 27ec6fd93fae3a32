"""The probe's split, its batches, and that the test set has no say in the choice of the learning
rate.
"""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from scaletrain.evals.benchmarks.linear import Config, carve, measure, shuffled
from scaletrain.evals.errors import EvalError
from scaletrain.evals.features import Features
from scaletrain.evals.held_out import held_out

CLASSES, WIDTH = 4, 6


def blobs(samples: int, noise: float, seed: int) -> Features:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=random)
    centres = torch.eye(CLASSES, WIDTH) * 3
    return Features(centres[labels] + noise * torch.randn(samples, WIDTH, generator=random), labels)


class EvalContext:
    """As much of a EvalContext as the probe uses, with cached features; it notes what was asked
    for.
    """

    transform: dict[str, Any] = {}  # noqa: RUF012
    augmentation: dict[str, Any] = {}  # noqa: RUF012
    subset_labels = None

    def __init__(self, train: Features, test: Features) -> None:
        self.train, self.test, self.samples, self.classes = train, test, len(train.labels), CLASSES
        self.asked: list[str] = []

    def part(self, rows: Tensor) -> Features:
        self.asked.append("part")
        return Features(self.train.x[rows], self.train.labels[rows])

    def bank(self) -> Features:
        self.asked.append("bank")
        return self.train

    def queries(self) -> Features:
        self.asked.append("queries")
        return self.test


def probe(context: Any, **changes: Any) -> tuple[dict[str, float], dict[str, Any]]:
    return measure(Config(**{"epochs": 10, "batch": 32, "augment": False, **changes}), context)


def test_separable_classes_reach_every_image() -> None:
    metrics, card = probe(EvalContext(blobs(400, 0.2, 0), blobs(200, 0.2, 1)))
    assert metrics["linear"] == metrics["linear_per_class"] == metrics["linear_held_out"] == 100.0
    assert "linear_top5" not in metrics  # four classes
    assert card["trained_on"] == 360
    assert card["chosen_on"] == "40 held-out training images"


def skewed(samples: int, seed: int) -> Features:
    """Two dimensions of loud noise, which only a long enough training learns to ignore."""
    plain = blobs(samples, 1.0, seed)
    return Features(
        plain.x * torch.tensor([1.0] * CLASSES + [15.0] * (WIDTH - CLASSES)), plain.labels
    )


def test_the_choice_never_looks_at_the_test_set() -> None:
    """Rates from far too low to far too high; poisoned test labels change the score and nothing
    else.
    """
    train, test = skewed(400, 0), skewed(200, 1)
    rates = (1e-6, 0.05, 300.0)
    clean, card = probe(EvalContext(train, test), rates=rates)
    context = EvalContext(train, Features(test.x, (test.labels + 1) % CLASSES))
    poisoned, poisoned_card = probe(context, rates=rates)
    assert card == poisoned_card
    assert clean["linear_held_out"] == poisoned["linear_held_out"]
    assert clean["linear"] > poisoned["linear"] + 20
    assert context.asked[-1] == "queries"
    assert context.asked.count("queries") == 1
    found = card["found"]
    held = found["held_out_top1"]
    assert len(set(held.values())) > 1  # else nothing was chosen
    assert held[str(found["chosen_rate"])] == max(held.values()) == clean["linear_held_out"]
    assert found["chosen_at_edge"] == (found["chosen_rate"] != 0.05)


def test_the_score_is_the_chosen_heads() -> None:
    train, test = blobs(400, 2.0, 0), blobs(200, 2.0, 1)
    rates = (300.0, 0.05, 1e-6)
    metrics, card = probe(EvalContext(train, test), rates=rates)
    alone, _ = probe(EvalContext(train, test), rates=(card["found"]["chosen_rate"],))
    assert metrics["linear"] == alone["linear"]


def test_refit_uses_every_training_image() -> None:
    train, test = blobs(120, 2.0, 0), blobs(200, 2.0, 1)
    plain, card = probe(EvalContext(train, test))
    refitted, refit_card = probe(EvalContext(train, test), refit=True)
    assert (card["trained_on"], refit_card["trained_on"]) == (108, 120)
    assert card["found"]["chosen_rate"] == refit_card["found"]["chosen_rate"]
    assert plain["linear_held_out"] == refitted["linear_held_out"]
    assert plain["linear"] != refitted["linear"]


def test_the_held_out_list_is_stable_disjoint_and_small() -> None:
    out = held_out(5000)
    assert len(out) == 500
    assert out.unique().equal(out)
    assert out.equal(held_out(5000))
    assert out[:5].tolist() == [5, 9, 10, 13, 16]  # changing these changes every published figure
    assert len(held_out(1_281_167)) == 10_009
    assert len(held_out(3)) == 1
    with pytest.raises(EvalError, match="1 training image"):
        held_out(1)


def test_held_out_images_are_never_trained_on() -> None:
    """Their labels are poisoned: one look at them would cost a separable set its perfect score."""
    train, test = blobs(400, 0.2, 0), blobs(200, 0.2, 1)
    labels = train.labels.clone()
    labels[held_out(400)] = (labels[held_out(400)] + 1) % CLASSES
    metrics, _ = probe(EvalContext(Features(train.x, labels), test))
    assert metrics["linear_held_out"] == 0.0
    assert metrics["linear"] == 100.0


def test_batches_are_whole_and_epochs_complete() -> None:
    rows = torch.arange(3, 25)  # 22 rows, batches of 4: batches straddle the epochs
    x = torch.arange(30.0).unsqueeze(1)
    batches = list(islice(shuffled(x, torch.arange(30), rows, 4, 0), 11))
    assert all(len(a) == len(b) == 4 and a.flatten().long().equal(b) for a, b in batches)
    line = torch.cat([b for _, b in batches]).view(2, 22)
    assert [sorted(epoch) for epoch in line.tolist()] == [rows.tolist()] * 2
    assert not line[0].equal(line[1])


def test_carve_keeps_the_line() -> None:
    numbers = torch.arange(23)
    chunks = [(part, part * 2) for part in numbers.split([1, 0, 9, 2, 11])]
    batches = list(carve(chunks, 5))
    assert torch.cat([a for a, _ in batches]).equal(numbers[:20])
    assert torch.cat([b for _, b in batches]).equal(numbers[:20] * 2)


def test_augmented_batches_leave_out_what_is_held_out() -> None:
    train, test = blobs(100, 0.2, 0), blobs(50, 0.2, 1)
    asked: list[Tensor] = []

    def augmented(wanted: Tensor, seed: int) -> Any:
        asked.append(wanted)
        rows = wanted.nonzero().flatten()
        while True:
            yield train.x[rows], train.labels[rows]

    context = SimpleNamespace(
        **vars(EvalContext(train, test)),
        subset_labels=None,
        transform={},
        augmentation={"name": "crops"},
        augmented=augmented,
    )
    context.part, context.queries = EvalContext(train, test).part, EvalContext(train, test).queries
    metrics, card = probe(context, augment=True)
    assert metrics["linear"] == 100.0
    assert card["train_transform"] == {"name": "crops"}
    assert asked[0].sum() == 90
    assert not asked[0][held_out(100)].any()
