"""MoCo v1 and v2: momentum contrast (He et al., 2020, arXiv 1911.05722; arXiv 2003.04297), after
facebookresearch/moco.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.config.schema import ComponentConfig, Count, Natural, Positive, Share
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, RunInfo
from scaletrain.methods.base import WithMomentumEncoder
from scaletrain.nn.bank import Queue
from scaletrain.nn.heads import plain
from scaletrain.nn.norm import per_view, pooled
from scaletrain.ops.contrastive import key_contrast
from scaletrain.ops.precision import full_precision


class Config(ComponentConfig):
    hidden: Natural = 2048
    """Hidden width of v2's MLP head; 0: v1's linear head."""

    dim: Count = 128
    queue: Count = 65536
    """Number of keys of earlier steps, over all ranks (K)."""

    temperature: Positive = 0.2
    """Temperature of the softmax; 0.07 in v1."""

    tau: Share = 0.999
    """Momentum of the key encoder at the start (m)."""

    tau_end: Share = 0.999
    """Momentum at the end, reached along half a cosine; constant in the paper."""

    symmetric: bool = False
    """Each view is the query once, and has a queue of its own (solo-learn's v2+)."""

    shuffle: bool = True
    """ShuffleBN, used where model.norm_group makes groups of a batch."""

    miniature: ClassVar[Mapping[str, Any]] = {
        "hidden": 24,
        "dim": 8,
        "queue": 30,
        "tau": 0.9,
        "tau_end": 0.95,
        "symmetric": True,
        "shuffle": False,
    }


class Model(WithMomentumEncoder):
    """A query must find the key of its own image among the keys of earlier batches."""

    kind = "joint"

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        def projector(width: int) -> nn.Module:
            hidden = (config.hidden,) if config.hidden else ()
            return plain((width, *hidden, config.dim))

        super().__init__(make_backbone, projector, run_info, shuffle=config.shuffle)
        self.config, self.batch = config, run_info.batch

        self.start_targets()
        self.sides = 2 if config.symmetric else 1
        self.queues = nn.ModuleList(
            Queue(config.queue, config.dim, noise=True) for _ in range(self.sides)
        )

    def ema(self, clock: Clock) -> float:
        # The authors move the key encoder before each forward pass; after each step is the same.
        return clock.cosine(self.config.tau, self.config.tau_end)

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        x = batch.views[0]  # [2, B, 3, H, W]
        h = per_view(self.backbone, x[: self.sides])
        q = pooled(self.projector, h)
        with torch.no_grad():
            # of the other view
            k = pooled(self.target_projector, self.keys(x[-self.sides :], clock)).flip(0)

        sides = [self._side(q[i], k[i], i) for i in range(self.sides)]
        scalars = {
            name: torch.stack([side[1][name] for side in sides]).mean() for name in sides[0][1]
        }
        return MethodOutput(
            {"all": torch.stack([loss for loss, _ in sides]).mean()}, scalars, h[0].detach()
        )

    @full_precision
    def _side(self, q: Tensor, k: Tensor, side: int) -> tuple[Tensor, dict[str, Tensor]]:
        queue: Queue = self.queues[side]  # type: ignore[assignment]
        # the queue of before this step
        loss, scalars = key_contrast(q, k, queue.rows, self.config.temperature)
        queue.push(F.normalize(k, dim=-1))
        return loss, scalars | {"queue_age": queue.age(self.batch)}
