"""Toy: a student learns the class probabilities of a trained teacher (Hinton et al., 2015, arXiv
1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.config.fields import Place
from scaletrain.config.schema import ComponentConfig, Count
from scaletrain.core import Backbone, Batch, Clock, Method, MethodOutput, RunInfo, Source
from scaletrain.nn.norm import pooled


class Config(ComponentConfig):
    classes: Count = 5
    teacher: Place = ""

    miniature: ClassVar[Mapping[str, Any]] = {"classes": 5}


class Model(Method):
    """The teacher is a constant encoder with its classifier, from a run of supervised training."""

    kind = "distillation"
    constant = ("teacher", "teacher_head")

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone, self.teacher = make_backbone(), make_backbone()
        width = self.backbone.features
        self.classifier, self.teacher_head = (
            nn.Sequential(nn.Linear(width, config.classes)) for _ in range(2)
        )

    def sources(self) -> Mapping[str, Source]:
        path = Path(self.config.teacher)
        return {"teacher": Source(path), "teacher_head": Source(path, "head")}

    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.backbone(x))
        return logits

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        h = pooled(self.backbone, batch.views[0])
        with torch.no_grad():
            wanted = self.teacher_head(self.teacher(batch.views[0].flatten(0, 1))).softmax(1)

        return MethodOutput(
            {"all": F.cross_entropy(self.classifier(h.flatten(0, 1)), wanted)}, {}, h[0].detach()
        )
