"""SwAV: swapping assignments between views (Caron et al., 2020, arXiv 2006.09882), after
facebookresearch/swav.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain import dist
from scaletrain.config.schema import ComponentConfig, Count, Natural, Positive
from scaletrain.core import (
    Backbone,
    Batch,
    Clock,
    MethodOutput,
    ParameterGroup,
    RunInfo,
    Write,
)
from scaletrain.methods.base import Projected
from scaletrain.nn.bank import Queue
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import pooled
from scaletrain.ops.precision import full_precision
from scaletrain.ops.sinkhorn import sinkhorn


class Config(ComponentConfig):
    hidden: Count = 2048
    dim: Count = 128
    prototypes: Count = 3000
    temperature: Positive = 0.1
    epsilon: Positive = 0.05
    """Regularisation of the Sinkhorn-Knopp algorithm."""

    iterations: Count = 3
    freeze_steps: Natural = 313
    """Number of steps in which the prototypes are not trained: one epoch at batch 4096."""

    queue: Natural = 0
    """Number of earlier embeddings kept per large view, over all ranks; 0: no queue. The authors
    keep 3840 for a batch of 256.
    """

    queue_epoch: Natural = 15
    """First epoch that fills the queue, which is used once it is full."""

    miniature: ClassVar[Mapping[str, Any]] = {
        "hidden": 24,
        "dim": 8,
        "prototypes": 6,
        "queue": 24,
        "queue_epoch": 0,
        "freeze_steps": 2,
    }


class Model(Projected):
    """The codes of each large view are predicted from every other view, small ones included."""

    kind = "joint"
    global_loss = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        if run_info.views[0][1] < 2:
            raise ValueError("swav needs two large views to swap codes between; data.views has one")
        if config.queue % run_info.batch:
            raise ValueError(
                f"method.queue={config.queue} is not a multiple of the global batch "
                f"{run_info.batch}"
            )

        def projector(width: int) -> nn.Module:
            return mlp((width, config.hidden, config.dim), group=run_info.norm_group)

        super().__init__(make_backbone, projector, run_info)
        self.config, self.batch = config, run_info.batch
        self.prototypes = nn.Linear(config.dim, config.prototypes, bias=False)

        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

        self.queues = nn.ModuleList(
            Queue(config.queue, config.dim) for _ in range(2 if config.queue else 0)
        )

    def groups(self) -> Sequence[ParameterGroup]:
        return [
            ParameterGroup(
                "prototypes",
                lambda name, _: name == "prototypes.weight",
                frozen_steps=self.config.freeze_steps,
            )
        ]

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        # One forward per crop size whose views share statistics; the heads see all views at once.
        h = [pooled(self.backbone, x) for x in batch.views]
        z = pooled(self.projector, torch.cat(h))  # [V, B, dim]
        loss, scalars = self._loss(z, self.prototypes.weight, clock)
        return MethodOutput({"all": loss}, scalars, h[0][0].detach())

    @full_precision
    def _loss(
        self, z: Tensor, prototypes: Tensor, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        z = F.normalize(z, dim=-1)
        scores = z @ prototypes.T  # [V, B, K]
        log_p = F.log_softmax(scores / self.config.temperature, dim=-1)
        losses, codes = [], []

        for i in range(2):
            q = self._codes(i, scores[i].detach(), prototypes.detach(), clock)
            losses += [-(q * log_p[v]).sum(1).mean() for v in range(len(z)) if v != i]
            codes.append(q)
            if self.config.queue and clock.epoch >= self.config.queue_epoch:
                self.queues[i].push(z[i])  # type: ignore[operator]

        scalars = {
            # Of a sample's code: ln K, as the loss then is, where all samples look alike. Of their
            # mean it is always ln K.
            "code_entropy": torch.special.entr(torch.cat(codes)).sum(1).mean(),
            "prototypes_used": _used(scores[:2].detach()),
        }

        if self.queues:
            scalars["queue_age"] = self.queues[0].age(self.batch)  # type: ignore[operator]

        return torch.stack(losses).mean(), scalars

    def _codes(self, view: int, scores: Tensor, prototypes: Tensor, clock: Clock) -> Tensor:
        """Assignments [B, K] of one view; a full queue takes part in the balancing and is cut off
        again.
        """
        rows = len(scores)

        if self.config.queue and clock.epoch >= self.config.queue_epoch and self.queues[view].full:
            past = dist.mine(self.queues[view].rows).to(scores) @ prototypes.T  # type: ignore[arg-type]
            scores = torch.cat([past, scores])

        return sinkhorn(scores, self.config.epsilon, self.config.iterations)[-rows:]

    def after_step(self, clock: Clock, write: Write) -> None:
        # The authors normalise the prototypes before each forward; after each step is the same and
        # keeps forward pure.
        write("prototypes.weight", F.normalize(self.prototypes.weight, dim=1))


def _used(scores: Tensor) -> Tensor:
    """Scores [V, B, K] -> the number of prototypes that are the nearest of some row, as a share of
    the largest number possible, which is that of the rows or that of the prototypes.
    """
    nearest = scores.argmax(-1).flatten()
    return scores.new_zeros(scores.shape[2]).index_fill(0, nearest, 1).sum() / min(
        scores.shape[2], len(nearest)
    )
