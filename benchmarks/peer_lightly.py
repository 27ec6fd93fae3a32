"""Seconds per CIFAR-10 epoch of BYOL, ours against lightly's own CIFAR-10 recipe, in alternation on this machine.

    pip install lightly        (a peer for this measurement only)
    python benchmarks/peer_lightly.py IMAGES SHARDS      folders as in benchmarks/cifar10.py: IMAGES and WORK/shards

Same network (quarter-width ResNet-18, 3x3 stem), batch 256, bf16, two loader processes, BYOL's two views without blur, from
JPEG files (lightly) and from tar shards of the same files (ours). One process; torch uses every core.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import typer

WARM, STEPS, BATCH, IMAGES = 5, 25, 256, 50_000


def main(images: Path, shards: Path, pairs: int = 3, only: str = "") -> None:
    """Print the median over `pairs` alternations and the ratio."""
    if only:
        typer.echo(f"{(lightly if only == 'lightly' else ours)(images, shards):.3f}")
        return
    found: dict[str, list[float]] = {"ours": [], "lightly": []}
    for _ in range(pairs):
        for name, values in found.items():
            command = [sys.executable, __file__, str(images), str(shards), "--only", name]
            values.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    ratios = [b / a for a, b in zip(found["ours"], found["lightly"], strict=True)]
    for name, values in found.items():
        typer.echo(f"{name:8} {statistics.median(values):6.0f} s per epoch   {[round(v) for v in values]}")
    typer.echo(f"lightly / ours: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


def clock(steps: Any) -> float:
    """Seconds per epoch from an endless iterator of finished steps."""
    for _ in range(WARM):
        next(steps)
    begun = time.perf_counter()
    for _ in range(STEPS):
        next(steps)
    return (time.perf_counter() - begun) / STEPS * (IMAGES // BATCH)


def ours(images: Path, shards: Path) -> float:
    import torch

    from scaletrain import config, dist
    from scaletrain.core import Clock
    from scaletrain.data.loader import Stream
    from scaletrain.train import build

    dist.keep_freed_memory()
    settings = [f"data.path={shards / 'train'}", "method={name: byol, hidden: 1024, dim: 256}", "data.workers=2"]
    cfg = config.load(Path(__file__).parent / "simclr_cifar10.yaml", settings)
    stream = Stream(cfg.data, seed=0, batch=BATCH, rank=0, world=1, device=torch.device("cpu"))
    engine = build(cfg, stream.samples, stream.steps_per_epoch, torch.device("cpu"))

    def steps() -> Any:
        for i, batch in enumerate(stream.batches(0, WARM + STEPS)):
            yield engine.step(batch, Clock(i, 1950, 0, stream.steps_per_epoch), 0.06, 0.06)

    return clock(steps())


def lightly(images: Path, shards: Path) -> float:
    import copy

    import torch
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    from torch import nn
    from torchvision.datasets import ImageFolder
    from torchvision.models.resnet import BasicBlock, ResNet

    backbone = ResNet(BasicBlock, [2, 2, 2, 2])
    backbone.inplanes = 16
    stages = [backbone._make_layer(BasicBlock, 16 << i, 2, stride=1 + (i > 0)) for i in range(4)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    online = nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    projector, predictor = BYOLProjectionHead(128, 1024, 256), BYOLPredictionHead(256, 1024, 256)
    target, target_projector = copy.deepcopy(online), copy.deepcopy(projector)
    for module in (target, target_projector):
        deactivate_requires_grad(module)
    for module in (online, target):
        module.to(memory_format=torch.channels_last)
    transform = BYOLTransform(
        BYOLView1Transform(input_size=32, gaussian_blur=0.0), BYOLView2Transform(input_size=32, gaussian_blur=0.0)
    )
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(images / "train"), transform), BATCH, shuffle=True, drop_last=True, num_workers=2
    )
    parameters = [*online.parameters(), *projector.parameters(), *predictor.parameters()]
    optimizer, criterion = torch.optim.SGD(parameters, lr=0.06, momentum=0.9, weight_decay=5e-4), NegativeCosineSimilarity()

    def steps() -> Any:
        for views, _ in loader:
            update_momentum(online, target, 0.99)
            update_momentum(projector, target_projector, 0.99)
            x = [v.contiguous(memory_format=torch.channels_last) for v in views]
            with torch.autocast("cpu", torch.bfloat16):
                p = [predictor(projector(online(v))) for v in x]
                with torch.no_grad():
                    z = [target_projector(target(v)) for v in x]
                loss = 0.5 * (criterion(p[0].float(), z[1].float()) + criterion(p[1].float(), z[0].float()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss

    return clock(steps())


if __name__ == "__main__":
    typer.run(main)
