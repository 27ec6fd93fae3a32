"""DeepCluster (Caron et al., 2018, arXiv 1807.05520), after facebookresearch/deepcluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain import dist, rng
from scaletrain.config.schema import ComponentConfig, Count
from scaletrain.core import (
    Backbone,
    Batch,
    Clock,
    Features,
    Method,
    MethodOutput,
    ParameterGroup,
    RunInfo,
    Write,
)
from scaletrain.nn.bank import Bank
from scaletrain.nn.clusters import Assignments
from scaletrain.nn.norm import pooled
from scaletrain.ops.kmeans import kmeans
from scaletrain.ops.precision import full_precision

# rows that are float64 at a time
_CHUNK = 16384


class Config(ComponentConfig):
    classes: Count = 10_000
    """Number of clusters, K."""

    whiten: Count = 256
    """Number of principal components of the features that are clustered."""

    iterations: Count = 20
    """Number of iterations of k-means."""

    miniature: ClassVar[Mapping[str, Any]] = {"classes": 5, "whiten": 4, "iterations": 4}


class Model(Method):
    """Each epoch clusters the features of all samples; a new classifier on top learns to tell the
    clusters apart.
    """

    kind = "joint"
    whole_images = True
    sizes: Tensor

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        super().__init__()
        self.config, self.run_info = config, run_info
        self.backbone = make_backbone()
        self.width = self.backbone.features
        if config.whiten > self.width:
            raise ValueError(
                f"method.whiten={config.whiten} is more than the {self.width} features of the "
                "network: lower it"
            )

        run_info.need_samples("method.classes", config.classes)
        self.classifier = nn.Linear(self.width, config.classes)
        self.assignments = Assignments(run_info.samples, [config.classes])
        # number of samples in each cluster
        self.register_buffer("sizes", torch.zeros(config.classes))

    def groups(self) -> Sequence[ParameterGroup]:
        return [
            ParameterGroup(
                "classifier", lambda name, _: name.startswith("classifier."), momentum=0.0
            )
        ]

    # --- clusters ---------------------------------------------------------------------------------

    def on_epoch(self, clock: Clock, features: Features, write: Write) -> None:
        # differs: the authors embed centre crops with running statistics, here whole images with
        # the batch's.
        bank = Bank(self.run_info.samples, self.width).to(self.sizes)
        for index, h in features(self._embed, every=False, training=True):
            bank.write(index, h)

        key = int(rng.hash64(self.run_info.seed, clock.epoch, "deepcluster"))
        rows = _whitened(bank.rows, self.config.whiten)
        _, new = kmeans(
            rows, bank.start, self.config.classes, self.config.iterations, key, split=True
        )
        self.sizes.copy_(self.assignments.renew(0, new))

        # The clusters have other numbers than the last epoch's: a new classifier, which every rank
        # draws alike, from a key.
        draw = torch.Generator().manual_seed(
            int(rng.hash64(self.run_info.seed, clock.epoch, "classifier"))
        )
        weight = torch.empty(self.config.classes, self.width)
        write("classifier.weight", nn.init.normal_(weight, std=0.01, generator=draw))
        write("classifier.bias", torch.zeros(self.config.classes))

    def _embed(self, batch: Batch) -> Tensor:
        h: Tensor = self.backbone(batch.views[0][0])
        return h

    # --- a step -----------------------------------------------------------------------------------

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        h = torch.cat([pooled(self.backbone, x) for x in batch.views])  # [V, B, width]
        loss, accuracy = self._loss(self.classifier(h), self.assignments.read(batch.index)[:, 0])
        return MethodOutput(
            {"all": loss},
            {"assignment_accuracy": accuracy} | self.assignments.scalars(),
            h[0].detach(),
        )

    @full_precision
    def _loss(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """logits [V, B, K]; label [B], -1 for samples that no pass has embedded: they weigh
        nothing.
        """
        # differs: the authors draw an epoch's samples evenly over clusters, here samples weigh the
        # inverse of their cluster's size, which is the same on average and keeps the order of the
        # data.
        even = self.sizes.sum() / (self.sizes > 0).sum().clamp_min(1)
        weight = torch.where(label >= 0, even / self.sizes[label].clamp_min(1), 0.0).to(
            logits
        )  # [B]
        labels = label.expand(len(logits), -1)
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none"
        )

        return (loss.view_as(labels) * weight).mean(), (
            logits.detach().argmax(-1) == labels
        ).float().mean()


def _whitened(rows: Tensor, dims: int) -> Tensor:
    """[n, D] of this rank -> [n, dims]: principal components of all ranks' rows, of unit variance,
    then of unit length.

    Rows of zeros are absent samples and stay so. The signs of the components are arbitrary and mean
    nothing to k-means.
    """
    present = rows.abs().sum(1, keepdim=True) > 0
    moments = rows.new_zeros(rows.shape[1] + 2, rows.shape[1], dtype=torch.float64)

    for x in map(Tensor.double, rows.split(_CHUNK)):
        moments += torch.cat(
            [
                x.T @ x,
                x.sum(0, keepdim=True),
                (x.abs().sum(1) > 0).sum().to(x).expand(1, x.shape[1]),
            ]
        )

    moments = dist.sum_nograd(moments)
    count, mean = moments[-1, 0].clamp_min(1), moments[-2] / moments[-1].clamp_min(1)
    variance, axes = torch.linalg.eigh(moments[:-2] / count - torch.outer(mean, mean))
    variance, axes = variance[-dims:], axes[:, -dims:]
    scale = torch.where(
        variance > 1e-10 * variance[-1],
        variance.clamp_min(torch.finfo(moments.dtype).tiny).rsqrt(),
        0.0,
    )

    axes = axes * scale
    white = F.normalize(rows @ axes.to(rows) - (mean @ axes).to(rows), dim=1)
    return torch.where(present, white, 0.0)
