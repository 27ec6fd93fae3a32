"""Images to features of a frozen encoder: settings, transforms and the encoding of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from scaletrain import dist
from scaletrain.config import schema
from scaletrain.core import Batch
from scaletrain.data.loading import loader
from scaletrain.data.reading.subset_shards import AnyShards, SubsetShards
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.evals import encoding, store, transforms
from scaletrain.evals.encoders.targets import Encoder
from scaletrain.evals.errors import EvalError
from scaletrain.evals.store import Entry, FeatureStore, Stored
from scaletrain.evals.transforms import Resize, Transform
from scaletrain.runtime.versions import installed

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

    resize: Literal["auto", "none", "byol", "tv", "simclr-transfer", "native"] = "auto"
    """Test transform; auto: the whole image up to 64 px, else byol."""

    border: Annotated[int, Field(ge=0, le=1024)] = 0
    """Pixels cut off at each side of a test image before it is resized; 2 for ObjectNet."""

    corruption: str = ""
    """Of the test images, after the resize; empty for none."""

    severity: Annotated[int, Field(ge=0, le=5)] = 0
    """Of the corruption, from 1; 0 without one."""

    corruption_seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of what a corruption draws for each image."""

    batch: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Images per forward pass; it decides the order of random crops too, and so is part of the name
    of their results."""

    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    """Loader processes."""

    bf16: bool = False
    """Encode under bfloat16 autocast."""

    on_bad: Literal["auto", "raise", "skip"] = "auto"
    """A sample that cannot be read: stop, or leave it out; auto: as in the run."""

    max_bad: schema.Share | None = None
    """Share of a data set that may be left out; null: the run's data.max_bad."""

    store_gb: Annotated[float, Field(ge=0, le=1e6)] = 64.0
    """Most gigabytes of stored features, of which those go first that were not used for longest; 0
    stores none."""

    @model_validator(mode="after")
    def _possible(self) -> FeatureConfig:
        transforms.check(self.corruption, self.severity)
        return self


@dataclass(frozen=True)
class Features:
    """Encoded samples in the order of their number."""

    x: Tensor  # [N, D] float32, on the CPU
    labels: Tensor  # [N] int64, numbered as in classes.py
    # numbers of the samples in the folder or folders of the split, ascending
    index: Tensor  # [N] int64


@dataclass(frozen=True)
class Encoded:
    """The features of the samples of a data set that can be read."""

    x: Tensor  # [K, D] float32 on the CPU, memory-mapped if all samples could be read
    # numbers of these samples in the shards that were given, ascending
    index: Tensor  # [K] int64
    # {"sample": number in the folder, "fault": why} of every sample that could not be read
    left_out: tuple[dict[str, Any], ...]


class FeatureExtractor:
    """Encodes images with one frozen encoder, through deterministic transforms, and keeps the
    features in the store that is given.

    `encode` returns the features of a data set: stored ones, or else it encodes and stores them.
    With several ranks, every rank first calls `prepare` for each data set in the same order, so
    that all devices of the job share the work; then the others may end, and rank 0 calls `encode`,
    which finds the features. `forwards` counts the forward passes of this process.
    """

    def __init__(
        self, encoder: Encoder, settings: FeatureConfig, store: Path | None = None
    ) -> None:
        """store: the folder of stored features; None: none are stored."""
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
        self.forwards = 0
        self.store = (
            FeatureStore(store, int(settings.store_gb * 1e9))
            if store is not None and settings.store_gb
            else None
        )
        # Features that this process has opened, by their folder.
        self._opened: dict[Path, Stored] = {}

    # --- transforms ---

    @property
    def resize(self) -> Resize:
        """Name of the test transform."""
        if self.settings.resize != "auto":
            return self.settings.resize
        return "none" if self.size <= 64 else "byol"

    def transform_of(self, split: str) -> Transform:
        """The transform of a split: border and corruption are those of test images only."""
        kept = {"border", "corruption", "severity"} if split == "test" else set()
        changes = self.settings.model_dump(include=kept)
        if changes.get("corruption"):
            changes["seed"] = self.settings.corruption_seed
        return Transform(resize=self.resize, size=self.size, **changes)

    @property
    def view(self) -> schema.View:
        """The random view of training images: a resized crop of 8 to 100 % of the area and a flip,
        interpolated as in the test transform.
        """
        cubic = self.resize in ("byol", "simclr-transfer")
        scaling: dict[str, Any] = {
            "interpolation": "bicubic" if cubic else "bilinear",
            "antialias": self.resize != "byol",
        }

        return schema.View(size=self.size, jitter=0.0, grayscale=0.0, blur=0.0, **scaling)

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
        self, path: str, shards: AnyShards, what: str, transform: Transform | None = None
    ) -> Encoded:
        """The features of all samples, or of those that can be read where the policy is to leave
        the others out.

        path: of the shards, for messages. what: name of the progress bar. transform: by default
        that of training images. Raises ShardError for a sample that cannot be read where the policy
        is to stop, EvalError where too many are left out or the store cannot be used.
        """
        transform, samples = transform or self.transform_of("train"), len(shards)
        stored: Stored | None
        if self.store is None:
            encode = partial(self._encoded, path, shards, what, transform)
            stored = encoding.in_memory(encode, samples, self._width(transform))
        else:
            features = self._part_of_whole(shards, transform)
            stored = features or self._stored(path, shards, what, transform)
            assert stored is not None, "a process alone is rank 0"

        bad = list(stored.left_out)
        self._admit(path, samples, stored.left_out)
        if len(bad) == samples:
            raise EvalError(
                f"{path}: 0 of its {samples} samples could be read; index the folder again"
            )

        rows = shards.rows if isinstance(shards, SubsetShards) else range(samples)
        left_out = tuple(
            {"sample": int(rows[sample]), "fault": why} for sample, why in stored.left_out.items()
        )
        index = (~mask(torch.tensor(bad, dtype=torch.int64), samples)).nonzero().flatten()
        return Encoded(stored.x[index] if bad else stored.x, index, left_out)

    def prepare(
        self, path: str, shards: AnyShards, what: str, transform: Transform | None = None
    ) -> None:
        """Store what `encode` will return, with the devices of all ranks. Every rank must call it;
        errors of one are raised on all.
        """
        transform = transform or self.transform_of("train")
        if self.store is None:
            return

        def known() -> bool:
            opened = self._entry(shards, transform).folder in self._opened
            return opened or self._part_of_whole(shards, transform) is not None

        world = dist.world()
        if not encoding.on_main(known, world):
            self._stored(path, shards, what, transform, dist.rank(), world)

    def forward(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        """Features [K, D] float32 of a batch, or of its samples in the mask `keep` [B] bool."""
        images = batch.views[0][0]
        return self._forward(images if keep is None else images[keep])

    @torch.no_grad()
    def _forward(self, images: Tensor) -> Tensor:
        self.forwards += 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            x: Tensor = self.module(images)
        return x.float()

    def _width(self, transform: Transform) -> int:
        """The number of features of a sample."""
        size = transform.size
        return self._forward(torch.zeros(1, 3, size, size, device=self.device)).shape[1]

    def _entry(self, shards: AnyShards, transform: Transform) -> Entry:
        """The place of features in the store, which depends on all that defines them."""
        assert self.store is not None, "only called with a store"
        data, encoder = self.encoder.data, dict(self.encoder.identity)
        # the same weights may be those of several steps
        encoder.pop("step", None)
        identity = {
            "encoder": encoder,
            "data": shards.fingerprint,
            "transform": transform.model_dump(mode="json"),
            "precision": "bfloat16" if self.settings.bf16 else "float32",
            # of larger images none is read
            "max_pixels": data.max_pixels,
            "scaletrain": installed("scaletrain"),
        }
        return self.store.entry(identity, len(shards))

    def _part_of_whole(self, shards: AnyShards, transform: Transform) -> Stored | None:
        """The features of a subset, if those of all samples are stored."""
        if not isinstance(shards, SubsetShards):
            return None

        whole = self._open(self._entry(shards.shards, transform))
        return None if whole is None else whole.rows(torch.from_numpy(shards.rows))

    def _open(self, entry: Entry) -> Stored | None:
        """What is stored, opened and compared with its checksums once."""
        if entry.folder not in self._opened:
            stored = entry.read(self.skip)
            if stored is None:
                return None
            self._opened[entry.folder] = stored

        return self._opened[entry.folder]

    def _stored(
        self,
        path: str,
        shards: AnyShards,
        what: str,
        transform: Transform,
        rank: int = 0,
        world: int = 1,
    ) -> Stored | None:
        """Store what is missing, shared by all ranks, and open it: on rank 0, the others get
        None.
        """
        entry = self._entry(shards, transform)
        if world == 1 and entry.folder in self._opened:
            return self._opened[entry.folder]

        features = encoding.fill(
            entry,
            partial(self._encoded, path, shards, what, transform),
            width=partial(self._width, transform),
            # several full batches
            rows=store.ROWS * -(-4 * self.settings.batch // store.ROWS),
            skip=self.skip,
            rank=rank,
            world=world,
        )
        if features is not None:
            self._opened[entry.folder] = features
        return features

    def _encoded(
        self,
        path: str,
        shards: AnyShards,
        what: str,
        transform: Transform,
        parts: Sequence[tuple[int, int]],
        width: int,
    ) -> Iterator[encoding.Part]:
        """The features of each part [lo, hi) of the samples."""
        left_out: dict[int, str] = {}

        def lost(_: int, replaced: Sequence[Replaced]) -> None:
            left_out.update({one.planned: one.fault for one in replaced})
            self._admit(path, len(shards), left_out)

        data, batch = self.encoder.data, self.settings.batch
        images = loader.eval_batches(
            shards,
            transform=transform,
            parts=parts,
            batch=batch,
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
        batches = watch(images, what, sum(hi - lo for lo, hi in parts), len)
        return encoding.by_part(batches, parts, batch, width, self.forward, left_out, path)

    def _admit(self, path: str, samples: int, left_out: Mapping[int, str]) -> None:
        """Raise EvalError if more samples are left out than may be."""
        if len(left_out) > self.max_bad * samples:
            raise EvalError(
                f"{path}: {len(left_out)} or more of its {samples} samples cannot be read, and "
                f"max_bad={self.max_bad:g} allows fewer; the last: {list(left_out.values())[-1]}; "
                "repair the shards, or allow more with --set features.max_bad=SHARE"
            )


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
