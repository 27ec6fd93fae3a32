"""Training steps as one would write them by hand: torchvision's network, torch's own batch norm,
SGD and one forward per view.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks.gpu.report import Settings

CLASSES, HIDDEN, DIM, TAU = 1000, 4096, 256, 0.99


class BYOL(nn.Module):
    """Online and target network; `forward` is the loss of two views [2, B, 3, H, W]."""

    def __init__(self, encoder: Callable[[], nn.Module], features: int) -> None:
        super().__init__()

        def head(width: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(width, HIDDEN),
                nn.BatchNorm1d(HIDDEN),
                nn.ReLU(inplace=True),
                nn.Linear(HIDDEN, DIM),
            )

        self.online, self.target = (nn.Sequential(encoder(), head(features)) for _ in range(2))
        self.predictor = head(DIM)
        self.target.requires_grad_(False)

    def forward(self, views: Tensor) -> Tensor:
        q = [self.predictor(self.online(view)) for view in views]
        with torch.no_grad():
            z = [self.target(view) for view in views]

        first, second = (
            2 - 2 * F.cosine_similarity(a.float(), b.float()).mean()
            for a, b in zip(q, reversed(z), strict=True)
        )
        return first + second

    @torch.no_grad()
    def move_target(self) -> None:
        online: list[Tensor] = list(self.online.parameters())
        target: list[Tensor] = list(self.target.parameters())
        torch._foreach_lerp_(target, online, 1 - TAU)


def step(
    settings: Settings, method: str, batch: int, *, compiled: bool = False
) -> Callable[[], None]:
    """A step of `supervised` or `byol` with a batch in pinned memory, bf16, channels_last."""
    features, size = (512, 32) if settings.tiny else (2048, 224)

    def encoder() -> nn.Module:
        models = torchvision.models
        network: nn.Module = models.resnet18() if settings.tiny else models.resnet50()
        network.fc = nn.Identity()
        return network

    views = 2 if method == "byol" else 1
    model = (
        BYOL(encoder, features)
        if method == "byol"
        else nn.Sequential(encoder(), nn.Linear(features, CLASSES))
    )
    model.to(settings.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9
    )

    host = torch.randint(0, 256, (views, batch, size, size, 3), dtype=torch.uint8)
    host = host.pin_memory() if settings.cuda else host
    labels = torch.randint(0, CLASSES, (batch,), device=settings.device)

    def train() -> None:
        x = host.to(settings.device, non_blocking=True).permute(0, 1, 4, 2, 3).float().div_(255)
        with torch.autocast(settings.device.type, torch.bfloat16):
            loss = (
                forward(x)
                if isinstance(model, BYOL)
                else F.cross_entropy(forward(x[0]).float(), labels)
            )

        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if isinstance(model, BYOL):
            model.move_target()

    return train
