"""Toys: an adversary with two losses, each driving its own parameter group only (GAN-like pretexts
need this), and a moment.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from scaletrain import dist
from scaletrain.config.schema import Config
from scaletrain.core import Batch, Clock, Method, MethodOutput, ParameterGroup
from scaletrain.engines.base import Engine
from scaletrain.nn import resnet
from scaletrain.nn.norm import per_view

ADVERSARY, MOMENT = "toy_adversary", "toy_moment"


class Toy(Method):
    """The encoder hides which view it saw; the critic finds out. A global moment makes the loss
    couple all samples.
    """

    separate_losses = True
    global_loss = True

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.backbone = resnet.ResNet(cfg.model)
        self.critic = nn.Sequential(
            nn.Linear(self.backbone.features, 16), nn.ReLU(), nn.Linear(16, 2)
        )

    def groups(self) -> Sequence[ParameterGroup]:
        return [
            ParameterGroup(
                "critic", lambda name, _: name.startswith("critic."), lr=0.5, constant=True
            ),
            ParameterGroup("encoder", lambda name, _: name.startswith("backbone.")),
        ]

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        h = per_view(self.backbone, batch.views[0])  # [2, B, D]
        label = torch.arange(2).repeat_interleave(len(batch))
        loss = F.cross_entropy(self.critic(h.flatten(0, 1)), label)
        rows = len(batch) * dist.world()
        mean = dist.psum(h.sum(1)) / rows  # [2, D] over the global batch
        return MethodOutput(
            {
                "critic": loss,
                "encoder": -loss + (mean[0] - mean[1]).square().sum() + mean.square().sum(),
            }
        )


class Moment(Toy):
    """The same in a single loss, for engines that take one backward pass."""

    separate_losses = False

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        losses = super().forward(batch, clock).losses
        return MethodOutput({"all": 2 * losses["critic"] + losses["encoder"]})


TOYS = {ADVERSARY: Toy, MOMENT: Moment}


def toy_engine(cfg: Config, toy: str = ADVERSARY) -> Engine:
    torch.manual_seed(cfg.seed)
    engine = importlib.import_module(f"scaletrain.engines.{cfg.engine.name}")
    return engine.Engine(TOYS[toy](cfg), cfg.engine, cfg.optim, torch.device("cpu"))  # type: ignore[no-any-return]
