"""Supervised classification, the baseline of SimCLR's paper (Chen et al., 2020, arXiv 2002.05709,
section 3 and table 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scaletrain.config.schema import ComponentConfig, Count
from scaletrain.core import Backbone, Batch, Clock, Method, MethodOutput, RunInfo
from scaletrain.nn.norm import pooled
from scaletrain.ops.classification import cross_entropy


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
        loss, accuracy = cross_entropy(self.classifier(torch.cat(h)), batch.labels)
        return MethodOutput({"all": loss}, {"accuracy": accuracy}, h[0][0].detach())

    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.backbone(x))
        return logits
