"""SimCLR (Chen et al., 2020, arXiv 2002.05709; v2's deeper head: arXiv 2006.10029), after
google-research/simclr.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from scaletrain import rng
from scaletrain.config.schema import ComponentConfig, Count, Positive, Share
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, RunInfo
from scaletrain.methods.base import Projected
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import pooled
from scaletrain.ops.contrastive import nt_xent, similarities


class Config(ComponentConfig):
    layers: Count = 2
    """Number of layers of the projection head: 2 in v1, 3 in v2."""

    dim: Count = 128
    temperature: Positive = 0.1
    known_labels: Share = 0.0
    """Share of samples whose labels remove false negatives (a study of Addepalli et al., 2022)."""

    miniature: ClassVar[Mapping[str, Any]] = {"dim": 8}


class Model(Projected):
    """Two views of a sample attract, all other views of the global batch repel."""

    kind = "joint"
    two_views = True
    global_loss = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        # Every dense layer is followed by a norm and has no bias; the last norm has a scale but no
        # shift. differs: they start as PyTorch's do, not from N(0, .01); neither the norms behind
        # them nor LARS see that scale.
        def projector(width: int) -> nn.Module:
            return mlp(
                (*[width] * config.layers, config.dim),
                hidden_bias=False,
                last_bias=False,
                last_norm="scale",
                group=run_info.norm_group,
            )

        super().__init__(make_backbone, projector, run_info)
        self.config, self.seed = config, run_info.seed
        self.classes = 0 if config.known_labels else None

    def embed(self, batch: Batch, clock: Clock) -> tuple[Tensor, ...]:
        # both views in one forward share their statistics
        h = pooled(self.backbone, batch.views[0])
        return pooled(self.projector, h), h.detach()

    def loss(self, embedded: tuple[Tensor, ...], batch: Batch, clock: Clock) -> MethodOutput:
        (z1, z2), h = embedded
        loss = nt_xent(z1, z2, self.config.temperature, self._known(batch))
        return MethodOutput({"all": loss}, similarities(z1, z2), h[0])

    def _known(self, batch: Batch) -> Tensor | None:
        """Labels [B], -1 where the study must not know them; the same samples are known in every
        epoch.
        """
        if not self.config.known_labels:
            return None

        assert batch.labels is not None
        draw = rng.uniform(rng.hash64(self.seed, batch.index), "known label", 1)[:, 0]
        return batch.labels.where(draw < self.config.known_labels, -1)
