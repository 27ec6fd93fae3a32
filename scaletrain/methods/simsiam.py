"""SimSiam: simple siamese networks (Chen and He, 2020, arXiv 2011.10566), after
facebookresearch/simsiam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.config.schema import ComponentConfig, Count
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, ParameterGroup, RunInfo
from scaletrain.methods.base import Projected
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import per_view
from scaletrain.ops.contrastive import cosine_distance, similarities
from scaletrain.ops.precision import full_precision


class Config(ComponentConfig):
    hidden: Count = 2048
    dim: Count = 2048
    bottleneck: Count = 512
    """Hidden width of the predictor."""

    # with narrower layers, rounding errors grow a hundredfold
    miniature: ClassVar[Mapping[str, Any]] = {"hidden": 24, "dim": 16, "bottleneck": 4}


class Model(Projected):
    """Two views; the prediction of each meets the other's projection, which carries no gradient."""

    kind = "joint"
    two_views = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        # differs: the authors' last layer has a frozen bias, which the norm behind it takes away.
        def projector(width: int) -> nn.Module:
            return mlp(
                (width, config.hidden, config.hidden, config.dim),
                hidden_bias=False,
                last_bias=False,
                last_norm="plain",
                group=run_info.norm_group,
            )

        super().__init__(make_backbone, projector, run_info)
        self.predictor = mlp(
            (config.dim, config.bottleneck, config.dim),
            hidden_bias=False,
            group=run_info.norm_group,
        )

    def groups(self) -> Sequence[ParameterGroup]:
        # --fix-pred-lr
        return [
            ParameterGroup(
                "predictor", lambda name, _: name.startswith("predictor."), constant=True
            )
        ]

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        y = per_view(self.backbone, batch.views[0])  # [2, B, width]
        z = per_view(self.projector, y)
        p1, p2 = per_view(self.predictor, z)
        z1, z2 = z.detach()
        # Eq. 2: D(p1, sg z2) / 2 + D(p2, sg z1) / 2 with D = -cos, which is -1 + |.|^2 / 2 of unit
        # vectors.
        loss = (cosine_distance(p1, z2) + cosine_distance(p2, z1)) / 4 - 1

        return MethodOutput(
            {"all": loss}, {"spread": spread(z1)} | similarities(p1, z2), y[0].detach()
        )


@full_precision
def spread(z: Tensor) -> Tensor:
    """Standard deviation of z / |z| in a channel, mean over channels, times sqrt(D): near 1, and 0
    in collapse (figure 2).
    """
    deviation = F.normalize(z, dim=-1).std(0, correction=0).mean()
    return deviation * math.sqrt(z.shape[1])
