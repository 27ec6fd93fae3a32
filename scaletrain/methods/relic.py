"""ReLIC: Invariant Causal Mechanisms (Mitrovic et al., 2020, arXiv 2010.07922), with a target
network.

No pretraining code was published; networks and optimizer are BYOL's, as the paper says of its
better variant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scaletrain import dist
from scaletrain.config.schema import ComponentConfig, Count, Positive, Share
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, RunInfo
from scaletrain.methods.base import WithTarget
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import per_view
from scaletrain.ops.contrastive import similarities
from scaletrain.ops.precision import full_precision


class Config(ComponentConfig):
    hidden: Count = 4096
    dim: Count = 256
    tau: Share = 0.996
    """Decay of the target's moving average at the start; it rises to 1."""

    temperature: Positive = 0.1
    """Temperature of the softmax; not verified."""

    alpha: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the invariance; not verified."""

    # at a temperature of .1, rounding errors grow fiftyfold
    miniature: ClassVar[Mapping[str, Any]] = {
        "hidden": 24,
        "dim": 8,
        "tau": 0.9,
        "temperature": 0.3,
    }


class Model(WithTarget):
    """Each view finds its sample among all of the global batch, with the same distribution under
    both pairs of views.
    """

    kind = "joint"
    two_views = True
    global_loss = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        def projector(width: int) -> nn.Module:
            return mlp(
                (width, config.hidden, config.dim), last_bias=False, group=run_info.norm_group
            )

        super().__init__(make_backbone, projector, run_info)
        self.config = config
        self.predictor = mlp(
            (config.dim, config.hidden, config.dim), last_bias=False, group=run_info.norm_group
        )
        self.add_target(make_backbone, projector)

    def ema(self, clock: Clock) -> float:
        return clock.cosine(self.config.tau, 1.0)

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        x = batch.views[0]  # [2, B, 3, H, W]
        y = per_view(self.backbone, x)
        online = per_view(self.predictor, per_view(self.projector, y))
        with torch.no_grad():
            target = per_view(self.target_projector, per_view(self.target_backbone, x))

        contrast, invariance, accuracy = self._loss(online, target)
        scalars = {
            "contrast": contrast.detach(),
            "invariance": invariance.detach(),
            "contrast_accuracy": accuracy,
        }
        scalars |= similarities(online[0], target[1])

        return MethodOutput(
            {"all": contrast + self.config.alpha * invariance}, scalars, y[0].detach()
        )

    @full_precision
    def _loss(self, online: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[2, B, dim] each -> both directions' sum of -log p and of KL(p || p'), and the share
        of samples whose own target is the most similar.
        """
        o, t = F.normalize(online, dim=-1), F.normalize(target, dim=-1)
        own = dist.rank() * o.shape[1] + torch.arange(o.shape[1], device=o.device)
        every = dist.gather_nograd(t.transpose(0, 1)).transpose(0, 1)  # [2, B global, dim]
        # log p(Y = j | x_i) of a view among the other view's targets: the positive and all
        # negatives of the batch
        log_p = F.log_softmax(
            o @ every.flip(0).transpose(1, 2) / self.config.temperature, dim=-1
        )  # [2, b, B]

        contrast = F.nll_loss(log_p.flatten(0, 1), own.repeat(2)) * 2
        # differs: the paper does not say where the divergence stops the gradient; here in its
        # second argument (not verified).
        fixed = log_p.detach().flip(0)
        invariance = (log_p.exp() * (log_p - fixed)).sum(-1).mean(1).sum()
        return contrast, invariance, (log_p.detach().argmax(-1) == own).float().mean()
