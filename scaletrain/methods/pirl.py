"""PIRL: pretext-invariant representations (Misra and van der Maaten, 2020, arXiv 1912.01991) by
jigsaw, after vissl's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scaletrain import dist, rng
from scaletrain.config.schema import ComponentConfig, Count, Natural, Positive, Share
from scaletrain.core import Backbone, Batch, Clock, Method, MethodOutput, RunInfo
from scaletrain.nn.bank import Bank, Once
from scaletrain.nn.heads import plain
from scaletrain.nn.norm import per_view, pooled
from scaletrain.ops.contrastive import key_contrast
from scaletrain.ops.precision import full_precision

PATCHES = 9


class Config(ComponentConfig):
    hidden: Natural = 0
    """Hidden width of the heads of image and patches; 0: linear heads."""

    dim: Count = 128
    patch: Annotated[int, Field(ge=4)] = 64
    """Side of a patch in pixels; it is cut at random from its ninth of the view."""

    negatives: Count = 32000
    """Number of negatives, drawn uniformly with replacement from the memory."""

    loss: Literal["nce", "infonce"] = "nce"
    """`infonce` is that of vissl, with hidden 2048 and temperature 0.1."""

    temperature: Positive = 0.07
    jigsaw: Share = 0.5
    """Weight of the loss of the patches, lambda; that of the image has the rest."""

    momentum: Share = 0.5
    """Momentum of a sample's memory."""

    miniature: ClassVar[Mapping[str, Any]] = {
        "dim": 8,
        "patch": 4,
        "negatives": 20,
        "loss": "infonce",
    }


class Model(Method):
    """Two views: the first, or larger, is cut into nine patches; both must find the memory of their
    image.
    """

    kind = "joint"
    two_views = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        if sum(count for _, count in run_info.views) != 2:
            raise ValueError(
                "method pirl takes two views, the first or larger of which is cut into patches; "
                "data.views gives "
                f"{run_info.views} (pixels, count)"
            )

        cell = run_info.views[0][0] // 3
        if config.patch > cell:
            raise ValueError(
                f"method.patch={config.patch} is larger than a ninth of the first view, "
                f"{cell} pixels wide"
            )

        super().__init__()
        self.cell = cell
        self.config, self.samples, self.seed = config, run_info.samples, run_info.seed
        self.backbone = make_backbone()
        hidden = (config.hidden,) if config.hidden else ()
        widths = (self.backbone.features, *hidden, config.dim)
        # f and g of section 3.2
        self.projector, self.patch_projector = plain(widths), plain(widths)
        self.join = nn.Linear(PATCHES * config.dim, config.dim)
        self.bank = Bank(run_info.samples, config.dim, noise=run_info.seed)

        if config.loss == "nce":
            # of the first batch, whose samples it couples
            self.log_mean = Once()
            self.global_loss = True

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        source, image = (view for views in batch.views for view in views)  # [B, 3, S, S] each
        h = per_view(self.backbone, image[None])[0]
        parts = self.patch_projector(
            pooled(self.backbone, self._patches(source, batch.keys))
        ).transpose(0, 1)  # [B, 9, dim]
        order = rng.uniform(batch.keys, "jigsaw", PATCHES).argsort(dim=1, stable=True)
        # no label: the embedding must not depend on the order
        shuffled = parts.gather(1, order[..., None].expand_as(parts))
        memory, negatives = (
            self.bank.read(batch.index),
            self.bank.read_same(self._drawn(clock, batch.index)),
        )

        loss, scalars = self._loss(
            self.projector(h), self.join(shuffled.flatten(1)), memory, negatives, batch.index
        )
        return MethodOutput({"all": loss}, scalars, h.detach())

    def _patches(self, x: Tensor, keys: Tensor) -> Tensor:
        """[B, 3, S, S] -> [9, B, 3, patch, patch]: a random square of each cell of 3 x 3.

        differs: vissl distorts the colours of each patch by itself, here they are the view's.
        """
        cell, corner = torch.arange(PATCHES, device=x.device), self.cell - self.config.patch + 1
        y, z = (
            (rng.uniform(keys, "patches", 2 * PATCHES) * corner)
            .long()
            .view(-1, 2, PATCHES)
            .unbind(1)
        )  # [B, 9] each

        along = torch.arange(self.config.patch, device=x.device)
        rows = (y + cell // 3 * self.cell)[..., None, None] + along[:, None]  # [B, 9, patch, 1]
        columns = (z + cell % 3 * self.cell)[..., None, None] + along
        sample = torch.arange(len(x), device=x.device)[:, None, None, None]
        return x.movedim(1, -1)[sample, rows, columns].movedim(-1, 2).transpose(0, 1)

    def _drawn(self, clock: Clock, index: Tensor) -> Tensor:
        """[n] samples of the data set. differs: once for all of a step, since rows for each sample
        cannot be sent.
        """
        draws = torch.arange(self.config.negatives, device=index.device)
        # torch's remainder is not negative
        return rng.hash64(self.seed, "negatives", clock.step, draws) % self.samples

    @full_precision
    def _loss(
        self, v: Tensor, t: Tensor, m: Tensor, negatives: Tensor, index: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 5: embeddings of image and patches [b, dim] against the memories m [b, dim] and those
        of others [n, dim].
        """
        v, t, m = F.normalize(v, dim=1), F.normalize(t, dim=1), m.to(v)
        self.bank.stage(
            index,
            F.normalize(self.config.momentum * m + (1 - self.config.momentum) * v.detach(), dim=1),
        )

        with torch.set_grad_enabled(self.config.loss == "infonce" and torch.is_grad_enabled()):
            jigsaw, scalars = key_contrast(t, m, negatives, self.config.temperature)
            image, seen = key_contrast(v, m, negatives, self.config.temperature)

        scalars |= {f"image_{name}": value for name, value in seen.items()}
        if self.config.loss == "nce":
            patches, whole = (self._logits(x, m, negatives.to(v)) for x in (t, v))
            log_mean = self.log_mean((dist.sum_nograd(patches.exp().mean()) / dist.world()).log())
            jigsaw, image = _nce(patches, log_mean), _nce(whole, log_mean)

        return self.config.jigsaw * jigsaw + (1 - self.config.jigsaw) * image, scalars

    def _logits(self, x: Tensor, m: Tensor, negatives: Tensor) -> Tensor:
        return (
            torch.cat([(x * m).sum(1, keepdim=True), x @ negatives.T], 1) / self.config.temperature
        )  # [b, 1 + n]


def _nce(logits: Tensor, log_mean: Tensor) -> Tensor:
    """-log h - sum over the n negatives of log(1 - h), mean over the batch. h = P / (P + n / N), P
    = exp(logit) / Z.

    Z = N * mean(exp(logit)) over the patches' pairs of the first step, so that N cancels in the
    odds P / (n / N).
    """
    odds = logits - log_mean - math.log(logits.shape[1] - 1)

    return (F.softplus(-odds[:, 0]) + F.softplus(odds[:, 1:]).sum(1)).mean()
