"""Counts, on a simulated GPU, the kernels that a recipe's step would launch and the times that the
host would wait: `python -m benchmarks.gpu.launches configs/byol_r50_in1k.yaml [KEY=VALUE ...]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.gpu.report import ROOT, Settings, attempt, say
from benchmarks.gpu.simulated import LaunchCounter, simulated
from scaletrain.config import load
from scaletrain.config.schema import Config
from scaletrain.core import Clock
from scaletrain.data.loading.dataset import RawBatch
from scaletrain.data.loading.to_device import ToDevice
from scaletrain.data.transforms.params import COLUMNS, expand
from scaletrain.runtime import timing
from scaletrain.train.build import build

SAMPLES = 50_000
RECIPES = ("supervised_r50_in1k", "byol_r50_in1k", "relicv2_r50_in1k", "byol_r18_cifar10")


def count(recipe: Path, rows: int, overrides: Sequence[str] = ()) -> LaunchCounter:
    """The counts of a recipe's second step with a batch of so many samples; the first one allocates
    what the optimizer keeps.
    """
    fixed = [f"batch={rows}", "data.path=synthetic", "engine.precision=fp32"]
    config = load.load(recipe, [*fixed, *overrides])
    per_epoch = SAMPLES // rows
    counter = LaunchCounter()

    with simulated() as device:
        engine = build(config, SAMPLES, per_epoch, device)
        to_device = ToDevice(device, 0, config.data.mean, config.data.std)
        raw = raw_batch(config, rows)
        for step in range(2):
            counter.clear()
            clock = Clock(20 * per_epoch + step, 1000 * per_epoch, 20, per_epoch)
            with counter, timing.listening(counter.listen):
                with timing.span(timing.COPY):
                    batch = to_device(raw)
                engine.step(batch, clock, 0.1, 0.1)

    return counter


def raw_batch(config: Config, rows: int) -> RawBatch:
    """A batch whose pixels take no memory."""
    groups = expand(config.data.views)
    pixel = torch.empty(1, dtype=torch.uint8)
    return RawBatch(
        0,
        tuple(pixel.expand(len(g), rows, g[0].size, g[0].size, 3) for g in groups),
        torch.arange(rows),
        torch.zeros(rows, dtype=torch.int64),
        (),
        tuple(torch.rand(len(g), rows, COLUMNS) for g in groups)
        if config.data.augment == "device"
        else None,
    )


def describe(counter: LaunchCounter) -> str:
    """Launches, how many of them are batch norm's, and where the host waits."""
    launches = counter.by_call.total()
    normalisation = sum(
        n for site, n in counter.by_site.items() if site.startswith("scaletrain/nn/norm.py")
    )
    waits = Counter(f"{wait.reason} at {wait.site} ({wait.phase})" for wait in counter.waits)
    return (
        f"{launches} launches, {normalisation} of them in nn/norm.py, "
        f"{counter.after_wait} after the last wait; by phase {dict(counter.by_phase)}; "
        f"{waits.total()} waits {dict(waits)}"
    )


def run(settings: Settings) -> None:
    """A few recipes; this needs no GPU."""
    for name in RECIPES[-1:] if settings.tiny else RECIPES:
        overrides = ["model.width=0.125"] if settings.tiny else []
        rows = 32 if settings.tiny else 256
        recipe = ROOT / "configs" / f"{name}.yaml"
        counter = attempt(f"launches {name}", lambda: count(recipe, rows, overrides))  # noqa: B023
        if counter is not None:
            say(f"{name}, simulated: {describe(counter)}")


def main(
    recipe: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Batch size.")] = 256,
    top: Annotated[int, typer.Option(min=0, help="Lines of each table of details.")] = 15,
) -> None:
    """Count what one training step would launch on a GPU."""
    counter = count(recipe, rows, overrides or [])
    print(describe(counter))

    tables: dict[str, Counter[str]] = {
        "call": counter.by_call,
        "line": counter.by_site,
        "copy": Counter(
            f"{copy.direction}, {'blocking' if copy.blocking else 'async'}, {copy.site}"
            for copy in counter.copies
        ),
    }
    for title, table in tables.items():
        for key, number in table.most_common(top):
            print(f"  by {title}: {number:6d}  {key}")


if __name__ == "__main__":
    typer.run(main)
