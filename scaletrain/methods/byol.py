"""BYOL: Bootstrap Your Own Latent (Grill et al., 2020, arXiv 2006.07733), after
deepmind-research/byol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from scaletrain.config.schema import ComponentConfig, Count, Share
from scaletrain.config.schema import Config as Run
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, RunInfo
from scaletrain.methods.base import WithTarget
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import per_view
from scaletrain.ops.contrastive import cosine_distance, similarities
from scaletrain.ops.masking import on_grey


class Config(ComponentConfig):
    hidden: Count = 4096
    dim: Count = 256
    tau: Share = 0.996
    """Decay of the target's moving average at the start; it rises to 1 (tau_base)."""

    mask_probability: Share = 0.0
    """Probability of removing a view's background, a study of ReLICv2; needs
    data.foreground.masks.
    """

    mask_minimum: Share = 0.1
    """Smallest share of a view that the foreground must cover for that."""

    miniature: ClassVar[Mapping[str, Any]] = {"hidden": 24, "dim": 8, "tau": 0.9}

    def fits(self, run: Run) -> None:
        if self.mask_probability and not run.data.masked:
            raise ValueError(
                "method.mask_probability needs the foreground; add data.foreground.masks=true"
            )


class Model(WithTarget):
    """Two views; the online network predicts the target network's projection of the other view."""

    kind = "joint"
    two_views = True

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

        # The target has its own initialisation: it is not a copy of the online network (official
        # code).
        self.add_target(make_backbone, projector)

    def ema(self, clock: Clock) -> float:
        # tau_k = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2
        return clock.cosine(self.config.tau, 1.0)

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        x, masked = on_grey(
            batch, self.config.mask_probability, self.config.mask_minimum
        )  # [2, B, 3, H, W]
        y = per_view(self.backbone, x)
        q1, q2 = per_view(self.predictor, per_view(self.projector, y))

        with torch.no_grad():
            z1, z2 = per_view(self.target_projector, per_view(self.target_backbone, x))

        # eq. 2 and its mirror image, summed
        loss = cosine_distance(q1, z2) + cosine_distance(q2, z1)
        return MethodOutput(
            {"all": loss}, similarities(q1, z2) | {"masked_views": masked.mean()}, y[0].detach()
        )
