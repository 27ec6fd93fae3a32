"""DirectPred (Tian et al., 2021, arXiv 2102.06810) and DirectCopy (Wang et al., 2021, arXiv
2110.04947).

After facebookresearch/luckmatters. BYOL whose linear predictor is set from the correlation of its
inputs and not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scaletrain import dist
from scaletrain.config.schema import ComponentConfig, Count, Share
from scaletrain.core import (
    Backbone,
    Batch,
    Clock,
    DeferredState,
    MethodOutput,
    RunInfo,
    Write,
)
from scaletrain.methods.base import WithTarget
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import per_view
from scaletrain.ops.contrastive import cosine_distance, similarities


class Config(ComponentConfig):
    hidden: Count = 512
    dim: Count = 128
    tau: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.996
    """Decay of the target's moving average, constant."""

    predictor: Literal["directpred", "directcopy"] = "directpred"
    rho: Share = 0.3
    """Decay of the moving average of the correlation."""

    epsilon: Annotated[float, Field(ge=0.0)] = 0.01
    """Added to the predictor's spectrum."""

    every: Count = 1
    """Number of steps after which the predictor is set again."""

    miniature: ClassVar[Mapping[str, Any]] = {"hidden": 24, "dim": 4, "tau": 0.9}


class Correlation(DeferredState):
    """F <- rho F + (1 - rho) E[f f^T] over all views of the global batch; the first step sets F
    whole. [dim, dim] float64.
    """

    matrix: Tensor
    steps: Tensor

    def __init__(self, dim: int, rho: float) -> None:
        super().__init__()
        self.rho = rho
        self.register_buffer("matrix", torch.zeros(dim, dim, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.staged: list[Tensor] = []

    def stage(self, f: Tensor) -> None:
        self.staged.append(f.detach().flatten(0, -2))

    @torch.no_grad()
    def commit(self, parts: int = 1) -> None:
        if not self.staged:
            return

        f = torch.cat(self.staged).double()
        new = dist.sum_nograd(f.T @ f) / (len(f) * dist.world())
        keep = self.rho * (self.steps > 0).to(self.matrix)
        self.matrix.mul_(keep).add_(new * (1 - keep))
        self.steps.add_(1)
        self.staged.clear()

    def discard(self) -> None:
        self.staged.clear()


class Model(WithTarget):
    """Two views; W_p f predicts the target's projection of the other view, W_p sharing the
    eigenvectors of f's correlation.
    """

    kind = "joint"
    two_views = True
    weight: Tensor
    spectrum: Tensor

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        def projector(width: int) -> nn.Module:
            return mlp(
                (width, config.hidden, config.dim), last_bias=False, group=run_info.norm_group
            )

        super().__init__(make_backbone, projector, run_info)
        self.config = config
        self.correlation = Correlation(config.dim, config.rho)

        # differs: the authors' predictor is random until the first step has set it.
        self.register_buffer("weight", torch.eye(config.dim))
        # of F, ascending; by directpred only
        self.register_buffer("spectrum", torch.zeros(config.dim, dtype=torch.float64))
        self.add_target(make_backbone, projector)

    def ema(self, clock: Clock) -> float:
        return self.config.tau

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        x = batch.views[0]  # [2, B, 3, H, W]
        y = per_view(self.backbone, x)
        f = per_view(self.projector, y)
        self.correlation.stage(f)
        p1, p2 = F.linear(f, self.weight)

        with torch.no_grad():
            z1, z2 = per_view(self.target_projector, per_view(self.target_backbone, x))

        # 4 more than the authors' -2 cos, summed
        loss = cosine_distance(p1, z2) + cosine_distance(p2, z1)
        return MethodOutput({"all": loss}, self._spectrum() | similarities(p1, z2), y[0].detach())

    def _spectrum(self) -> dict[str, Tensor]:
        """Of F: (tr F)^2 / |F|^2, the number of dimensions in use, from 1 (collapse) to dim; two
        eigenvalues.
        """
        trace, square = self.correlation.matrix.trace(), self.correlation.matrix.square().sum()
        rank = trace.square() / square.clamp_min(torch.finfo(square.dtype).tiny)
        scalars = {
            "correlation_rank": rank,
            "correlation_trace": trace,
            "predictor_norm": self.weight.norm(),
        }

        # the other needs no decomposition
        if self.config.predictor == "directpred":
            scalars |= {
                "eigenvalue_largest": self.spectrum[-1].clone(),
                "eigenvalue_median": self.spectrum.median(),
            }

        return scalars

    @torch.no_grad()
    def after_step(self, clock: Clock, write: Write) -> None:
        if clock.every(self.config.every):
            self.weight.copy_(self._predictor(self.correlation.matrix))

    def _predictor(self, correlation: Tensor) -> Tensor:
        """Every rank computes it from the same sum; float64, since an eigenvalue near zero is a
        difference of large numbers.
        """
        if self.config.predictor == "directcopy":
            return correlation + self.config.epsilon * torch.eye(
                len(correlation), out=torch.empty_like(correlation)
            )

        s, q = torch.linalg.eigh(correlation)
        s = s.clamp_min(0)
        self.spectrum.copy_(s)
        p = (s / s.max().clamp_min(torch.finfo(s.dtype).tiny)).sqrt() + self.config.epsilon
        weight: Tensor = (q * p.clamp_min(1e-4)) @ q.T

        return weight
