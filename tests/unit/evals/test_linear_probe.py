"""The probe's protocols, its batches, and that the test set has no say in the choice of the
learning rate.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from kit.heads import CLASSES, Context, blobs, measured, skewed

from scaletrain.evals.benchmarks.linear import PROTOCOLS, Config, Protocol, needs
from scaletrain.evals.features import Features
from scaletrain.evals.heads.sgd import carve, shuffled
from scaletrain.evals.held_out import held_out
from scaletrain.evals.predictions import Score


def probe(context: Context, **changes: Any) -> tuple[dict[str, float], Score]:
    return measured("linear", context, **{"epochs": 10, "batch": 32, "augment": False} | changes)


def test_separable_classes_reach_every_image() -> None:
    metrics, score = probe(Context(blobs(400, 0.2, 0), blobs(200, 0.2, 1)))
    assert metrics == {"linear": 100.0, "linear_per_class": 100.0}  # four classes: no top 5
    assert score.found["held_out"] == 100.0
    assert score.protocol["trained_on"] == 360
    assert score.found["held_out_images"] == 40


def test_the_choice_never_looks_at_the_test_set() -> None:
    """Rates from far too low to far too high; poisoned test labels change the score and nothing
    else.
    """
    train, test = skewed(400, 0), skewed(200, 1)
    rates = (1e-6, 0.05, 300.0)
    clean, score = probe(Context(train, test), rates=rates)
    context = Context(train, Features(test.x, (test.labels + 1) % CLASSES, test.index))
    poisoned, poisoned_score = probe(context, rates=rates)
    assert (score.protocol, score.found) == (poisoned_score.protocol, poisoned_score.found)
    assert clean["linear"] > poisoned["linear"] + 20
    assert context.asked[-1] == "test"
    assert context.asked.count("test") == 1
    found = score.found
    held = found["held_out_top1"]
    assert len(set(held.values())) > 1  # else nothing was chosen
    assert held[str(found["chosen_rate"])] == max(held.values()) == found["held_out"]
    assert found["chosen_at_edge"] == (found["chosen_rate"] != 0.05)


def test_the_score_is_the_chosen_heads() -> None:
    train, test = blobs(400, 2.0, 0), blobs(200, 2.0, 1)
    metrics, score = probe(Context(train, test), rates=(300.0, 0.05, 1e-6))
    alone, _ = probe(Context(train, test), rates=(score.found["chosen_rate"],))
    assert metrics == alone


def test_the_rate_is_chosen_by_the_metric_of_the_data_set() -> None:
    train, test = blobs(400, 2.0, 0), blobs(200, 2.0, 1)
    _, score = probe(Context(train, test, metric="per_class"))
    assert score.main == "linear_per_class"
    assert score.found["held_out"] == max(score.found["held_out_per_class"].values())


def test_refit_uses_every_training_image() -> None:
    train, test = blobs(120, 2.0, 0), blobs(200, 2.0, 1)
    plain, score = probe(Context(train, test))
    refitted, refit = probe(Context(train, test), refit=True)
    assert (score.protocol["trained_on"], refit.protocol["trained_on"]) == (108, 120)
    assert score.found == refit.found
    assert plain["linear"] != refitted["linear"]


def test_a_single_rate_is_trained_once_on_all_images() -> None:
    context = Context(blobs(120, 2.0, 0), blobs(200, 2.0, 1))
    metrics, score = probe(context, rates=(0.3,), refit=True)
    assert context.asked == ["trainval", "test"]
    assert score.found == {}
    several, _ = probe(context, rates=(0.3, 0.3), refit=True)
    assert metrics == several


def test_held_out_images_are_never_trained_on() -> None:
    """Their labels are poisoned: one look at them would cost a separable set its perfect score."""
    train, test = blobs(400, 0.2, 0), blobs(200, 0.2, 1)
    labels = train.labels.clone()
    labels[held_out(400)] = (labels[held_out(400)] + 1) % CLASSES
    metrics, score = probe(Context(Features(train.x, labels, train.index), test))
    assert score.found["held_out"] == 0.0
    assert metrics["linear"] == 100.0


def test_augmented_images_are_those_of_the_split() -> None:
    context = Context(blobs(100, 0.2, 0), blobs(50, 0.2, 1))
    metrics, score = probe(context, augment=True, refit=True)
    assert metrics["linear"] == 100.0
    assert score.protocol["train_transform"] == {"name": "crops"}
    assert context.asked == ["views of train", "val", "views of trainval", "test"]


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("augment", [True, False])
def test_what_is_used_is_what_was_declared(name: Protocol, augment: bool) -> None:
    context = Context(blobs(100, 0.2, 0), blobs(50, 0.2, 1))
    config = {"protocol": name, "augment": augment, "epochs": 2}
    measured("linear", context, **config)
    declared = needs(Config.model_validate(config), None)  # type: ignore[arg-type]
    assert declared.splits == tuple(s for s in context.asked if "views" not in s)
    assert declared.augmented == any("views" in split for split in context.asked) == augment


def test_the_protocols_are_those_of_the_papers() -> None:
    """Rows of the papers' tables and code, and nothing left to the defaults of another."""
    rows = {
        "simclr": (90, 4096, (0.1,), True, 0, "cosine", True),
        "byol": (80, 1024, (0.4, 0.3, 0.2, 0.1, 0.05), True, 0, "cosine", False),
        "relicv2": (100, 1024, (0.3,), True, 0, "cosine", True),
        "moco": (100, 256, (30.0,), False, 0, "steps", True),
        "swav": (100, 256, (0.3,), False, 1e-6, "cosine_by_epoch", True),
    }
    for name, row in rows.items():
        config = Config.model_validate({"protocol": name})
        found = (config.epochs, config.batch, config.rates, config.nesterov)
        assert (*found, config.weight_decay, config.schedule, config.refit) == row
        assert config.momentum == 0.9
        assert config.augment


def test_every_constant_of_a_protocol_is_part_of_the_settings() -> None:
    """Which are part of a result's name."""
    for name, constants in PROTOCOLS.items():
        settings = Config.model_validate({"protocol": name}).model_dump()
        assert constants.items() <= settings.items()

    dumps = [Config.model_validate({"protocol": name}).model_dump_json() for name in PROTOCOLS]
    assert len(set(dumps)) == len(PROTOCOLS)


def test_other_settings_than_the_papers_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    context = Context(blobs(100, 0.2, 0), blobs(50, 0.2, 1))
    _, score = probe(context, protocol="moco", batch=256, seed=5)
    differs = {"epochs": 10, "augment": False, "features.resize": "none", "batch": 100}
    assert score.protocol["differs_from_protocol"] == differs
    assert "linear.protocol=moco with other settings" in capsys.readouterr().err

    assert Config.model_validate({"protocol": "moco"}).differences({"resize": "tv"}, 256) == {}
    assert Config.model_validate({"epochs": 3}).differences({"resize": "tv"}, 9) == {}


def test_a_protocol_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="moco"):
        Config.model_validate({"protocol": "mocov4"})


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
