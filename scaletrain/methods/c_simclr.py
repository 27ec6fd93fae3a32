"""C-SimCLR, compressed (Lee et al., 2021, arXiv 2109.12909), after
google-research/compressive-visual-representations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scaletrain import dist
from scaletrain.config.schema import ComponentConfig, Count, Positive
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, RunInfo
from scaletrain.methods.base import Projected
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import pooled
from scaletrain.nn.vmf import VonMisesFisher
from scaletrain.ops.contrastive import similarities
from scaletrain.ops.precision import full_precision


class Config(ComponentConfig):
    hidden: Count = 4096
    dim: Annotated[int, Field(ge=2)] = 256
    kappa_e: Positive = 1024.0
    """Concentration of e(z | x), the encoding of a view."""

    kappa_b: Positive = 10.0
    """Concentration of b(z | y), its prediction from the other view: 1 / the temperature."""

    beta: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the compression."""

    miniature: ClassVar[Mapping[str, Any]] = {"hidden": 24, "dim": 8, "kappa_e": 40.0}


class Model(Projected):
    """The code z of a view finds the sample of the other view, and holds as little as may be that
    the other view does not.
    """

    kind = "joint"
    two_views = True
    global_loss = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        def projector(width: int) -> nn.Module:
            return mlp(
                (width, config.hidden, config.dim),
                hidden_bias=False,
                last_bias=False,
                group=run_info.norm_group,
            )

        super().__init__(make_backbone, projector, run_info)
        self.config = config
        self.e, self.b = (
            VonMisesFisher(config.dim, kappa) for kappa in (config.kappa_e, config.kappa_b)
        )

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        h = pooled(self.backbone, batch.views[0])
        r = pooled(self.projector, h)
        loss, residual, accuracy = self._loss(r, batch.keys)
        scalars = {"residual": residual, "contrast_accuracy": accuracy} | similarities(*r)
        return MethodOutput({"all": loss}, scalars, h[0].detach())

    @full_precision
    def _loss(self, r: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r [2, B, dim]: the mean directions -> loss, and both directions' mean residual
        information and accuracy.
        """
        r1, r2 = F.normalize(r, dim=-1)
        every1, every2 = dist.gather(r1), dist.gather(r2)
        directions = (
            self._direction(r1, r2, every1, every2, keys, "code1"),
            self._direction(r2, r1, every2, every1, keys, "code2"),
        )

        residual, contrast, accuracy = (torch.stack(part) for part in zip(*directions, strict=True))
        # summed over the directions, as SimCLR's
        loss = (self.config.beta * residual + contrast).sum()
        return loss, residual.detach().mean(), accuracy.mean()

    def _direction(
        self, x: Tensor, y: Tensor, every_x: Tensor, every_y: Tensor, keys: Tensor, purpose: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One code per sample from view x -> I(X; Z | Y), -I(Z; Y) as bounded by the batch, and the
        share of codes whose own sample is the most likely.
        """
        z = self.e.sample(x, keys, purpose)
        residual = self.e.log_prob((z * x).sum(1)) - self.b.log_prob((z * y).sum(1))
        own = dist.rank() * len(x) + torch.arange(len(x), device=x.device)
        itself = F.one_hot(own, len(every_x)).bool()
        logits = torch.cat(
            [
                self.b.log_prob(z @ every_y.T),
                self.b.log_prob(z @ every_x.T).masked_fill(itself, float("-inf")),
            ],
            1,
        )

        # differs: the authors' constant log(2B - 1), taken off, is not part of a loss.
        return (
            residual.mean(),
            F.cross_entropy(logits, own),
            (logits.detach().argmax(1) == own).float().mean(),
        )
