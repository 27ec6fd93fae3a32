"""SuNCEt: a contrastive loss for few labels (Assran et al., 2020, arXiv 2006.10803, eq. 2), after
facebookresearch/suncet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain import dist
from scaletrain.auxiliaries.base import Auxiliary
from scaletrain.config.schema import ComponentConfig, Positive
from scaletrain.core import Batch, Clock, Method, MethodOutput, RunInfo
from scaletrain.nn.norm import pooled
from scaletrain.ops.precision import full_precision


class Config(ComponentConfig):
    weight: Positive = 1.0
    """Weight of the loss, lambda."""

    temperature: Positive = 0.1

    miniature: ClassVar[Mapping[str, Any]] = {"temperature": 0.2}


class Model(Auxiliary):
    """Labelled samples find their class among the others of the step, in the space of the method's
    projections.

    data.support says which samples, and for how many epochs: a batch without them has no such loss.
    """

    global_loss = True

    def __init__(self, config: Config, method: Method, run_info: RunInfo) -> None:
        super().__init__()
        if not run_info.support:
            raise ValueError(
                "suncet needs labelled samples: set data.support, e.g. data.support.labels=FILE of "
                "scaletrain shards subset"
            )
        if not isinstance(getattr(method, "projector", None), nn.Module):
            raise ValueError("suncet needs a method with a projector, such as simclr or swav")

        self.config = config

    def forward(self, method: Method, batch: Batch, clock: Clock) -> MethodOutput:
        if batch.support is None:
            return MethodOutput({})

        assert batch.support.labels is not None
        # differs: the authors forward both views and the labelled images as one, so that these
        # share their statistics.
        h = pooled(method.backbone, batch.support.views[0], method.encode)
        projector: nn.Module = method.projector  # type: ignore[assignment]
        loss, scalars = self._loss(pooled(projector, h)[0], batch.support.labels)
        return MethodOutput({"suncet": self.config.weight * loss}, scalars)

    @full_precision
    def _loss(self, z: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """z [b, D], labels [b], -1 for a sample that must not be used."""
        z = F.normalize(z, dim=-1)
        # Z_S with gradient
        every, others = dist.gather(z), dist.gather_nograd(labels)
        place = dist.rank() * len(z) + torch.arange(len(z), device=z.device)
        # Z_S without z
        candidate = ~F.one_hot(place, len(every)).bool() & (others >= 0)
        # Z_y
        same = candidate & (labels[:, None] == others)
        # a class of one sample would cost infinitely much
        anchor = same.any(1)
        logits = (z @ every.T / self.config.temperature).masked_fill(~candidate, float("-inf"))
        # what is no anchor is left out of the sum below, and kept finite for its gradient's sake
        logits = logits.masked_fill(~anchor[:, None], 0.0)

        log_p = logits.masked_fill(~same & anchor[:, None], float("-inf")).logsumexp(
            1
        ) - logits.logsumexp(1)
        count = dist.sum_nograd(anchor.sum()).clamp_min(1)
        loss = -(log_p * anchor).sum() * dist.world() / count
        nearest = others[logits.detach().argmax(1)] == labels
        scalars = {
            # of the right class
            "suncet_probability": (log_p.detach().exp() * anchor).sum() / anchor.sum().clamp_min(1),
            "suncet_anchors": anchor.to(z).mean(),
            # nearest samples of the right class
            "suncet_neighbours": (nearest & anchor).sum() / anchor.sum().clamp_min(1),
        }

        return loss, scalars
