"""Seconds per epoch of BYOL on CIFAR-10, scaletrain compared with lightly in alternating runs on
one machine.

    pip install lightly==1.6.0
    python benchmarks/peer_lightly.py IMAGES SHARDS

IMAGES contains train/CLASS/*.jpg; SHARDS are those that shards/cifar10.py made of them.

Both sides: ResNet-18 at quarter width with CIFAR stem, heads 1024 and 256, batch 256, two views
with crops, flips, jitter, grey and solarisation, bf16, SGD, one process with one loader worker on
all cores. lightly uses its own data set, transform, network, heads, loss and momentum update in the
loop of its documentation.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from scaletrain.train import records

SAMPLES, BATCH, WARM = 50_000, 256, 5
RECIPE = f"""
batch: {BATCH}
epochs: 10
data:
  workers: 1
  views:
  - &first {{size: 32, scale: [0.08, 1], interpolation: bilinear, antialias: true, flip: 0.5,
            jitter: 0.8, brightness: 0.4,
     contrast: 0.4, saturation: 0.2, hue: 0.1, grayscale: 0.2, blur: 0, solarize: 0}}
  - {{<<: *first, solarize: 0.2}}
model: {{name: resnet18, width: 0.25, stem: cifar}}
method: {{name: byol, hidden: 1024, dim: 256, tau: 0.996}}
optim: {{name: sgd, lr: 0.06, weight_decay: 5e-4, warmup_epochs: 0}}
engine: {{name: ddp, precision: bf16}}
monitor: {{every: 1, images_every: 0}}
"""


def main(
    images: Path,
    shards: Path,
    pairs: Annotated[int, typer.Option(help="Runs of each side, alternating.")] = 3,
    steps: Annotated[int, typer.Option(help="Measured steps in each run.")] = 20,
    peer: Annotated[bool, typer.Option("--peer", hidden=True)] = False,
) -> None:
    """Print the median seconds per epoch of both and their ratio."""
    if peer:
        print(json.dumps(lightly(images, steps)))
        return

    results: dict[str, list[float]] = {"lightly": [], "scaletrain": []}
    for _ in range(pairs):
        own = [sys.executable, __file__, str(images), str(shards), "--steps", str(steps), "--peer"]
        theirs = json.loads(
            subprocess.run(own, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )

        for name, seconds in (("lightly", theirs), ("scaletrain", ours(shards, steps))):
            results[name].append(SAMPLES // BATCH * statistics.median(seconds))
            print(f"{name:10} {results[name][-1]:6.1f} s per epoch", flush=True)

    ratios = [a / b for a, b in zip(*results.values(), strict=True)]
    print(
        f"lightly / scaletrain: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to "
        f"{max(ratios):.2f}"
    )


def ours(shards: Path, steps: int) -> list[float]:
    """Seconds of each measured step, by what the run itself records."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, run = Path(folder) / "recipe.yaml", Path(folder) / "run"
        recipe.write_text(RECIPE)
        settings = [f"data.path={shards / 'train'}", f"steps={WARM + steps}"]
        command = [
            sys.executable,
            "-m",
            "scaletrain",
            "train",
            str(recipe),
            *settings,
            "--run",
            str(run),
        ]

        subprocess.run(command, check=True, capture_output=True)
        lines = [record.model_dump() for record in records.read(run).steps]

    return [BATCH / line["speed/images_per_second"] for line in lines[WARM:]]


def lightly(images: Path, steps: int) -> list[float]:
    """As lightly's documentation of BYOL trains, with its CIFAR-10 settings."""
    import torch
    from lightly.data import LightlyDataset
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models import ResNetGenerator
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.byol_transform import (
        BYOLTransform,
        BYOLView1Transform,
        BYOLView2Transform,
    )

    resnet = ResNetGenerator("resnet-18", width=0.25)
    backbone = torch.nn.Sequential(
        *list(resnet.children())[:-1], torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    project, predict = BYOLProjectionHead(128, 1024, 256), BYOLPredictionHead(256, 1024, 256)
    slow, slow_project = copy.deepcopy(backbone), copy.deepcopy(project)

    deactivate_requires_grad(slow)
    deactivate_requires_grad(slow_project)
    trained = torch.nn.ModuleList([backbone, project, predict])
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    views = [
        BYOLView1Transform(input_size=32, gaussian_blur=0.0),
        BYOLView2Transform(input_size=32, gaussian_blur=0.0, solarization_prob=0.2),
    ]
    data = LightlyDataset(str(images / "train"), transform=BYOLTransform(*views))

    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=1)
    loss_of, seconds, before = NegativeCosineSimilarity(), [], time.perf_counter()
    for step, ((x0, x1), _, _) in zip(range(WARM + steps), loader, strict=False):
        update_momentum(backbone, slow, m=0.996)
        update_momentum(project, slow_project, m=0.996)
        with torch.autocast("cpu", torch.bfloat16):
            p0, p1 = predict(project(backbone(x0))), predict(project(backbone(x1)))
            with torch.no_grad():
                z0, z1 = slow_project(slow(x0)), slow_project(slow(x1))
            loss = 0.5 * (loss_of(p0, z1) + loss_of(p1, z0))

        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        now = time.perf_counter()

        if step >= WARM:
            seconds.append(now - before)

        before = now

    return seconds


if __name__ == "__main__":
    typer.run(main)
