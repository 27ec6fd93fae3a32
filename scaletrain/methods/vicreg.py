"""VICReg: variance, invariance, covariance (Bardes et al., 2021, arXiv 2105.04906), after
facebookresearch/vicreg.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain import dist
from scaletrain.config.schema import ComponentConfig, Count, Positive
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, RunInfo
from scaletrain.methods.base import Projected
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import per_view
from scaletrain.ops.contrastive import similarities
from scaletrain.ops.precision import full_precision


class Config(ComponentConfig):
    hidden: Count = 8192
    dim: Count = 8192
    invariance: Positive = 25.0
    variance: Positive = 25.0
    covariance: Positive = 1.0

    miniature: ClassVar[Mapping[str, Any]] = {"hidden": 24, "dim": 8}


class Model(Projected):
    """Two views agree, while the channels of each keep their variance and lose their covariance
    over the global batch.
    """

    kind = "joint"
    two_views = True
    global_loss = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        if run_info.batch < 2:
            raise ValueError("vicreg needs a variance over samples: set batch to at least 2")

        def projector(width: int) -> nn.Module:
            return mlp(
                (width, config.hidden, config.hidden, config.dim),
                last_bias=False,
                group=run_info.norm_group,
            )

        super().__init__(make_backbone, projector, run_info)
        self.config = config

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        y = per_view(self.backbone, batch.views[0])
        z = per_view(self.projector, y)
        invariance, variance, covariance = self._loss(z)
        config = self.config
        loss = (
            config.invariance * invariance
            + config.variance * variance
            + config.covariance * covariance
        )

        parts = {"invariance": invariance, "variance": variance, "covariance": covariance}
        scalars = {name: part.detach() for name, part in parts.items()} | similarities(z[0], z[1])
        return MethodOutput({"all": loss}, scalars, y[0].detach())

    @full_precision
    def _loss(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [2, B, D] -> s, the mean of both views' v and the sum of both views' c (eq. 1, 3, 5;
        weighed as in the code).
        """
        invariance = F.mse_loss(
            z[0], z[1]
        )  # differs: eq. 5 sums over channels, the code takes their mean
        variance, covariance = zip(*(_moments(view) for view in z), strict=True)

        return invariance, torch.stack(variance).mean(), torch.stack(covariance).sum()


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """z [b, D] -> the hinge on the standard deviations and the mean over channels of the squared
    covariances.
    """
    every = dist.gather(z)
    every = every - every.mean(0)
    samples, channels = every.shape
    variance = every.square().sum(0) / (samples - 1)
    # |X'X| = |XX'| for the Frobenius norm: B x B products, of which each rank computes its own
    # rows, and no D x D matrix.
    squares = (dist.mine(every) @ every.T).square().sum() * dist.world() / (samples - 1) ** 2

    return F.relu(1 - (variance + 1e-4).sqrt()).mean(), (
        squares - variance.square().sum()
    ) / channels
