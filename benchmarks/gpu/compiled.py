"""The speed of a training step with torch.compile."""

from __future__ import annotations

from benchmarks.gpu.report import Settings
from benchmarks.gpu.speed import BF16, plain_row, recipe_row, show

COMPILE = "engine.compile=true"


def run(settings: Settings) -> None:
    s = settings
    if s.tiny:
        narrow = "model.width=0.0625"
        show([lambda: recipe_row(s, "byol_r18_cifar10", 8, 1, narrow, COMPILE)])
        return

    show(
        [
            lambda: plain_row(s, "supervised", 256, 10, compiled=True, profile=True),
            lambda: recipe_row(s, "supervised_r50_in1k", 256, 10, BF16, COMPILE, profile=True),
            lambda: recipe_row(s, "byol_r50_in1k", 256, 8, BF16, COMPILE, profile=True),
        ]
    )
