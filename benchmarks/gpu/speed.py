"""Images per second, memory, launches and host waits of a training step, against plain PyTorch."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu import plain
from benchmarks.gpu.profiling import profiled
from benchmarks.gpu.report import ROOT, Settings, attempt, say
from scaletrain.config import load
from scaletrain.core import Clock
from scaletrain.data.loading.dataset import RawBatch
from scaletrain.data.loading.to_device import ToDevice
from scaletrain.data.transforms.params import expand
from scaletrain.train.build import build

# of ImageNet, for methods with a memory of it
SAMPLES = 1_281_167
WARM_UP = 3
BF16 = "engine.precision=bf16"


@dataclass(frozen=True)
class Row:
    """One line of the table of speeds."""

    name: str
    batch: int
    # of a step
    milliseconds: float
    # until the host had queued a step
    host_milliseconds: float
    # largest allocation
    gigabytes: float
    profile: str = ""

    @property
    def rate(self) -> float:
        """Images per second."""
        return 1000 * self.batch / self.milliseconds

    def __str__(self) -> str:
        return (
            f"{self.name:38s} batch {self.batch:4d}  {self.rate:8.0f} images/s  "
            f"{self.milliseconds:8.1f} ms  {self.gigabytes:6.1f} GB  "
            f"host {self.host_milliseconds:.0f} ms  {self.profile}"
        ).rstrip()


def measured(
    settings: Settings,
    name: str,
    batch: int,
    times: int,
    step: Callable[[], None],
    *,
    profile: bool,
) -> Row:
    """The row of a step that is run so many times."""
    if settings.cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 if settings.tiny else WARM_UP):
        step()
    settings.synchronize()

    begin = time.perf_counter()
    for _ in range(times):
        step()
    queued = time.perf_counter()
    settings.synchronize()
    end = time.perf_counter()

    peak = torch.cuda.max_memory_allocated() / 1e9 if settings.cuda else 0.0
    host, whole = (1000 * (at - begin) / times for at in (queued, end))
    return Row(name, batch, whole, host, peak, profiled(settings, step) if profile else "")


def recipe_row(
    settings: Settings,
    recipe: str,
    batch: int,
    times: int,
    *overrides: str,
    profile: bool = False,
) -> Row:
    """A recipe's step on a made-up batch in pinned memory, its copy to the device included."""
    fixed = ["data.path=synthetic", f"batch={batch}", "optim.warmup_epochs=0"]
    config = load.load(ROOT / "configs" / f"{recipe}.yaml", [*fixed, *overrides])
    engine = build(config, SAMPLES, SAMPLES // batch, settings.device)

    shapes = [(len(g), batch, g[0].size, g[0].size, 3) for g in expand(config.data.views)]
    views = tuple(torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes)
    index = torch.arange(batch)
    if settings.cuda:
        views, index = tuple(view.pin_memory() for view in views), index.pin_memory()
    raw = RawBatch(0, views, index, index % 2)

    to_device = ToDevice(settings.device, 0, config.data.mean, config.data.std)
    steps = iter(range(10**6))

    def step() -> None:
        engine.step(to_device(raw), Clock(next(steps), 10**6, 0, 5000), 1e-3, 1e-3)

    name = " ".join([recipe, *(text.removeprefix("engine.") for text in overrides)])
    return measured(settings, name, batch, times, step, profile=profile)


def plain_row(
    settings: Settings,
    method: str,
    batch: int,
    times: int,
    *,
    compiled: bool = False,
    profile: bool = False,
) -> Row:
    """The step of a loop that one would write by hand."""
    step = plain.step(settings, method, batch, compiled=compiled)
    name = f"plain torch, {method}{' compiled' if compiled else ''}"
    return measured(settings, name, batch, times, step, profile=profile)


def with_benchmark(row: Callable[[], Row]) -> Row:
    """A row measured while cuDNN tries out its algorithms."""
    torch.backends.cudnn.benchmark = True
    try:
        found = row()
    finally:
        torch.backends.cudnn.benchmark = False
    return replace(found, name=f"{found.name} cudnn.benchmark")


def show(rows: list[Callable[[], Row]]) -> None:
    """Measure and print one row after the other, the memory of the last one freed."""
    for row in rows:
        found = attempt("speed", row)
        if found is not None:
            say(found)

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run(settings: Settings) -> None:
    s = settings
    if s.tiny:
        narrow = "model.width=0.0625"
        show(
            [
                lambda: recipe_row(s, "byol_r18_cifar10", 8, 1, narrow, BF16, profile=True),
                lambda: plain_row(s, "supervised", 2, 1),
                lambda: plain_row(s, "byol", 2, 1),
            ]
        )
        return

    show(
        [
            lambda: plain_row(s, "supervised", 256, 10, profile=True),
            lambda: recipe_row(s, "supervised_r50_in1k", 256, 10, BF16, profile=True),
            lambda: plain_row(s, "byol", 256, 8, profile=True),
            lambda: recipe_row(s, "byol_r50_in1k", 256, 8, BF16, profile=True),
            lambda: recipe_row(s, "relicv2_r50_in1k", 256, 4, BF16, profile=True),
            lambda: recipe_row(s, "simclr_r50_in1k", 256, 8, BF16),
            lambda: recipe_row(s, "byol_r50_in1k", 64, 10, BF16),
            lambda: with_benchmark(lambda: plain_row(s, "supervised", 256, 10)),
            lambda: with_benchmark(lambda: recipe_row(s, "supervised_r50_in1k", 256, 10, BF16)),
            lambda: with_benchmark(lambda: recipe_row(s, "relicv2_r50_in1k", 256, 4, BF16)),
            lambda: recipe_row(s, "byol_r18_cifar10", 256, 20, BF16, profile=True),
            lambda: recipe_row(
                s, "relicv2_r50_in1k", 128, 4, BF16, "engine.activation_checkpointing=true"
            ),
        ]
    )
