"""DenseCL: dense contrastive learning (Wang et al., 2021, arXiv 2011.09157), after
WXinlong/DenseCL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.config.schema import ComponentConfig, Count, Positive, Share
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, RunInfo
from scaletrain.methods.base import WithMomentumEncoder
from scaletrain.nn.backbone import unpooled
from scaletrain.nn.bank import Queue
from scaletrain.nn.heads import plain
from scaletrain.nn.norm import per_view, pooled
from scaletrain.ops.contrastive import key_contrast
from scaletrain.ops.precision import full_precision


class Config(ComponentConfig):
    hidden: Count = 2048
    """Hidden width of both heads."""

    dim: Count = 128
    queue: Count = 65536
    """Number of keys of earlier steps in each queue, over all ranks."""

    temperature: Positive = 0.2
    dense: Share = 0.5
    """Weight of the dense loss, lambda; the global loss has the rest."""

    tau: Share = 0.999
    """The key encoder's momentum."""

    shuffle: bool = True
    """ShuffleBN, used where model.norm_group makes groups of a batch."""

    miniature: ClassVar[Mapping[str, Any]] = {
        "hidden": 24,
        "dim": 8,
        "queue": 30,
        "tau": 0.9,
        "dense": 0.3,
        "shuffle": False,
    }


class Model(WithMomentumEncoder):
    """MoCo v2, with a second contrastive loss that compares every cell of the query's last feature
    map with the most similar cell of the key's.
    """

    kind = "joint"
    targets: ClassVar[Mapping[str, str]] = {
        "target_backbone": "backbone",
        "target_projector": "projector",
        "target_dense_projector": "dense_projector",
    }

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        def projector(width: int) -> nn.Module:
            return plain((width, config.hidden, config.dim))

        super().__init__(
            lambda: unpooled(make_backbone()), projector, run_info, shuffle=config.shuffle
        )
        self.config, self.batch = config, run_info.batch

        # On the channels of each cell a dense layer is the paper's 1x1 convolution.
        width = self.backbone.features
        self.dense_projector, self.target_dense_projector = projector(width), projector(width)
        self.start_targets()

        self.queue = Queue(config.queue, config.dim, noise=True)
        self.dense_queue = Queue(config.queue, config.dim, noise=True)

    def ema(self, clock: Clock) -> float:
        return self.config.tau

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x).mean((-2, -1))

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        x = batch.views[0]  # [2, B, 3, H, W]
        f = _cells(per_view(self.backbone, x[:1]))  # [B, S, features]
        h = f.mean(1)
        q, dense_q = self.projector(h), pooled(self.dense_projector, f)

        with torch.no_grad():
            g = _cells(self.keys(x[1:], clock))
            k, dense_k = self.target_projector(g.mean(1)), pooled(self.target_dense_projector, g)

        loss, scalars = self._loss(q, k, dense_q, dense_k, f.detach(), g)
        return MethodOutput(
            {"all": loss}, scalars | {"queue_age": self.queue.age(self.batch)}, h.detach()
        )

    @full_precision
    def _loss(
        self, q: Tensor, k: Tensor, dense_q: Tensor, dense_k: Tensor, f: Tensor, g: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """q, k [B, dim]; dense_q, dense_k [B, S, dim]; f, g [B, S, features]: the cells of both
        backbones.
        """
        same = (F.normalize(f, dim=2) @ F.normalize(g, dim=2).transpose(1, 2)).argmax(
            2
        )  # [B, S], section 3.3
        positive = dense_k.gather(1, same[..., None].expand_as(dense_q))
        whole, scalars = key_contrast(q, k, self.queue.rows, self.config.temperature)
        dense, cells = key_contrast(
            dense_q, positive, self.dense_queue.rows, self.config.temperature
        )

        self.queue.push(F.normalize(k, dim=-1))
        # one pooled key per image
        self.dense_queue.push(F.normalize(dense_k.mean(1), dim=-1))
        scalars |= {f"dense_{name}": value for name, value in cells.items()}
        scalars |= {"global": whole.detach(), "dense": dense.detach()}
        return (1 - self.config.dense) * whole + self.config.dense * dense, scalars


def _cells(x: Tensor) -> Tensor:
    """[1, B, C, H, W] -> [B, H * W, C]."""
    return x[0].flatten(2).transpose(1, 2)
