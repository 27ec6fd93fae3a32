"""ReLICv2 (Tomasev et al., 2022, arXiv 2201.05119), equations 1 to 4 and Listing 1. No pretraining
code was published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scaletrain import dist, rng
from scaletrain.config.schema import ComponentConfig, Count, Positive, Share
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, RunInfo
from scaletrain.methods.base import WithTarget
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import per_view
from scaletrain.ops.contrastive import similarities
from scaletrain.ops.masking import on_grey
from scaletrain.ops.precision import full_precision

Scale = Annotated[float, Field(ge=0.0)]


class Config(ComponentConfig):
    hidden: Count = 4096
    dim: Count = 256
    tau: Share = 0.996
    """Decay of the target's moving average at the start."""

    tau_end: Share = 1.0
    """Decay at the end, reached along half a cosine."""

    temperature: Positive = 0.3
    """Temperature of the softmax; not verified, the digits are lost in the paper's text."""

    contrast_scale: Scale = 0.3
    """Weight of the contrast; not verified."""

    invariance_scale: Scale = 1.5
    """Weight of the invariance; not verified."""

    negatives: Count = 10
    """Number of negatives of each anchor, drawn uniformly from the global batch (Table 21)."""

    same_view: bool = True
    """Compare also the online and target embedding of the same large view, as Listing 1 does."""

    mask_probability: Share = 0.1
    """Probability of removing the background of a large view, where there are
    data.foreground.masks.
    """

    mask_minimum: Share = 0.1
    """Smallest share of a view that the foreground must cover for that; not verified."""

    miniature: ClassVar[Mapping[str, Any]] = {
        "hidden": 24,
        "dim": 16,
        "negatives": 3,
        "tau": 0.9,
        "mask_probability": 0.5,
    }


class Model(WithTarget):
    """Online embeddings of L large and S small views against target embeddings of the large
    views.
    """

    kind = "joint"
    global_loss = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        if config.negatives >= run_info.batch:
            raise ValueError(
                f"method.negatives={config.negatives} needs a larger batch than {run_info.batch}"
            )
        if not config.same_view and run_info.views == ((run_info.views[0][0], 1),):
            raise ValueError(
                "method.same_view=false leaves no pair of views: data.views has a single one"
            )

        def projector(width: int) -> nn.Module:
            return mlp(
                (width, config.hidden, config.dim), last_bias=False, group=run_info.norm_group
            )

        super().__init__(make_backbone, projector, run_info)
        self.config = config
        self.predictor = mlp(
            (config.dim, config.hidden, config.dim), last_bias=False, group=run_info.norm_group
        )
        self.add_target(make_backbone, projector)

    def ema(self, clock: Clock) -> float:
        return clock.cosine(self.config.tau, self.config.tau_end)

    def embed(self, batch: Batch, clock: Clock) -> tuple[Tensor, ...]:
        large, masked = on_grey(batch, self.config.mask_probability, self.config.mask_minimum)
        h = [per_view(self.backbone, x) for x in (large, *batch.views[1:])]
        online = per_view(self.predictor, per_view(self.projector, torch.cat(h)))  # [L + S, B, dim]
        # small views are never targets
        with torch.no_grad():
            target = per_view(
                self.target_projector, per_view(self.target_backbone, large)
            )  # [L, B, dim]

        return online, target, h[0].detach(), masked

    def loss(self, embedded: tuple[Tensor, ...], batch: Batch, clock: Clock) -> MethodOutput:
        online, target, h, masked = embedded
        contrast, invariance, accuracy = self._terms(online, target, batch.keys)
        loss = self.config.contrast_scale * contrast + self.config.invariance_scale * invariance
        scalars = {
            "contrast": contrast.detach(),
            "invariance": invariance.detach(),
            "contrast_accuracy": accuracy,
        }
        scalars |= similarities(online[0], target[-1]) | {"masked_views": masked.mean()}

        return MethodOutput({"all": loss}, scalars, h[0])

    @full_precision
    def _terms(self, online: Tensor, target: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Equations 1 and 2, averaged over the (L + S) * L pairs of Listing 1; and the share
        of anchors whose positive is the most similar.
        """
        o, t = F.normalize(online, dim=-1), F.normalize(target, dim=-1)
        every_o, every_t = (
            dist.gather_nograd(x.transpose(0, 1)).transpose(0, 1) for x in (o, t)
        )  # [views, B global, dim]
        others = self._negatives(keys)  # [b, n]
        contrast, invariance, hits = [], [], []

        for i in range(len(o)):
            for j in range(len(t)):
                if i == j and not self.config.same_view:
                    continue

                positive = (o[i] * t[j]).sum(-1, keepdim=True)
                # The same negatives in both distributions: the divergence compares like events.
                # differs: the second anchors at the target's embedding, since Listing 1's loss(o_i,
                # t_j) has nothing else and small views have no target. All similarities are cheaper
                # than a copy of each sample's negatives.
                log_p = self._log_p(positive, (o[i] @ every_t[j].T).gather(1, others))
                log_q = self._log_p(positive, (t[j] @ every_o[i].T).gather(1, others)).detach()
                # eq. 1
                contrast.append(-log_p[:, 0].mean())
                # eq. 2: KL(p || sg q). Not verified: which argument the paper's stop-gradient is
                # on.
                invariance.append((log_p.exp() * (log_p - log_q)).sum(1).mean())
                hits.append((log_p.detach().argmax(1) == 0).float().mean())

        return (
            torch.stack(contrast).mean(),
            torch.stack(invariance).mean(),
            torch.stack(hits).mean(),
        )

    def _log_p(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Similarities [b, 1] and [b, n] -> [b, 1 + n] log-probabilities; the positive
        comes first.
        """
        return F.log_softmax(torch.cat([positive, negative], 1) / self.config.temperature, dim=1)

    def _negatives(self, keys: Tensor) -> Tensor:
        """[b, n] positions in the global batch, uniform over the other samples, each at
        most once.
        """
        own = dist.rank() * len(keys) + torch.arange(len(keys), device=keys.device)
        others = len(keys) * dist.world() - 1
        order = rng.uniform(keys, "negatives", others).argsort(dim=1, stable=True)
        drawn: Tensor = (own[:, None] + 1 + order[:, : self.config.negatives]) % (others + 1)

        return drawn
