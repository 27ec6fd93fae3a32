"""Fine-tuning, against a plain transcription of its loss and the rates of its authors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from kit import plain_losses as plain
from kit import small
from kit.tiny import CLOCK, LARGE, MULTI, agrees, encode, make, make_batch
from torch import Tensor

from scaletrain.config import load
from scaletrain.config.recipe import CONFIGS, ConfigError
from scaletrain.core import Batch, Source
from scaletrain.nn.norm import BatchNorm
from scaletrain.optim import schedule
from scaletrain.optim.groups import set_rates
from scaletrain.train.build import build_method, run_info_of


def labelled(views: tuple[tuple[int, int], ...], labels: list[int]) -> Batch:
    return dataclasses.replace(make_batch(len(labels), views), labels=torch.tensor(labels))


def plain_loss(model: Any, batch: Batch) -> Tensor:
    assert batch.labels is not None
    (head,) = [[model.classifier]]
    losses = [
        -plain.log_softmax(list(logits))[label]
        for view in encode(model.backbone, batch.views)
        for logits, label in zip(plain.head(head, view), batch.labels.tolist(), strict=True)
    ]
    return plain.mean(losses)


@pytest.mark.parametrize("views", [((4, 1),), LARGE, MULTI])
def test_the_loss_of_every_view(views: tuple[tuple[int, int], ...]) -> None:
    labels = [4, 4, 0, 2, 1, 1]
    model, batch = make("finetune", 6, views, classes=5, source="none"), labelled(views, labels)
    with torch.no_grad():
        model.classifier.weight.normal_()
    agrees(model, model(batch, CLOCK).losses["all"], plain_loss(model, batch))


def test_the_classifier_starts_at_zero() -> None:
    engine = small.engine(small.config("finetune"), perturb=False)
    assert not any(p.any() for p in engine.method.get_submodule("classifier").parameters())
    out = engine.method(small.batch(small.config("finetune"), 0), CLOCK)
    assert out.losses["all"].item() == pytest.approx(math.log(5))


@pytest.mark.parametrize(("epoch", "share"), [(0, 1), (11, 1), (12, 0.2), (16, 0.04), (19, 0.04)])
def test_trunk_and_head_have_the_rates_of_swav(epoch: int, share: float) -> None:
    """eval_semisup.py with 10 % of the labels: .01 and .2, times .2 after epochs 12 and 16."""
    cfg = load.load(CONFIGS / "finetune_r50_in1k.yaml")
    engine = small.engine(small.config("finetune", method={"head_lr": 20, "source": "none"}))
    lr = schedule.lr(cfg.optim, cfg.batch, epoch * 500, 500, 20 * 500)
    set_rates(engine.optimizer.param_groups, lr, lr)
    assert engine.rates() == pytest.approx({"all": 0.01 * share, "head": 0.2 * share})
    head = [n for g in engine.optimizer.param_groups if g["name"] == "head" for n in g["names"]]
    assert sorted(head) == ["classifier.bias", "classifier.weight"]


@pytest.mark.parametrize(
    ("steps", "rule", "momentum"),
    [(20, True, 0.1), (100, True, 0.1), (1000, True, 0.01), (1000, False, 0.1)],
)
def test_running_statistics_are_slow_where_epochs_are_long(
    steps: int, rule: bool, momentum: float
) -> None:
    """The decay of BYOL's appendix D, max(1 - 10 / s, .9), as a momentum."""
    cfg = small.config("finetune", method={"norm_rule": rule})
    model = build_method(cfg, run_info_of(cfg, 24, steps))
    found = {m.momentum for m in model.modules() if isinstance(m, BatchNorm)}
    assert found == {momentum}


def test_the_source_must_be_said() -> None:
    assert make("finetune", 2, source="none").sources() == {}
    with pytest.raises(ConfigError, match=r"method\.source is empty: give the run, step or file"):
        make("finetune", 2).sources()
    model = make("finetune", 2, source="run")
    (source,) = model.sources().values()
    assert (source.path.is_absolute(), source.path.name) == (True, "run")
    assert source == Source(source.path, "backbone")
