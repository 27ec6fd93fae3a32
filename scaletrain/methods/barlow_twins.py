"""Barlow Twins (Zbontar et al., 2021, arXiv 2103.03230), after facebookresearch/barlowtwins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from scaletrain import dist
from scaletrain.config.schema import ComponentConfig, Count, Positive
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, ParameterGroup, RunInfo
from scaletrain.methods.base import Projected
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import BatchNorm, per_view
from scaletrain.ops.precision import full_precision


class Config(ComponentConfig):
    hidden: Count = 8192
    dim: Count = 8192
    lambd: Positive = 0.0051
    """Weight of the redundancy reduction."""

    scale: Positive = 1.0
    """Of the whole loss: LARS cancels it for what it adapts, but not against the weight decay."""

    bias_lr: Positive = 0.024
    """Learning rate of biases and norms, relative to that of the weights."""

    miniature: ClassVar[Mapping[str, Any]] = {"hidden": 24, "dim": 8, "bias_lr": 0.1}


class Model(Projected):
    """The cross-correlation of two views' embeddings over the global batch becomes the identity."""

    kind = "joint"
    two_views = True
    global_loss = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        def projector(width: int) -> nn.Module:
            return mlp(
                (width, config.hidden, config.hidden, config.dim),
                hidden_bias=False,
                last_bias=False,
                group=run_info.norm_group,
            )

        super().__init__(make_backbone, projector, run_info)
        self.config = config
        # over the whole batch, whatever the other norms do
        self.norm = BatchNorm(config.dim, scale=False, shift=False)

    def groups(self) -> Sequence[ParameterGroup]:
        return [ParameterGroup("biases", lambda _, p: p.ndim == 1, lr=self.config.bias_lr)]

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        y = per_view(self.backbone, batch.views[0])
        on, off, mean = self._loss(per_view(self.projector, y))
        loss = self.config.scale * (on + self.config.lambd * off)
        scalars = {"on_diagonal": on.detach(), "off_diagonal": off.detach(), "correlation": mean}
        return MethodOutput({"all": loss}, scalars, y[0].detach())

    @full_precision
    def _loss(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [2, B, D] -> the two sums of eq. 1, invariance and redundancy reduction, and the
        diagonal's mean.
        """
        z1, z2 = per_view(self.norm, z)
        # differs: the authors' all_reduce has no gradient, so that theirs is 1 / ranks of this one
        # (`scale` can say so).
        c = dist.psum(z1.T @ z2) / (len(z1) * dist.world())  # [D, D], eq. 2
        diagonal = c.diagonal()

        return (
            (1 - diagonal).square().sum(),
            c.square().sum() - diagonal.square().sum(),
            diagonal.detach().mean(),
        )
