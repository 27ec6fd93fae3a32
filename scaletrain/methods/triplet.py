"""Triplet loss over two views (Schroff et al., 2015, FaceNet, arXiv 1503.03832, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

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
    margin: Positive = 0.2
    """Margin between the two distances, alpha; squared distances are up to 4."""

    squared: bool = True
    """Square the distances, as FaceNet does; false: plain distances, as in textbooks."""

    negatives: Literal["all", "hardest"] = "all"
    """Which negatives of the global batch count for an anchor and its positive."""

    miniature: ClassVar[Mapping[str, Any]] = {"hidden": 24, "dim": 8}


class Model(Projected):
    """A view is to be closer to its sample's other view than to any view of another sample, by a
    margin. A small baseline.
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
        positive, others, counts = pair_distances(z, squared=self.config.squared)
        negatives = counts.sum(1)
        nearest = others.masked_fill(~counts, float("inf")).amin(-1)  # [2, b]
        if self.config.negatives == "hardest":
            hinge = (positive - nearest + self.config.margin).clamp_min(0)
            active = hinge > 0
        else:  # max{0, d(A, P) - d(A, N) + alpha} for every N
            each = (positive[..., None] - others + self.config.margin).clamp_min(0) * counts
            hinge, active = each.sum(-1) / negatives, (each > 0).sum(-1) / negatives

        scalars = {
            "positive_distance": positive.detach().mean(),
            "negative_distance": ((others.detach() * counts).sum(-1) / negatives).mean(),
            "nearest_negative_distance": nearest.detach().mean(),
            # share that violates the margin
            "active_triplets": active.to(positive.dtype).mean(),
        }

        return hinge.mean(), scalars
