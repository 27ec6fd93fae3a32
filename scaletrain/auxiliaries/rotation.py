"""Rotation prediction for any method (Addepalli et al., 2022, arXiv 2210.09866; its task:
Gidaris et al., 1803.07728).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from scaletrain import rng
from scaletrain.auxiliaries.base import Auxiliary
from scaletrain.config.schema import ComponentConfig, Count, Positive
from scaletrain.core import Batch, Clock, Method, MethodOutput, RunInfo
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import pooled
from scaletrain.ops.precision import full_precision
from scaletrain.ops.turns import turned


class Config(ComponentConfig):
    weight: Positive = 0.2
    """Weight of the loss, lambda."""

    hidden: Count = 2048
    views: Count = 2
    """Number of large views that are rotated; all of them if there are fewer."""

    miniature: ClassVar[Mapping[str, Any]] = {"hidden": 24, "weight": 0.5}


class Model(Auxiliary):
    """Each large view is turned by a multiple of 90 degrees, and a head on its features predicts
    which one.

    The views are cropped, flipped and coloured already: a flip after the turn would swap 90 and 270
    degrees. The method's own views stay upright, so that its invariances stay what they are.
    """

    def __init__(self, config: Config, method: Method, run_info: RunInfo) -> None:
        super().__init__()
        self.config = config
        self.head = mlp((method.backbone.features, config.hidden, 4), group=run_info.norm_group)

    def forward(self, method: Method, batch: Batch, clock: Clock) -> MethodOutput:
        x = batch.views[0][: self.config.views]  # [M, B, 3, H, W]
        turns = (
            (4 * rng.uniform(batch.keys, "rotation", len(x))).long().T
        )  # [M, B]: quarter turns, t_k
        logits = pooled(
            self.head, pooled(method.backbone, turned(x, turns), method.encode)
        )  # [M, B, 4]
        accuracy = (logits.detach().argmax(-1) == turns).float().mean()
        # The poster's 1/(2B) sum over both views. differs: the authors' code adds the views up;
        # their lambda .1 is .2 here.
        loss = self.config.weight * cross_entropy(logits.flatten(0, 1), turns.flatten())

        return MethodOutput({"rotation": loss}, {"rotation_accuracy": accuracy})


@full_precision
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)
