"""What the trainer adds to a step, in CPU milliseconds, over 10,000 steps of next to nothing:
`python benchmarks/overhead.py`.

The whole of `scaletrain train` with a method of a single parameter and one constant batch, so
without a loader, compared with the loop that one would write by hand over the same method: forward,
backward, SGD, zero_grad, the loss as a number. This file also defines the method.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch import nn

import scaletrain.methods
from scaletrain.config import load
from scaletrain.config.schema import ComponentConfig
from scaletrain.core import Backbone, Batch, Clock, Method, MethodOutput, RunInfo
from scaletrain.data.loading import support
from scaletrain.runtime import timing
from scaletrain.train import loop

NAME, WARM = "overhead", 100  # steps that are not counted
RECIPE = {
    "batch": 1,
    "data": {"path": "constant"},
    "method": {"name": NAME},
    "optim": {"name": "sgd", "warmup_epochs": 0},
    "monitor": {"images_every": 0},
}


class Config(ComponentConfig):
    pass


class OneWeight(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))


class Model(Method):
    """One parameter, whose square is the loss."""

    backbone: OneWeight

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        super().__init__()
        self.backbone = OneWeight()

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        return MethodOutput({"all": self.backbone.weight.square().sum()})


BATCH = Batch(
    (torch.zeros(1, 1, 3, 8, 8),),
    torch.zeros(1, dtype=torch.int64),
    torch.zeros(1, dtype=torch.int64),
    torch.eye(2, 3),
)


class Constant:
    """In place of the data stream: the same batch again and again, and the CPU seconds between
    its steps.
    """

    samples, steps_per_epoch, plan = 1000, 1000, SimpleNamespace(whole=True)
    missing = 0
    seconds = 0.0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def batches(self, start: int, stop: int, *_: Any) -> Iterator[Batch]:
        for step in range(start, stop):
            if step == WARM:
                begin = time.process_time()
            yield BATCH
        Constant.seconds = (time.process_time() - begin) / (stop - WARM)

    def sources(self) -> list[dict[str, Any]]:
        return []

    def list_sources(self) -> dict[str, dict[str, Any]]:
        return {}

    def support_sources(self) -> list[dict[str, Any]]:
        return []

    def mixing(self) -> str:
        return "one batch"

    def name(self, sample: int) -> str:
        return str(sample)

    def close(self) -> None: ...


def trainer(steps: int, **changes: Any) -> float:
    """CPU seconds per step, checkpoints left out."""
    cfg = load.build(
        RECIPE | {"steps": steps, "threads": 1, "checkpoint": {"every_steps": 10**9}} | changes
    )

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(support, "stream", Constant),
        redirect_stdout(StringIO()),
    ):
        loop.train(cfg, Path(folder) / "run")

    return Constant.seconds


def by_hand(steps: int) -> float:
    model = Model(Config(name=NAME), OneWeight, RunInfo(1, 1, 1, ((8, 1),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-6)
    for step in range(steps):
        if step == WARM:
            begin = time.process_time()

        loss = model(BATCH, Clock(step, steps, 0, steps)).losses["all"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return (time.process_time() - begin) / (steps - WARM)


def parts(steps: int) -> dict[str, float]:
    """CPU milliseconds of a step by the trainer's own marks; what they enclose themselves is
    charged to them.
    """
    found: dict[str, float] = defaultdict(float)

    @contextmanager
    def listen(name: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        found[name] += 1000 * (time.process_time() - begin) / steps

    with timing.listening(listen):
        total = 1000 * trainer(steps, monitor={"images_every": 0, "every": 10**9})

    return {**found, "the rest of the loop, agreement and checks": total - sum(found.values())}


def main(
    steps: Annotated[int, typer.Option(help="Of each run.")] = 10_000,
    runs: Annotated[int, typer.Option(help="Of each, alternating.")] = 3,
) -> None:
    torch.set_num_threads(1)
    scaletrain.methods.__path__.append(str(Path(__file__).parent))
    found: dict[str, list[float]] = {"by hand": [], "trainer, nothing recorded": [], "trainer": []}
    for _ in range(runs):
        found["by hand"].append(by_hand(steps))
        found["trainer, nothing recorded"].append(
            trainer(steps, monitor={"images_every": 0, "every": 10**9})
        )
        found["trainer"].append(trainer(steps))

    for name, seconds in found.items():
        ms = [1000 * s for s in seconds]
        print(
            f"{name}: {median(ms):.3f} ms of CPU per step ({min(ms):.3f} to {max(ms):.3f}, {runs} "
            f"runs of {steps} steps)"
        )

    for name, value in parts(max(steps // 5, 2 * WARM)).items():
        print(f"  {name}: {value:.3f} ms")


if __name__ == "__main__":
    typer.run(main)
