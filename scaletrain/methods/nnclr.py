"""NNCLR: nearest neighbours as positives (Dwibedi et al., 2021, arXiv 2104.14548). No code is
published; after solo-learn.
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
from scaletrain.nn.bank import Queue
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import per_view
from scaletrain.ops.contrastive import similarities
from scaletrain.ops.precision import full_precision


class Config(ComponentConfig):
    hidden: Count = 2048
    dim: Count = 256
    predictor: Count = 4096
    """Hidden width of the predictor."""

    queue: Count = 98304
    """Size of the support set; not verified."""

    temperature: Positive = 0.1
    """Temperature of the softmax; not verified."""

    miniature: ClassVar[Mapping[str, Any]] = {"hidden": 24, "dim": 8, "predictor": 16, "queue": 30}


class Model(Projected):
    """A view's nearest neighbour among earlier embeddings must find the prediction from the
    sample's other view.
    """

    kind = "joint"
    two_views = True
    global_loss = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        def projector(width: int) -> nn.Module:
            return mlp(
                (width, config.hidden, config.hidden, config.dim),
                last_norm="full",
                group=run_info.norm_group,
            )

        super().__init__(make_backbone, projector, run_info)
        self.config, self.batch = config, run_info.batch
        self.predictor = mlp((config.dim, config.predictor, config.dim), group=run_info.norm_group)
        self.queue = Queue(config.queue, config.dim, noise=True)

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        h = per_view(self.backbone, batch.views[0])  # [2, B, features]
        z = per_view(self.projector, h)
        loss, scalars = self._loss(z, per_view(self.predictor, z))
        return MethodOutput(
            {"all": loss}, scalars | {"queue_age": self.queue.age(self.batch)}, h[0].detach()
        )

    @full_precision
    def _loss(self, z: Tensor, p: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 3, mean of both directions. differs: the paper may add the transposed term; that is
        not verified.
        """
        z, p = F.normalize(z.detach(), dim=-1), F.normalize(p, dim=-1)
        # the queue of before this step
        nearest = [self._nearest(view) for view in z]
        # one view only
        self.queue.push(z[0])

        losses, hits = zip(
            self._direction(nearest[0], p[1]), self._direction(nearest[1], p[0]), strict=True
        )
        scalars = {
            "neighbour_similarity": torch.stack(
                [(n * x).sum(1).mean() for n, x in zip(nearest, z, strict=True)]
            ).mean(),
            "contrast_accuracy": torch.stack(hits).mean(),
        } | similarities(nearest[0], p[1])

        return torch.stack(losses).mean(), scalars

    def _nearest(self, z: Tensor) -> Tensor:
        """[b, dim] -> the queue's most similar rows [b, dim]."""
        rows = self.queue.rows.to(z)
        return rows[(z @ rows.T).argmax(1)]

    def _direction(self, n: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        logits = n @ dist.gather(p).T / self.config.temperature  # [b, B global]
        label = dist.rank() * len(n) + torch.arange(len(n), device=n.device)
        return F.cross_entropy(logits, label), (logits.argmax(1) == label).to(n.dtype).mean()
