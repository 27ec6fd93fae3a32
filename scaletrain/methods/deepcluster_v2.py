"""DeepCluster v2 (Caron et al., 2020, arXiv 2006.09882, appendix D), after facebookresearch/swav's
main_deepclusterv2.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain import dist, rng
from scaletrain.config.schema import ComponentConfig, Count, Positive
from scaletrain.core import Backbone, Batch, Clock, Features, MethodOutput, RunInfo, Write
from scaletrain.methods.base import Projected
from scaletrain.nn.bank import Bank
from scaletrain.nn.clusters import Assignments
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import pooled
from scaletrain.ops.kmeans import spherical_kmeans
from scaletrain.ops.precision import full_precision, unit


class Config(ComponentConfig):
    hidden: Count = 2048
    dim: Count = 128
    clusters: tuple[Count, ...] = (3000, 3000, 3000)
    """Number of clusters of each clustering; each has a head of prototypes."""

    temperature: Positive = 0.1
    iterations: Count = 10
    """Number of iterations of k-means."""

    miniature: ClassVar[Mapping[str, Any]] = {
        "hidden": 24,
        "dim": 8,
        "clusters": (5, 4, 6),
        "iterations": 4,
    }


class Model(Projected):
    """Each epoch clusters the embeddings of the last one; every view must find the cluster of its
    sample.
    """

    kind = "joint"
    # a mean over those samples of the batch whose cluster is known
    global_loss = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        run_info.need_samples("method.clusters", max(config.clusters))

        def projector(width: int) -> nn.Module:
            return mlp((width, config.hidden, config.dim), group=run_info.norm_group)

        super().__init__(make_backbone, projector, run_info)
        self.config, self.seed = config, run_info.seed

        # set by k-means, not trained
        for head, clusters in enumerate(config.clusters):
            self.register_buffer(f"prototypes{head}", torch.zeros(clusters, config.dim))

        # head h clusters the embeddings of large view h mod banked
        self.banked = min(2, run_info.views[0][1])
        self.banks = nn.ModuleList(Bank(run_info.samples, config.dim) for _ in range(self.banked))
        self.assignments = Assignments(run_info.samples, config.clusters)

    def prototypes(self) -> Sequence[Tensor]:
        return [getattr(self, f"prototypes{head}") for head in range(len(self.config.clusters))]

    def _embed(self, batch: Batch) -> Tensor:
        """[B, banked, dim], normalised."""
        z = pooled(self.projector, pooled(self.backbone, batch.views[0]))
        return unit(z[: self.banked]).transpose(0, 1)

    def on_epoch(self, clock: Clock, features: Features, write: Write) -> None:
        # no embeddings yet: one pass before training
        if clock.epoch == 0:
            for index, z in features(self._embed, every=False, training=True):
                self._remember(index, z, "write")

        for head, clusters in enumerate(self.config.clusters):
            bank: Bank = self.banks[head % self.banked]  # type: ignore[assignment]
            # differs: seeds are drawn from the whole data set by a hash, not from rank 0's shard,
            # so ranks do not matter.
            key = int(rng.hash64(self.seed, clock.epoch, head))
            centroids, assigned = spherical_kmeans(
                bank.rows, bank.start, clusters, self.config.iterations, key
            )
            self.prototypes()[head].copy_(centroids)
            self.assignments.renew(head, assigned)

    def _remember(self, index: Tensor, z: Tensor, how: str) -> None:
        for view, bank in enumerate(self.banks):
            getattr(bank, how)(index, z[:, view])

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        h = [pooled(self.backbone, x) for x in batch.views]
        z = pooled(self.projector, torch.cat(h))  # [V, B, dim]
        target = self.assignments.read(batch.index)  # [B, heads]
        loss, accuracy = self._loss(z, target, batch.index)
        return MethodOutput(
            {"all": loss},
            {"assignment_accuracy": accuracy} | self.assignments.scalars(),
            h[0][0].detach(),
        )

    @full_precision
    def _loss(self, z: Tensor, target: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        z = F.normalize(z, dim=-1)
        self._remember(index, z[: self.banked].transpose(0, 1), "stage")
        losses, hits = [], []
        for head, prototypes in enumerate(self.prototypes()):
            logits = z @ prototypes.to(z).T / self.config.temperature  # [V, B, K]
            labels = target[:, head].expand(len(z), -1)
            # Samples that no pass has embedded yet are left out: a sum over the known ones, divided
            # by their global number.
            known = dist.sum_nograd((target[:, head] >= 0).sum()) * len(z)
            loss = F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum"
            )

            losses.append(loss * dist.world() / known.clamp_min(1))
            hits.append((logits.argmax(-1) == labels).float().mean())

        return torch.stack(losses).mean(), torch.stack(hits).mean()
