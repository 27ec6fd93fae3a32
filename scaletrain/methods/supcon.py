"""Supervised contrastive learning (Khosla et al., 2020, arXiv 2004.11362, eq. 2: L_out), after
HobbitLong/SupContrast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain import dist
from scaletrain.config.schema import ComponentConfig, Count, Positive
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, RunInfo
from scaletrain.methods.base import Projected
from scaletrain.nn.heads import plain
from scaletrain.nn.norm import pooled
from scaletrain.ops.precision import full_precision


class Config(ComponentConfig):
    hidden: Count = 2048
    dim: Count = 128
    temperature: Positive = 0.1
    base_temperature: Positive = 0.07
    """The authors' code multiplies the loss by temperature / base_temperature; the paper does
    not.
    """

    miniature: ClassVar[Mapping[str, Any]] = {"hidden": 24, "dim": 8}


class Model(Projected):
    """All views of all samples of a class attract, the views of the other classes repel: an upper
    reference.
    """

    kind = "joint"
    two_views = True
    global_loss = True
    classes = 0

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        super().__init__(
            make_backbone, lambda width: plain((width, config.hidden, config.dim)), run_info
        )
        self.config = config

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        assert batch.labels is not None
        h = pooled(self.backbone, batch.views[0])
        loss, scalars = self._loss(pooled(self.projector, h), batch.labels)
        return MethodOutput({"all": loss}, scalars, h[0].detach())

    @full_precision
    def _loss(self, z: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = F.normalize(z, dim=-1).transpose(
            0, 1
        )  # [b, V, D]: samples first, as they lie in the global batch
        every = dist.gather(z).flatten(0, 1)  # [B V, D], A(i) and i itself
        anchors, views = z.flatten(0, 1), z.shape[1]
        own = labels.repeat_interleave(views)
        others = dist.gather_nograd(labels).repeat_interleave(views)
        place = dist.rank() * len(anchors) + torch.arange(len(anchors), device=z.device)
        itself = F.one_hot(place, len(every)).bool()

        # P(i)
        positive = (own[:, None] == others) & ~itself
        similarity = anchors @ every.T
        logits = similarity / self.config.temperature
        log_p = logits - logits.masked_fill(itself, float("-inf")).logsumexp(1, keepdim=True)
        # at least the sample's other view is in P(i)
        loss = -(log_p * positive).sum(1) / positive.sum(1)
        scalars = {
            "positive_similarity": _mean(similarity, positive),
            "negative_similarity": _mean(similarity, own[:, None] != others),
            "positives": positive.sum(1).to(z).mean(),
        }

        return loss.mean() * (self.config.temperature / self.config.base_temperature), scalars


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values.detach() * where).sum() / where.sum().clamp_min(1)
