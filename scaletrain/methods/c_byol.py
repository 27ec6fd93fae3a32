"""C-BYOL, compressed (Lee et al., 2021, arXiv 2109.12909), after
google-research/compressive-visual-representations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scaletrain.config.schema import ComponentConfig, Count, Positive, Share
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, RunInfo
from scaletrain.methods.base import WithTarget
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import per_view
from scaletrain.nn.vmf import VonMisesFisher
from scaletrain.ops.contrastive import cosine_distance, similarities
from scaletrain.ops.precision import full_precision, unit


class Config(ComponentConfig):
    hidden: Count = 4096
    dim: Annotated[int, Field(ge=2)] = 256
    tau: Share = 0.996
    """Decay of the target's moving average at the start; it rises to 1."""

    kappa_e: Positive = 16384.0
    """Concentration of e(z | x), the encoding of a view."""

    kappa_b: Positive = 10.0
    """Concentration of b(z | y), its prediction from the target's embedding."""

    kappa_d: Positive = 4.0
    """Concentration of the decoder; half of it is the weight of BYOL's loss."""

    beta: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the compression."""

    residual: Literal["other", "own"] = "other"
    """Which view of the target predicts a code; the authors' code takes the code's own."""

    miniature: ClassVar[Mapping[str, Any]] = {"hidden": 24, "dim": 8, "tau": 0.9, "kappa_e": 40.0}


class Model(WithTarget):
    """A stochastic code of each view predicts the target's projection of the other, and holds
    little beyond it.
    """

    kind = "joint"
    two_views = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        group, dim = run_info.norm_group, config.dim

        def projector(width: int) -> nn.Module:
            return mlp((width, config.hidden, dim), last_bias=False, group=group)

        super().__init__(make_backbone, projector, run_info)
        self.config = config
        head = (dim, config.hidden, dim)
        # mean direction of e(z | x)
        self.encoder = mlp(head, last_bias=False, group=group)
        self.decoder = nn.Linear(dim, dim, bias=False)

        # mean direction of b(z | y); trained
        self.prior = mlp(head, last_bias=False, group=group)
        self.e, self.b = (VonMisesFisher(dim, kappa) for kappa in (config.kappa_e, config.kappa_b))
        self.add_target(make_backbone, projector)

    def ema(self, clock: Clock) -> float:
        return clock.cosine(self.config.tau, 1.0)

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        x = batch.views[0]  # [2, B, 3, H, W]
        y = per_view(self.backbone, x)
        mean = per_view(self.encoder, per_view(self.projector, y))
        with torch.no_grad():
            t = unit(per_view(self.target_projector, per_view(self.target_backbone, x)))

        z, residual = self._code(mean, per_view(self.prior, t), batch.keys)
        p1, p2 = self.decoder(z)
        byol = cosine_distance(p1, t[1]) + cosine_distance(p2, t[0])
        loss = self.config.kappa_d / 2 * byol + self.config.beta * residual
        scalars = {"byol": byol.detach(), "residual": residual.detach()} | similarities(p1, t[1])

        return MethodOutput({"all": loss}, scalars, y[0].detach())

    @full_precision
    def _code(self, mean: Tensor, prior: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Means of e and b [2, B, dim] -> z ~ e(z | x) [2, B, dim] and the sum over views of log
        e(z | x) - log b(z | y).
        """
        mean, prior = F.normalize(mean, dim=-1), F.normalize(prior, dim=-1)

        if self.config.residual == "other":
            prior = prior.flip(0)

        z = torch.stack(
            [
                self.e.sample(view, keys, purpose)
                for view, purpose in zip(mean, ("code1", "code2"), strict=True)
            ]
        )
        residual = self.e.log_prob((z * mean).sum(-1)) - self.b.log_prob((z * prior).sum(-1))

        return z, residual.mean(1).sum()
