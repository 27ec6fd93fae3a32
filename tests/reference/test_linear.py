"""The parallel heads against torch's own SGD, one head at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.evals.benchmarks.linear import Config
from scaletrain.evals.heads.sgd import Heads, Sgd, fit

RATES = (0.4, 0.1, 0.05)
RECIPES = [
    Sgd(),
    Sgd(nesterov=False, schedule="steps", milestones=(0.6, 0.8)),
    Sgd(nesterov=False, weight_decay=0.1, schedule="cosine_by_epoch", epochs=3),
]


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(8, 5, generator=random, dtype=torch.float64),
            torch.randint(4, (8,), generator=random),
        )
        for _ in range(steps)
    ]


def single(rate: float, data: list[tuple[Tensor, Tensor]], recipe: Sgd) -> nn.Linear:
    """One head by autograd, torch.optim.SGD and torch's schedules."""
    head = nn.Linear(5, 4, dtype=torch.float64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(
        head.parameters(), rate, recipe.momentum, 0, recipe.weight_decay, recipe.nesterov
    )
    schedules = torch.optim.lr_scheduler
    steps, epochs = len(data), recipe.epochs if recipe.schedule == "cosine_by_epoch" else len(data)
    schedule: torch.optim.lr_scheduler.LRScheduler = (
        schedules.MultiStepLR(optimizer, [round(share * steps) for share in recipe.milestones])
        if recipe.schedule == "steps"
        else schedules.CosineAnnealingLR(optimizer, epochs)
    )
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        F.cross_entropy(head(x), y).backward()
        optimizer.step()
        if (step + 1) % (steps // epochs) == 0:
            schedule.step()
    return head


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.schedule)
def test_weights_after_fifteen_steps(recipe: Sgd) -> None:
    data = batches(15)
    heads = Heads(torch.tensor(RATES, dtype=torch.float64), classes=4, width=5, recipe=recipe)
    for step, (x, y) in enumerate(data):
        heads.step(x, y, recipe.share(step, 15))
    for number, rate in enumerate(RATES):
        head = single(rate, data, recipe)
        torch.testing.assert_close(heads.weight[number], head.weight.detach(), rtol=0, atol=1e-13)
        torch.testing.assert_close(heads.bias[number], head.bias.detach(), rtol=0, atol=1e-13)
        logits = head(data[0][0]).detach()
        torch.testing.assert_close(heads.logits(data[0][0])[number].T, logits, rtol=0, atol=1e-13)
        torch.testing.assert_close(heads.scores(data[0][0], number), logits, rtol=0, atol=1e-13)
        # what the tolerance must be able to see
        for other in (*(one for one in RECIPES if one != recipe), Sgd(momentum=0.8)):
            wrong = single(rate, data, other)
            assert (heads.weight[number] - wrong.weight.detach()).abs().max() > 1e-3


def test_fit_follows_the_schedule() -> None:
    data = batches(9)
    heads = fit(((x.float(), y) for x, y in data), 9, 4, RATES, Sgd())
    for number, rate in enumerate(RATES):
        weight = single(rate, data, Sgd()).weight.detach()
        torch.testing.assert_close(heads.weight[number].double(), weight, rtol=0, atol=1e-6)


def test_the_papers_schedules() -> None:
    """MoCo divides the rate after 60 and 80 of 100 epochs; SwAV's cosine changes by epoch."""
    moco, swav = (Config(protocol=name) for name in ("moco", "swav"))
    steps = Sgd(schedule=moco.schedule, milestones=moco.milestones)
    found = [steps.share(epoch, 100) for epoch in (0, 59, 60, 79, 80, 99)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])

    cosine = Sgd(schedule=swav.schedule, epochs=swav.epochs)
    assert cosine.share(50 * 7 + 6, 700) == cosine.share(50 * 7, 700) == pytest.approx(0.5)
    assert cosine.share(99 * 7, 700) == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2)


@pytest.mark.parametrize("huge", [1e30, float("inf")])
def test_a_diverged_head_is_never_right(huge: float) -> None:
    heads = Heads(torch.tensor(RATES), classes=4, width=5, recipe=Sgd())
    heads.weight[0, 0], heads.weight[1] = 1.0, huge
    x, y = (
        torch.full((3, 5), 1e10) * torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0]),
        torch.zeros(3, dtype=torch.int64),
    )
    ranks = heads.ranks(x, y).tolist()
    assert ranks == [
        [0, 0, 0],
        [4, 4, 4],
        [3, 3, 3],
    ]  # the last has learnt nothing: a tie of all classes is not right either
