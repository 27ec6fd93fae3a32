"""Supervised fine-tuning of an encoder, after SwAV (Caron et al., 2020, arXiv 2006.09882).

On all labels or a few: the semi-supervised protocols of facebookresearch/swav (eval_semisup.py) and
of BYOL (Grill et al., 2020, arXiv 2006.07733, appendix C.1), and BYOL's transfer (appendix D).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from scaletrain.config.fields import Place
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import ComponentConfig, Count, Positive
from scaletrain.core import (
    Backbone,
    Batch,
    Clock,
    Method,
    MethodOutput,
    ParameterGroup,
    RunInfo,
    Source,
)
from scaletrain.nn.norm import BatchNorm, pooled
from scaletrain.ops.classification import cross_entropy


class Config(ComponentConfig):
    source: Literal["none"] | Place = ""
    """Where the encoder comes from: a run, a step of its checkpoints, or a safetensors file; none:
    newly drawn weights, for the baseline without pretraining.
    """

    classes: Count = 1000
    head_lr: Positive = 1.0
    """Learning rate of the classifier, relative to that of the encoder."""

    norm_rule: bool = True
    """Momentum of the encoder's running statistics at most 10 / s, s being the steps of an epoch
    (BYOL, appendix D); false: that of the network, whatever s.
    """

    miniature: ClassVar[Mapping[str, Any]] = {"classes": 5, "source": "none", "head_lr": 5.0}


class Model(Method):
    """Encoder and classifier are trained together; the classifier starts at zero."""

    kind = "evaluation"

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        super().__init__()
        self.config, self.classes = config, config.classes
        self.backbone = make_backbone()
        self.classifier = nn.Linear(self.backbone.features, config.classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

        if config.norm_rule:
            for module in self.backbone.modules():
                if isinstance(module, BatchNorm):
                    module.momentum = min(module.momentum, 10 / run_info.steps_per_epoch)

    def sources(self) -> Mapping[str, Source]:
        if not self.config.source:
            raise ConfigError(
                "method.source is empty: give the run, step or file whose encoder is fine-tuned, "
                "or none to train from newly drawn weights"
            )

        return (
            {} if self.config.source == "none" else {"backbone": Source(Path(self.config.source))}
        )

    def groups(self) -> Sequence[ParameterGroup]:
        return [
            ParameterGroup(
                "head", lambda name, _: name.startswith("classifier."), lr=self.config.head_lr
            )
        ]

    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.backbone(x))
        return logits

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        assert batch.labels is not None
        h = [pooled(self.backbone, x) for x in batch.views]
        loss, accuracy = cross_entropy(self.classifier(torch.cat(h)), batch.labels)
        return MethodOutput({"all": loss}, {"accuracy": accuracy}, h[0][0].detach())
