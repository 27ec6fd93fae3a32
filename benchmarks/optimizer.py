"""A LARS step over ResNet-50's parameters beside lightly's and timm's, on the CPU: `python
benchmarks/optimizer.py`.

All take the same rule (|p| / (|g| + decay |p|), biases and norms left out), and their momentum is
compared with that in float64; the rule of BYOL and SimCLR, |p| / |g + decay p|, is timed besides.
Steps alternate in one process. Needs `pip install lightly==1.6.0 timm`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter, process_time
from typing import Annotated, Any

import torch
import typer
from lightly.utils.lars import LARS as Lightly
from timm.optim.lars import Lars as Timm
from torch import Tensor

from scaletrain.config.schema import ModelConfig
from scaletrain.nn.resnet import ResNet
from scaletrain.optim.lars import LARS

LR, MOMENTUM, DECAY, ETA = 0.2, 0.9, 1e-4, 1e-3
Groups = list[dict[str, Any]]
OURS, BYOL = "scaletrain", "scaletrain, BYOL's rule"
MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    OURS: partial(LARS, lr=LR, momentum=MOMENTUM, eta=ETA, norm="parts"),
    BYOL: partial(LARS, lr=LR, momentum=MOMENTUM, eta=ETA),
    "lightly": partial(Lightly, lr=LR, momentum=MOMENTUM, trust_coefficient=ETA),
    "timm": partial(Timm, lr=LR, momentum=MOMENTUM, trust_coeff=ETA),
}


class EncoderUnderTest:
    """An optimizer over its own ResNet-50, with gradients that are new at each step."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.clock = (
            process_time if torch.get_num_threads() == 1 else perf_counter
        )  # other work on the machine counts less
        torch.manual_seed(0)
        network = ResNet(ModelConfig()).to(dtype).to(memory_format=torch.channels_last)
        self.params = list(network.parameters())
        plain, exempt = ([p for p in self.params if (p.ndim > 1) is kind] for kind in (True, False))
        groups: Groups = [
            {"params": plain, "weight_decay": DECAY},
            {"params": exempt, "weight_decay": 0.0},
        ]

        if name in (OURS, BYOL):  # the others leave out what is not decayed
            groups[1]["adapt"] = False

        self.optimizer = MAKE[name](groups)

    def seconds(self, number: int) -> float:
        """Of one step; gradients are drawn before."""
        draw = torch.Generator().manual_seed(number)
        for p in self.params:
            p.grad = torch.empty_like(p).copy_(
                0.01 * torch.randn(p.shape, generator=draw)
            )  # in the layout of p

        begin = self.clock()
        self.optimizer.step()
        return self.clock() - begin

    def momentum(self) -> list[Tensor]:
        return [self.optimizer.state[p]["momentum_buffer"].double() for p in self.params]


def worst(name: str, exact: list[Tensor], steps: int) -> float:
    """Largest deviation of a parameter's momentum, relative to its norm."""
    subject = EncoderUnderTest(name)
    for number in range(steps):
        subject.seconds(number)

    return max(
        float((a - b).norm() / b.norm()) for a, b in zip(subject.momentum(), exact, strict=True)
    )


def main(
    steps: Annotated[int, typer.Option(help="Of each, alternating.")] = 30,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
) -> None:
    """Print how far each is from float64 and the milliseconds of a step."""
    torch.set_num_threads(threads)
    exact = EncoderUnderTest("lightly", torch.float64)
    for number in range(3):
        exact.seconds(number)

    for name in (OURS, "lightly", "timm"):
        print(
            f"{name}: momentum after 3 steps is apart from float64's by "
            f"{worst(name, exact.momentum(), 3):.1e}"
        )

    subjects = {name: EncoderUnderTest(name) for name in MAKE}
    times: dict[str, list[float]] = {name: [] for name in MAKE}
    for number in range(steps + 3):
        for name, subject in subjects.items():
            seconds = subject.seconds(number)
            if number >= 3:  # buffers are made and code is compiled in the first
                times[name].append(1000 * seconds)

    unit = "ms of CPU" if threads == 1 else "ms"
    for name, ms in times.items():
        print(
            f"{name}: {median(ms):.1f} {unit} ({min(ms):.1f} to {max(ms):.1f}, {steps} steps, "
            f"{threads} threads)"
        )

    for peer in ("lightly", "timm"):
        for ours in (OURS, BYOL):
            ratios = sorted(a / b for a, b in zip(times[peer], times[ours], strict=True))
            quarter = len(ratios) // 4
            spread = f"{ratios[quarter]:.2f} to {ratios[-quarter - 1]:.2f}"
            print(
                f"{ours}: {median(ratios):.2f} times {peer}'s speed (middle half of the pairs: "
                f"{spread})"
            )


if __name__ == "__main__":
    typer.run(main)
