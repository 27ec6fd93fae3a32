"""PCL, prototypical contrasts (Li et al., 2021, arXiv 2005.04966), after salesforce/PCL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain import dist, rng
from scaletrain.config.schema import ComponentConfig, Count, Natural, Positive, Share
from scaletrain.core import Backbone, Batch, Clock, Features, MethodOutput, RunInfo, Write
from scaletrain.methods.base import WithMomentumEncoder
from scaletrain.nn.bank import Bank, Queue
from scaletrain.nn.clusters import Assignments
from scaletrain.nn.heads import plain
from scaletrain.nn.norm import per_view
from scaletrain.ops.contrastive import key_contrast
from scaletrain.ops.kmeans import concentration, kmeans
from scaletrain.ops.precision import full_precision, unit


class Config(ComponentConfig):
    hidden: Natural = 2048
    """Hidden width of v2's MLP head; 0: v1's linear head."""

    dim: Count = 128
    queue: Count = 16384
    """Number of keys of earlier steps, over all ranks (R)."""

    negatives: Count = 16384
    """Number of prototypes without a sample in the batch that are drawn for each step."""

    temperature: Positive = 0.2
    """Temperature of the keys, and mean concentration of the prototypes."""

    tau: Share = 0.999
    """The key encoder's momentum."""

    clusters: tuple[Count, ...] = (25000, 50000, 100000)
    iterations: Count = 20
    """Number of iterations of k-means."""

    smoothing: Positive = 10.0
    """Smoothing of the concentration, alpha."""

    warmup_epochs: Natural = 20
    """Number of epochs at the start that train without prototypes."""

    shuffle: bool = True
    """ShuffleBN, used where model.norm_group makes groups of a batch."""

    miniature: ClassVar[Mapping[str, Any]] = {
        "hidden": 24,
        "dim": 8,
        "queue": 30,
        "tau": 0.9,
        "clusters": (5, 9),
        "negatives": 3,
        "warmup_epochs": 0,
    }


class Model(WithMomentumEncoder):
    """MoCo; and a query must find the prototypes of its image's clusters, each with a temperature
    of its own.
    """

    kind = "joint"
    whole_images = True
    # prototypes of the other samples of the batch are negatives
    global_loss = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        run_info.need_samples("method.clusters", max(config.clusters))

        def projector(width: int) -> nn.Module:
            hidden = (config.hidden,) if config.hidden else ()
            return plain((width, *hidden, config.dim))

        super().__init__(make_backbone, projector, run_info, shuffle=config.shuffle)
        self.config, self.samples, self.batch = config, run_info.samples, run_info.batch
        self.start_targets()

        self.queue = Queue(config.queue, config.dim, noise=True)
        # set by k-means, not trained
        for m, clusters in enumerate(config.clusters):
            self.register_buffer(f"prototypes{m}", torch.zeros(clusters, config.dim))
            # phi
            self.register_buffer(f"concentration{m}", torch.ones(clusters))

        self.assignments = Assignments(run_info.samples, config.clusters)

    def ema(self, clock: Clock) -> float:
        return self.config.tau

    def _embed(self, batch: Batch) -> Tensor:
        """[B, dim] of the momentum encoder. differs: the authors take centre crops, this the whole
        image.
        """
        return unit(self.target_projector(self.target_backbone(batch.views[0][0])))

    def on_epoch(self, clock: Clock, features: Features, write: Write) -> None:
        """The E-step (section 3.2)."""
        if clock.epoch < self.config.warmup_epochs:
            return

        memory = Bank(self.samples, self.config.dim).to(self.queue.rows)
        for index, z in features(self._embed, every=False):
            memory.write(index, z)

        for m, clusters in enumerate(self.config.clusters):
            # differs: one start in place of the best of five, and an empty cluster stays where it
            # is.
            key = int(rng.hash64(self.seed, "pcl", m))
            centroids, assigned = kmeans(
                memory.rows, memory.start, clusters, self.config.iterations, key
            )
            self.get_buffer(f"prototypes{m}").copy_(F.normalize(centroids, dim=1))
            phi = concentration(memory.rows, centroids, assigned, self.config.smoothing)
            self.get_buffer(f"concentration{m}").copy_(phi * self.config.temperature)
            self.assignments.renew(m, assigned)

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        x = batch.views[0]  # [2, B, 3, H, W]
        h = per_view(self.backbone, x[:1])[0]
        with torch.no_grad():
            k = self.target_projector(self.keys(x[1:], clock)[0])

        loss, scalars = self._loss(self.projector(h), k, batch.index, clock)
        return MethodOutput(
            {"all": loss}, scalars | {"queue_age": self.queue.age(self.batch)}, h.detach()
        )

    @full_precision
    def _loss(
        self, q: Tensor, k: Tensor, index: Tensor, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 11: InfoNCE, and the mean of ProtoNCE over the clusterings."""
        loss, scalars = key_contrast(q, k, self.queue.rows, self.config.temperature)
        self.queue.push(F.normalize(k, dim=-1))
        if clock.epoch < self.config.warmup_epochs:
            return loss, scalars

        own = self.assignments.read(index).T  # [M, b]
        heads = [
            self._prototypes(F.normalize(q, dim=1), ids, m, clock.step) for m, ids in enumerate(own)
        ]
        proto, hits = (torch.stack(values).mean() for values in zip(*heads, strict=True))
        scalars |= {
            "prototype_loss": proto.detach(),
            "prototype_accuracy": hits,
        } | self.assignments.scalars()

        return loss + proto, scalars

    def _prototypes(self, q: Tensor, own: Tensor, m: int, step: int) -> tuple[Tensor, Tensor]:
        """Cross entropy of each sample's prototype among those of the global batch and others that
        are drawn.

        As in the authors' code, a prototype of two samples of the batch has two columns, each the
        other's negative. differs: there the batch is that of one GPU, and prototypes beyond the
        highest number in use are never drawn. Samples that no pass has embedded are left out: a sum
        over the known ones, divided by their global number.
        """
        prototypes, phi = (
            self.get_buffer(f"prototypes{m}").to(q),
            self.get_buffer(f"concentration{m}").to(q),
        )

        every = dist.gather_nograd(own)  # [B]
        taken = torch.zeros(len(phi) + 1, dtype=torch.bool, device=q.device)
        taken[every.where(every >= 0, len(phi))] = True
        chance = rng.hash64(
            self.seed, "prototypes", step, m, torch.arange(len(phi), device=q.device)
        )
        drawn = chance.masked_fill(taken[:-1], torch.iinfo(torch.int64).max).argsort()[
            : self.config.negatives
        ]

        columns = torch.cat([every.clamp_min(0), drawn])
        absent = torch.cat([every < 0, taken[drawn]])
        logits = (q @ prototypes[columns].T / phi[columns]).masked_fill(
            absent, -torch.inf
        )  # [b, B + r]
        label, known = dist.rank() * len(q) + torch.arange(len(q), device=q.device), own >= 0
        total = dist.sum_nograd(known.sum()).clamp_min(1) / dist.world()
        hits = known & (columns[logits.argmax(1)] == own)

        loss = F.cross_entropy(logits[known], label[known], reduction="sum") / total
        return loss, hits.to(q.dtype).sum() / total
