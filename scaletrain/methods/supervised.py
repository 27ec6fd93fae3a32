"""Supervised classification, the baseline of SimCLR's paper (Chen et al., 2020, arXiv 2002.05709,
section 3 and table 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.config.schema import ComponentConfig, Count
from scaletrain.core import Backbone, Batch, Clock, Method, MethodOutput, RunInfo
from scaletrain.nn.norm import pooled
from scaletrain.ops.precision import full_precision


class Config(ComponentConfig):
    classes: Count = 1000

    miniature: ClassVar[Mapping[str, Any]] = {"classes": 5}


class Model(Method):
    """Every view of a sample is classified by one linear layer on the encoder."""

    kind = "supervised"

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        super().__init__()
        self.classes = config.classes
        self.backbone = make_backbone()
        self.classifier = nn.Linear(self.backbone.features, config.classes)

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        assert batch.labels is not None
        h = [pooled(self.backbone, x) for x in batch.views]
        loss, accuracy = self._loss(self.classifier(torch.cat(h)), batch.labels)
        return MethodOutput({"all": loss}, {"accuracy": accuracy}, h[0][0].detach())

    @full_precision
    def _loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[V, B, classes], [B] -> cross entropy and share of right answers, means over views and
        samples.
        """
        accuracy = (logits.detach().argmax(-1) == labels).float().mean()
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))), accuracy
