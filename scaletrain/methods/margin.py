"""Margin contrastive loss over two views (Hadsell et al., 2006, Dimensionality Reduction by
Learning an Invariant Mapping).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from scaletrain.config.schema import ComponentConfig, Count, Positive
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, RunInfo
from scaletrain.methods.base import Projected
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import pooled
from scaletrain.ops.distances import pair_distances


class Config(ComponentConfig):
    hidden: Count = 2048
    dim: Count = 128
    margin: Positive = 1.0
    """Distance that views of different samples should keep, alpha; distances are up to 2."""

    squared: bool = True
    """Square both terms, as Hadsell et al. do; false: plain distances, as in textbooks."""

    miniature: ClassVar[Mapping[str, Any]] = {"hidden": 24, "dim": 8}


class Model(Projected):
    """Views of one sample attract, views of different samples repel until they are `margin` apart.
    A small baseline.
    """

    kind = "joint"
    two_views = True
    global_loss = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        def projector(width: int) -> nn.Module:
            return mlp((width, config.hidden, config.dim), group=run_info.norm_group)

        super().__init__(make_backbone, projector, run_info)
        self.config = config

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        h = pooled(self.backbone, batch.views[0])
        loss, scalars = self._loss(pooled(self.projector, h))
        return MethodOutput({"all": loss}, scalars, h[0].detach())

    def _loss(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        positive, others, counts = pair_distances(z, squared=False)
        # max(0, alpha - d(A, B))
        short = (self.config.margin - others).clamp_min(0) * counts
        power = 2 if self.config.squared else 1
        negatives = counts.sum(1)
        # differs: means over positives and over negatives are added up; a mean over all pairs would
        # be one of negatives alone.
        loss = (positive**power).mean() + ((short**power).sum(-1) / negatives).mean()
        scalars = {
            "positive_distance": positive.detach().mean(),
            "negative_distance": ((others.detach() * counts).sum(-1) / negatives).mean(),
            # share inside the margin
            "active_negatives": ((short.detach() > 0).sum(-1) / negatives).mean(),
        }

        return loss, scalars
