"""Images to features of a frozen encoder: settings, transforms and the encoding of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from scaletrain.config import schema
from scaletrain.core import Batch
from scaletrain.data.loading import loader
from scaletrain.data.reading.subset_shards import AnyShards, SubsetShards
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.evals.encoders.targets import Encoder
from scaletrain.evals.errors import EvalError

Item = TypeVar("Item")
Number = TypeVar("Number", int, float)


def some(values: tuple[Number, ...]) -> tuple[Number, ...]:
    """Validate that a list of settings is not empty."""
    if not values:
        raise ValueError("write one or more values")
    return values


def _usable(size: int) -> int:
    if size and not 8 <= size <= 4096:
        raise ValueError("write 8 to 4096 pixels, or 0 for the size of the run's largest view")
    return size


class FeatureConfig(schema.Frozen):
    """How images are prepared and encoded, for every encoder and benchmark."""

    size: Annotated[int, AfterValidator(_usable)] = 0
    """Pixels; 0: the size of the run's largest view."""

    resize: Literal["auto", "none", "byol", "tv"] = "auto"
    """Test transform; auto: the whole image up to 64 px, else byol."""

    batch: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Images per forward pass."""

    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    """Loader processes."""

    bf16: bool = False
    """Encode under bfloat16 autocast."""

    on_bad: Literal["auto", "raise", "skip"] = "auto"
    """A sample that cannot be read: stop, or leave it out; auto: as in the run."""

    max_bad: schema.Share | None = None
    """Share of a data set that may be left out; null: the run's data.max_bad."""


@dataclass(frozen=True)
class Features:
    """Encoded samples in the order of their number."""

    x: Tensor  # [N, D] float32, on the CPU
    labels: Tensor  # [N] int64, numbered as in classes.py
    # numbers of the samples in the folder or folders of the split, ascending
    index: Tensor  # [N] int64


class FeatureExtractor:
    """Encodes images with one frozen encoder, through one test transform."""

    def __init__(self, encoder: Encoder, settings: FeatureConfig) -> None:
        self.encoder, self.settings = encoder, settings
        self.skip = (
            encoder.data.on_bad if settings.on_bad == "auto" else settings.on_bad
        ) == "skip"
        self.max_bad = encoder.data.max_bad if settings.max_bad is None else settings.max_bad
        self.size = min(
            settings.size or encoder.size, encoder.size if encoder.kind == "pixels" else 1 << 20
        )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = encoder.module.to(self.device)

    # --- transforms ---

    @property
    def resize(self) -> str:
        """Name of the test transform."""
        return (
            ("none" if self.size <= 64 else "byol")
            if self.settings.resize == "auto"
            else self.settings.resize
        )

    @property
    def view(self) -> schema.View:
        """The random view of training images: a resized crop of 8 to 100 % of the area and a flip,
        interpolated as in the test transform.
        """
        byol = self.resize == "byol"
        scaling: dict[str, Any] = {
            "interpolation": "bicubic" if byol else "bilinear",
            "antialias": not byol,
        }

        return schema.View(size=self.size, jitter=0.0, grayscale=0.0, blur=0.0, **scaling)

    @property
    def transform(self) -> dict[str, Any]:
        """The test transform, as written in results."""
        data = self.encoder.data
        return {
            "resize": self.resize,
            "size": self.size,
            "mean": data.mean,
            "std": data.std,
            "bf16": self.settings.bf16,
        }

    @property
    def augmentation(self) -> dict[str, Any]:
        """The random view, as written in results."""
        kept = ("size", "scale", "ratio", "interpolation", "antialias", "flip")
        return {
            "name": "random resized crop and flip",
            **self.view.model_dump(mode="json", include=set(kept)),
        }

    # --- encoding ---

    def encode(
        self,
        path: str,
        shards: AnyShards,
        what: str,
        left_out: list[dict[str, Any]],
    ) -> tuple[Tensor, Tensor]:
        """Features [K, D] of the samples that can be read, and a mask [N] bool of which these are.

        path: of the shards, for messages. what: name of the progress bar. Samples that cannot be
        read are added to `left_out`, by their number in the folder. Raises ShardError for one where
        the policy is to stop, EvalError where too many are left out.
        """
        samples = len(shards)
        good = torch.ones(samples, dtype=torch.bool)

        def lost(_: int, replaced: Sequence[Replaced]) -> None:
            for one in replaced:
                good[one.planned] = False
                rows = shards.rows if isinstance(shards, SubsetShards) else range(samples)
                left_out.append({"sample": int(rows[one.planned]), "fault": one.fault})

            if len(left_out) > self.max_bad * samples:
                raise EvalError(
                    f"{path}: {len(left_out)} or more of its {samples} samples cannot be "
                    f"read, and max_bad={self.max_bad:g} allows fewer; the last: "
                    f"{left_out[-1]['fault']}; repair the shards, or allow more with "
                    "--set features.max_bad=SHARE"
                )

        data = self.encoder.data
        images = loader.eval_batches(
            shards,
            size=self.size,
            resize=self.resize,
            batch=self.settings.batch,
            workers=self.settings.workers,
            device=self.device,
            mean=data.mean,
            std=data.std,
            max_pixels=data.max_pixels,
            timeout=data.timeout,
            liveness=data.liveness,
            skip=self.skip,
            lost=lost,
        )

        x, at, done = torch.empty(0), 0, 0
        for batch in watch(images, what, samples, len):
            stop = at + len(batch) + (len(left_out) - (at - done))
            due = torch.arange(at, stop)[good[at:stop]]
            if not torch.equal(batch.index.cpu(), due):
                raise EvalError(
                    f"{path}: the stream gave samples {batch.index.tolist()[:3]} .. where "
                    f"{due[:3].tolist()} .. were due"
                )

            part = self.forward(batch)
            # Filled in place: a list and its concatenation would need twice the memory.
            if not done:
                x = torch.empty(samples, part.shape[1])

            x[done : done + len(part)] = part
            at, done = stop, done + len(part)

        if not done or done + len(left_out) != samples:
            raise EvalError(
                f"{path}: {done} of its {samples} samples could be read; index the folder again"
            )

        return x[:done], good

    @torch.no_grad()
    def forward(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        """Features [K, D] float32 of a batch, or of its samples in the mask `keep` [B] bool."""
        images = batch.views[0][0]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            x: Tensor = self.module(images if keep is None else images[keep])
        return x.float()


def mask(rows: Tensor, samples: int) -> Tensor:
    """[samples] bool, true at `rows`."""
    return torch.zeros(samples, dtype=torch.bool).index_fill(0, rows, True)


def watch(
    items: Iterable[Item], what: str, total: int, weigh: Callable[[Item], int] = lambda _: 1
) -> Iterator[Item]:
    """Yield the items under a progress bar, which is shown on terminals only."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)

    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(task, weigh(item))
