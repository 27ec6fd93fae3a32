"""The parallel heads against torch's own SGD, one head at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.evals.benchmarks.linear import Config, Heads, fit

RATES = (0.4, 0.1, 0.05)


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(8, 5, generator=random, dtype=torch.float64),
            torch.randint(4, (8,), generator=random),
        )
        for _ in range(steps)
    ]


def single(rate: float, data: list[tuple[Tensor, Tensor]], momentum: float) -> nn.Linear:
    """One head by autograd, torch.optim.SGD and the cosine of the paper."""
    head = nn.Linear(5, 4, dtype=torch.float64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=momentum, nesterov=True)
    for step, (x, y) in enumerate(data):
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / len(data)))
        optimizer.zero_grad()
        F.cross_entropy(head(x), y).backward()
        optimizer.step()
    return head


def test_weights_after_seven_steps() -> None:
    data = batches(7)
    heads = Heads(torch.tensor(RATES, dtype=torch.float64), classes=4, width=5, momentum=0.9)
    for step, (x, y) in enumerate(data):
        heads.step(x, y, 0.5 * (1 + math.cos(math.pi * step / len(data))))
    for number, rate in enumerate(RATES):
        head = single(rate, data, 0.9)
        torch.testing.assert_close(heads.weight[number], head.weight.detach(), rtol=0, atol=1e-13)
        torch.testing.assert_close(heads.bias[number], head.bias.detach(), rtol=0, atol=1e-13)
        torch.testing.assert_close(
            heads.logits(data[0][0])[number].T, head(data[0][0]).detach(), rtol=0, atol=1e-13
        )
        wrong = single(rate, data, 0.8)  # what the tolerance must be able to see
        assert (heads.weight[number] - wrong.weight.detach()).abs().max() > 1e-3


def test_fit_follows_the_cosine() -> None:
    data = batches(9)
    heads = fit(RATES, iter([(x.float(), y) for x, y in data]), 9, 4, Config())
    for number, rate in enumerate(RATES):
        torch.testing.assert_close(
            heads.weight[number].double(),
            single(rate, data, 0.9).weight.detach(),
            rtol=0,
            atol=1e-6,
        )


@pytest.mark.parametrize("huge", [1e30, float("inf")])
def test_a_diverged_head_is_never_right(huge: float) -> None:
    heads = Heads(torch.tensor(RATES), classes=4, width=5, momentum=0.9)
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
