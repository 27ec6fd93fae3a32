"""The data types and interfaces that all other modules share: Batch, Clock, MethodOutput,
ParameterGroup, DeferredState, Backbone, Source, Method.

Loss convention, stated once: every rank computes a loss over its own slice of the global batch such
that the *mean over ranks of the local losses is the global loss*. Engines average gradients over
ranks, which is then the global gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, Protocol, Self

from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One rank's contiguous slice of the global batch, as a training step sees it.

    Positions and keys, never ranks, define everything random, so any world size computes the same
    step.
    """

    # one entry per crop size, largest first: [V, B, 3, H, W], normalised floats
    views: tuple[Tensor, ...]
    # [B] int64: the sample's number in the data set in use: in data.subset, if there is one
    index: Tensor
    # [B] int64: hash of (seed, epoch, planned index, repeat), the root of all randomness of it
    keys: Tensor
    pixel_range: Tensor  # [2, 3]: what a black and a white pixel become after normalisation
    labels: Tensor | None = None  # [B] int64, -1 where unknown
    # [V, B, 1, H, W] in {0, 1}: foreground of views[0], cropped and flipped with it; the first of
    # `maps` of this kind
    masks: Tensor | None = None
    # one entry per map of data.maps, [V, B, 1, H, W], cropped and flipped with views[0]: int64
    # class numbers with 255 as void, or floats in [0, 1]
    maps: tuple[Tensor, ...] = ()
    # labelled samples of an auxiliary objective
    support: Batch | None = None
    groups: Tensor | None = None  # [B] int64: the sample's integer in data.groups

    def __len__(self) -> int:
        return len(self.index)

    def double(self) -> Batch:
        """The same batch in float64."""
        masks = None if self.masks is None else self.masks.double()
        maps = tuple(m.double() if m.is_floating_point() else m for m in self.maps)
        support = None if self.support is None else self.support.double()
        views = tuple(v.double() for v in self.views)
        return replace(
            self,
            views=views,
            pixel_range=self.pixel_range.double(),
            masks=masks,
            maps=maps,
            support=support,
        )

    def split(self, parts: int) -> list[Batch]:
        """Cut into `parts` equal micro-batches along the sample axis."""
        if len(self) % parts:
            raise ValueError(
                f"{len(self)} samples per rank do not split into {parts} equal micro-batches"
            )

        n = len(self) // parts

        def cut(x: Tensor | None, dim: int) -> Sequence[Tensor | None]:
            return [None] * parts if x is None else x.split(n, dim)

        views = list(zip(*(v.split(n, 1) for v in self.views), strict=True))
        maps = list(zip(*(m.split(n, 1) for m in self.maps), strict=True)) or [()] * parts
        support = [None] * parts if self.support is None else self.support.split(parts)
        columns = (
            cut(self.index, 0),
            cut(self.keys, 0),
            cut(self.labels, 0),
            cut(self.masks, 1),
            maps,
            support,
            cut(self.groups, 0),
        )

        return [
            replace(self, views=v, index=i, keys=k, labels=y, masks=m, maps=t, support=s, groups=g)
            for v, i, k, y, m, t, s, g in zip(views, *columns, strict=True)
        ]


@dataclass(frozen=True)
class Clock:
    """Where training stands; schedules are pure functions of it."""

    # optimizer steps taken so far
    step: int
    # optimizer steps of the whole run
    total: int
    epoch: int
    steps_per_epoch: int

    @property
    def progress(self) -> float:
        return min(1.0, self.step / max(1, self.total))

    def cosine(self, start: float, end: float) -> float:
        """Half a cosine from `start` at step 0 to `end` at the last step (BYOL, section 3.2: the
        target's tau).
        """
        return end - (end - start) * (math.cos(math.pi * self.progress) + 1) / 2

    def linear(self, start: float, end: float) -> float:
        return start + (end - start) * self.progress

    def every(self, n: int) -> bool:
        return n > 0 and self.step % n == 0


@dataclass(frozen=True)
class MethodOutput:
    """What a forward pass hands to the engine."""

    # their sum drives everything; with Method.separate_losses, each drives the group of its name
    losses: dict[str, Tensor]
    # for the monitor, detached, 0-d
    scalars: dict[str, Tensor] = field(default_factory=dict)
    # [B, features] detached, of the first view: watched for collapse, and the online probe's input
    embedding: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, for the monitor. Tensors are detached and still on the
    device.
    """

    # of the global batch
    loss: float
    # MethodOutput.losses and MethodOutput.scalars, this rank's
    scalars: dict[str, Tensor]
    # 0-d, of the whole gradient before clipping
    grad_norm: Tensor
    # LARS trust ratios: "min", "median", "max"
    trust: dict[str, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None  # [B, D]
    # the loss or the gradient was not finite and nothing was written
    skipped: bool = False
    # rate of the targets' moving average; None without targets
    ema: float | None = None


@dataclass(frozen=True)
class Piece:
    """A contiguous flat range of a named tensor: what one rank holds and writes to a checkpoint."""

    data: Tensor  # [n] flat, any device
    # offset of data[0] in the flattened whole
    start: int
    # of the whole
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are optimised alike.

    The first group whose `match` accepts a parameter takes it; what no group takes is in "all".
    """

    name: str
    match: Callable[[str, Tensor], bool]
    # multiplies the scheduled learning rate
    lr: float = 1.0
    # keep the base learning rate: neither warm-up nor decay (SimSiam's predictor)
    constant: bool = False
    # None: the optimizer's
    weight_decay: float | None = None
    momentum: float | None = None
    # LARS trust ratio; None: by the optimizer's exclusion rule
    adapt: bool | None = None
    # drop the gradient during the first steps (SwAV's prototypes)
    frozen_steps: int = 0


class DeferredState(nn.Module):
    """A module whose forward only *stages* what it would write; the engine commits after the step
    or discards it.

    So a skipped step and a pass for features leave no trace.
    """

    def commit(self, parts: int = 1) -> None:
        """Write what was staged, by equally many calls in each of the step's `parts`
        micro-batches.
        """
        raise NotImplementedError

    def discard(self) -> None:
        raise NotImplementedError

    def sharded(self) -> Mapping[str, tuple[int, int]]:
        """Buffers of which this rank holds rows [start, start + len) only: name -> (start, rows of
        the whole).
        """
        return {}


class Backbone(nn.Module):
    """An encoder of images [N, 3, H, W] into features [N, features], without a classifier."""

    # width of the output
    features: int
    # pixels of the image from one cell of the last feature map to the next
    stride: int
    # the last feature map is averaged over the image; None: it cannot be had otherwise
    pool: bool | None = None


@dataclass(frozen=True)
class RunInfo:
    """What a method may know of the run when it is built."""

    # in the data set in use, which may be a subset
    samples: int
    # global batch size
    batch: int
    steps_per_epoch: int
    # (pixels, count) per crop size, as in Batch.views
    views: tuple[tuple[int, int], ...]
    # model.norm_group, for the heads
    norm_group: int = 0
    seed: int = 0
    # labelled samples of a step for the auxiliaries, over all ranks: Batch.support
    support: int = 0

    def need_pair(self, method: str) -> None:
        """Raises ValueError unless a batch has two views of one size and no others."""
        if self.views[0][1] != 2 or len(self.views) > 1:
            raise ValueError(
                f"method {method} takes exactly two views of one size; data.views gives "
                f"{self.views} (pixels, count)"
            )

    def need_samples(self, field: str, clusters: int) -> None:
        """Raises ValueError where an epoch has fewer samples than clusters are asked for."""
        if clusters > (embedded := self.batch * self.steps_per_epoch):
            raise ValueError(
                f"{field}={clusters} is more than the {embedded} samples of an epoch: lower it"
            )


@dataclass(frozen=True)
class Source:
    """Saved weights that a module of a method starts from."""

    # a run folder (its newest step), a step of its checkpoints, or a safetensors file
    path: Path
    # the module's name there; "": a file of one network, whatever comes before its names
    module: str = "backbone"


class Features(Protocol):
    """A pass over the data between steps, without gradient and without a trace."""

    def __call__(
        self, embed: Callable[[Batch], Tensor], *, every: bool = True, training: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Stream (index [b], embed(batch) [b, ...]) of this rank's samples, batch by batch.

        every: each sample of the data set once (with data.on_bad=skip, a substitute for a bad one);
        in the last batch a rank may have fewer than others, or none. Otherwise the samples of the
        epoch, in full batches. training: batch norm uses statistics of the batch; otherwise running
        statistics. All ranks take equally many batches.
        """
        ...


Write = Callable[[str, Tensor], None]
"""write(name, value) changes a parameter, masters and replicas included, or a buffer; value is
whole, or computed from the parameter as the engine shows it.
"""


Kind = Literal["pretext", "joint", "supervised", "evaluation", "distillation", "saliency"]
"""pretext: predicts what was done to an image, such as a turn; joint: compares embeddings of views
or samples; supervised: predicts labels; evaluation: trains a network to be scored; distillation:
follows a trained teacher; saliency: finds foreground.
"""
# the kinds that train an encoder from nothing
PRETRAINING: tuple[Kind, ...] = ("pretext", "joint", "supervised")


class Method(nn.Module):
    """One paper. `forward` is the whole mathematics of a step; everything else is declared.

    A method whose loss couples samples may define `embed` and `loss` in place of forward: engines
    can then embed one micro-batch at a time (gradient caching). Parameters and DeferredState
    modules belong in embed only.

    A method file defines `Config` (a frozen `config.schema.ComponentConfig`) and one subclass named
    `Model`, built as `Model(config, make_backbone, run_info)`; `make_backbone()` returns an encoder
    with newly drawn weights.
    """

    # what it is for; see Kind
    kind: ClassVar[Kind]
    # it takes exactly two views, and none of a further size
    two_views: ClassVar[bool] = False
    # {target module: online module}; the engine moves targets by `ema`
    targets: ClassVar[Mapping[str, str]] = {}
    # modules such as a teacher that are always in evaluation mode and never change; they are not in
    # checkpoints but loaded from their source at every start
    constant: tuple[str, ...] = ()
    # the loss couples samples: gradient accumulation would change it
    global_loss: bool = False
    # every sample's label must be known and below this, or any for 0; None: none is needed
    classes: int | None = None
    # on_epoch's and on_end's features are of whole images, not of the first training views
    whole_images: ClassVar[bool] = False
    # each loss drives the parameters of its own group only (adversaries)
    separate_losses: ClassVar[bool] = False
    backbone: Backbone

    def ema(self, clock: Clock) -> float:
        """tau of: target <- tau * target + (1 - tau) * online, after the step."""
        raise NotImplementedError(f"{type(self).__name__} declares targets but no ema()")

    def start_targets(self) -> None:
        """Make the targets copies of their online modules, where the paper has no initialisation of
        their own.
        """
        for target, online in self.targets.items():
            self.get_submodule(target).load_state_dict(self.get_submodule(online).state_dict())

    def sources(self) -> Mapping[str, Source]:
        """Saved weights by the name of the module that starts from them. A target whose online
        module is among them, and that has none of its own, starts from the same.
        """
        return {}

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; constant modules stay in evaluation mode."""
        super().train(mode)
        for name in self.constant:
            self.get_submodule(name).eval()

        return self

    def groups(self) -> Sequence[ParameterGroup]:
        return ()

    def encode(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> [N, features], as an auxiliary takes them."""
        h: Tensor = self.backbone(x)
        return h

    def predict(self, x: Tensor) -> Tensor:
        """Optional: images [N, 3, H, W] -> class scores [N, C], or [N, C, H, W] of every pixel."""
        raise NotImplementedError(f"{type(self).__module__} has no classifier to predict with")

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        return self.loss(self.embed(batch, clock), batch, clock)

    def embed(self, batch: Batch, clock: Clock) -> tuple[Tensor, ...]:
        """What the loss needs of each sample: tensors [any, B, ...], those without gradient
        included.
        """
        raise NotImplementedError(
            f"{type(self).__name__} defines neither forward nor embed and loss"
        )

    def loss(self, embedded: tuple[Tensor, ...], batch: Batch, clock: Clock) -> MethodOutput:
        raise NotImplementedError(f"{type(self).__name__} defines embed without loss")

    def after_step(self, clock: Clock, write: Write) -> None:
        """Optional: runs after each step that was not skipped."""

    def on_epoch(self, clock: Clock, features: Features, write: Write) -> None:
        """Optional: runs before the first step of each epoch (clustering)."""

    def on_end(self, clock: Clock, features: Features, write: Write) -> None:
        """Optional: runs once after the last step, whose checkpoint has its result; `clock.step` is
        `clock.total`. A run that is then made longer has it again at its new end, on top of the
        first result.
        """
