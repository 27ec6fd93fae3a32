"""RotNet (Gidaris et al., 2018, arXiv 1803.07728), after gidariss/FeatureLearningRotNet."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.config.schema import ComponentConfig
from scaletrain.core import Backbone, Batch, Clock, Method, MethodOutput, RunInfo
from scaletrain.nn.norm import pooled
from scaletrain.ops.precision import full_precision
from scaletrain.ops.turns import turned

# quarter turns
TURNS = 4


class Config(ComponentConfig):
    pass


class Model(Method):
    """A batch has all four turns of every view, and one linear layer tells them apart.

    Views are cropped and flipped before they are turned: a flip afterwards would swap 90 and 270
    degrees.
    """

    kind = "pretext"

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        super().__init__()
        self.backbone = make_backbone()
        self.classifier = nn.Linear(self.backbone.features, TURNS)

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        features = [self._features(x) for x in batch.views]
        loss, accuracy = self._loss(self.classifier(torch.cat(features, dim=1)))
        return MethodOutput({"all": loss}, {"accuracy": accuracy}, features[0][0, 0].detach())

    def _features(self, x: Tensor) -> Tensor:
        """Views [V, B, 3, H, W] -> [4, V, B, D], with statistics shared by all turns and views."""
        every = x.expand(TURNS, *x.shape)
        h = pooled(self.backbone, turned(every, _turns(every)).flatten(0, 1))

        return h.view(TURNS, len(x), *h.shape[1:])

    @full_precision
    def _loss(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[4, V, B, 4] -> cross entropy and share of right answers, means over turns, views and
        samples.
        """
        turns = _turns(logits)
        accuracy = (logits.detach().argmax(-1) == turns).float().mean()

        return F.cross_entropy(logits.flatten(0, 2), turns.flatten()), accuracy


def _turns(x: Tensor) -> Tensor:
    """[4, V, B, ...] -> [4, V, B]: by how many quarter turns each image is turned."""
    return torch.arange(TURNS, device=x.device)[:, None, None].expand(x.shape[:3])
