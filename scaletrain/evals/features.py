"""Images to frozen features: the bank, the queries and the augmented stream that benchmarks draw
on, each encoded once.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import AfterValidator, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from scaletrain.config import schema
from scaletrain.core import Batch
from scaletrain.data.loading import loader
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.replacement import admit
from scaletrain.data.reading.subset import load as load_subset
from scaletrain.data.sampling.plan import Ints
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.evals.classes import Part, match
from scaletrain.evals.targets import EncoderUnderTest, EvalError

Item = TypeVar("Item")
Number = TypeVar("Number", int, float)


def some(values: tuple[Number, ...]) -> tuple[Number, ...]:
    """For settings that are lists."""
    if not values:
        raise ValueError("write one or more values")
    return values


def _usable(size: int) -> int:
    if size and not 8 <= size <= 4096:
        raise ValueError("write 8 to 4096 pixels, or 0 for the size of the run's largest view")
    return size


class Config(schema.Frozen):
    """How images reach every encoder and benchmark."""

    # pixels; 0: of the largest view of the run
    size: Annotated[int, AfterValidator(_usable)] = 0
    # of plain(); auto: the whole image up to 64 px, else byol
    resize: Literal["auto", "none", "byol", "tv"] = "auto"
    # images encoded at once
    batch: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    # decoding processes
    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    bf16: bool = False
    # a sample that cannot be read: stop, or leave it out; auto: as the run
    on_bad: Literal["auto", "raise", "skip"] = "auto"
    # share of a set that may be left out; null: the run's data.max_bad
    max_bad: schema.Share | None = None


@dataclass(frozen=True)
class Features:
    """Encoded samples in the order of their number."""

    x: Tensor  # [N, D] float32, on the CPU
    labels: Tensor  # [N] int64, numbered as in classes.py


class EvalContext:
    """One encoder, one training and one test set. What a benchmark has encoded the next one finds
    ready.

    With a label subset the training set is its samples, numbered 0, 1, ... in their order, and no
    other image is read. Samples that are left out because they cannot be read are no part of their
    set either.
    """

    def __init__(
        self,
        subject: EncoderUnderTest,
        settings: Config,
        train: str | Path,
        test: str | Path,
        subset: Path | None = None,
        same_numbers: bool = False,
    ) -> None:
        """Raises DataError for a `subset` of other shards than `train`, EvalError where labels do
        not fit together.
        """
        self.subject, self.settings = subject, settings
        self.train, self.test = str(train), str(test)
        self.skip = (
            subject.data.on_bad if settings.on_bad == "auto" else settings.on_bad
        ) == "skip"
        self.max_bad = subject.data.max_bad if settings.max_bad is None else settings.max_bad

        self._opened: dict[str, Shards] = {}
        ours, theirs = self._shards(self.train), self._shards(self.test)
        # the samples of the shards that are the training set; None: all
        self._rows: Ints | None = None
        self._subset: dict[str, Any] | None = None
        self._subset_sha: str | None = None

        if subset is None:
            learnt = Part(
                self.train, self.train, ours.labels(), ours.fingerprint, ours.unlabelled()
            )
        else:
            found = load_subset(subset, ours)
            self._rows = found.index
            learnt = Part(self.train, str(subset), found.labels, ours.fingerprint)
            digest = hashlib.sha256(subset.read_bytes()).hexdigest()
            self._subset = {
                "file": subset.name,
                "sha256": digest,
                "samples": len(found.index),
                "rule": found.rule,
            }

            self._subset_sha = hashlib.sha256(
                found.index.tobytes() + found.labels.tobytes()
            ).hexdigest()

        asked = Part(self.test, self.test, theirs.labels(), theirs.fingerprint, theirs.unlabelled())
        self.matched = match(learnt, asked, same_numbers)
        # of the training set
        self._labels = self.matched.train
        self._left_out: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.size = min(
            settings.size or subject.size, subject.size if subject.encoder == "pixels" else 1 << 20
        )
        self.module = subject.module.to(self.device)

        self._bank: Features | None = None
        self._queries: Features | None = None

    @property
    def samples(self) -> int:
        """In the training set."""
        if self.skip:
            # only a pass over it tells which can be read
            self.bank()
        return len(self._labels)

    @property
    def classes(self) -> int:
        """Of the training set."""
        return self.matched.count

    @property
    def known(self) -> Tensor | None:
        """The labels [N] of a label subset."""
        return None if self._subset is None else self._labels

    def bank(self) -> Features:
        """All training images through the test transform."""
        if self._bank is None:
            x, good = self._encode("train", "training images", self._rows)
            if not good.all():
                self._rows = (np.arange(len(good)) if self._rows is None else self._rows)[
                    good.numpy()
                ]
                self._labels = self._labels[good]

            self._bank = Features(x, self._labels)

        return self._bank

    def queries(self) -> Features:
        """All test images through the test transform."""
        if self._queries is None:
            x, good = self._encode("test", "test images", None)
            self._queries = Features(x, self.matched.test[good])
        return self._queries

    def part(self, rows: Tensor) -> Features:
        """The training images of the numbers `rows` (ascending) through the test transform; no
        other image is read.
        """
        if self.skip or self._bank is not None:
            return Features(self.bank().x[rows], self._labels[rows])

        x, _ = self._encode(
            "train",
            "held-out images",
            rows.numpy() if self._rows is None else self._rows[rows.numpy()],
        )

        return Features(x, self._labels[rows])

    def augmented(self, wanted: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (features [b, D], labels [b]) on the device: epochs in new order through random
        crops and flips.

        Of the training images those that the mask `wanted` [N] bool allows.
        """
        batch = min(self.settings.batch, self.samples)
        data = self.subject.data.model_copy(
            update={
                "path": self.train,
                "mixture": (),
                "epoch_samples": 0,
                # a small batch still fits
                "lanes": math.gcd(batch, self.subject.data.lanes),
                "workers": self.settings.workers,
                "masks": False,
                "support": None,
                "on_bad": "skip" if self.skip else "raise",
                "views": (self.view,),
            }
        )

        stream = loader.open_stream(
            data, seed=seed, batch=batch, rank=0, world=1, device=self.device, rows=self._rows
        )

        def lost(_: int, replaced: Sequence[Replaced]) -> None:
            """What cannot be read has left the set by now, and a substitute may lie outside a label
            subset.
            """
            for one in replaced:
                raise EvalError(f"{one.fault}; it could be read a while ago")

        try:
            for part in stream.batches(0, sys.maxsize, lost):
                number = part.index.cpu()
                if self._rows is not None:
                    number = torch.searchsorted(torch.from_numpy(self._rows), number)

                keep = wanted[number]
                yield (
                    self._forward(part, keep.to(self.device)),
                    self._labels[number[keep]].to(self.device),
                )
        finally:
            stream.close()

    # --- for the result ---

    @property
    def resize(self) -> str:
        """Protocol of the test transform."""
        return (
            ("none" if self.size <= 64 else "byol")
            if self.settings.resize == "auto"
            else self.settings.resize
        )

    @property
    def view(self) -> schema.View:
        """The random view of the augmented stream: resized crop of 8 to 100 % of the area and flip,
        scaled as in the test.
        """
        byol = self.resize == "byol"
        scaling: dict[str, Any] = {
            "interpolation": "bicubic" if byol else "bilinear",
            "antialias": not byol,
        }

        return schema.View(size=self.size, jitter=0.0, grayscale=0.0, blur=0.0, **scaling)

    @property
    def transform(self) -> dict[str, Any]:
        data = self.subject.data
        return {
            "resize": self.resize,
            "size": self.size,
            "mean": data.mean,
            "std": data.std,
            "bf16": self.settings.bf16,
        }

    @property
    def augmentation(self) -> dict[str, Any]:
        kept = ("size", "scale", "ratio", "interpolation", "antialias", "flip")
        return {
            "name": "random resized crop and flip",
            **self.view.model_dump(mode="json", include=set(kept)),
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What defines a measurement besides the encoder and the benchmark; known before anything
        is measured.
        """
        transform = {
            key: value for key, value in self.transform.items() if key not in ("mean", "std")
        }
        policy = (
            {"on_bad": "skip", "max_pixels": self.subject.data.max_pixels}
            if self.skip
            else {"on_bad": "raise"}
        )

        return {
            "features": {**transform, "batch": self.settings.batch, **policy},
            "train": self._shards(self.train).fingerprint,
            "test": self._shards(self.test).fingerprint,
            "labels": self._subset_sha,
            "classes": {"matched": self.matched.matched, "sha256": self.matched.sha256},
        }

    def provenance(self) -> dict[str, Any]:
        """Of both sets the path, the number of samples, a sha256 of all their bytes and what was
        left out; classes; subset.
        """
        data: dict[str, Any] = {}

        for name, path in (("train", self.train), ("test", self.test)):
            shards = self._shards(path)
            data[name] = {"path": path, "samples": len(shards), "sha256": shards.fingerprint}
            if self.skip:
                data[name]["left_out"] = self._left_out[name]
                data[name]["left_out_of_index"] = sum(loss.samples for loss in shards.losses)

        data["classes"] = {"count": self.classes, "matched": self.matched.matched}
        return data | ({} if self._subset is None else {"labels": self._subset})

    def _shards(self, path: str) -> Shards:
        """Opened once: the list of remote ones is fetched."""
        if path not in self._opened:
            found = Shards(path, cache=self.subject.data.cache, skip=self.skip)
            admit(found.losses, "skip" if self.skip else "raise", self.max_bad, "--set features.")
            self._opened[path] = found

        return self._opened[path]

    # --- encoding ---

    def _encode(self, name: str, what: str, rows: Ints | None) -> tuple[Tensor, Tensor]:
        """Features [K, D] of those of the `rows` [N] of a set (None: all) that can be read, and
        which they are, [N] bool.

        Raises ShardError for a sample that cannot be read, or EvalError where too many are left
        out.
        """
        path = self.train if name == "train" else self.test
        numbers = np.arange(len(self._shards(path))) if rows is None else rows
        good = torch.ones(len(numbers), dtype=torch.bool)

        left_out = self._left_out[name]

        def lost(_: int, replaced: Sequence[Replaced]) -> None:
            for one in replaced:
                good[int(numbers.searchsorted(one.planned))] = False
                left_out.append({"sample": one.planned, "fault": one.fault})

            if len(left_out) > self.max_bad * len(numbers):
                raise EvalError(
                    f"{path}: {len(left_out)} or more of its {len(numbers)} samples cannot be "
                    "read, and "
                    f"max_bad={self.max_bad:g} allows fewer; the last: {left_out[-1]['fault']}; "
                    "mend the shards, or allow more "
                    "by --set features.max_bad=SHARE"
                )

        data = self.subject.data
        images = loader.eval_batches(
            path,
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
            rows=rows,
            cache=data.cache,
            skip=self.skip,
            lost=lost,
        )

        x, at, done = torch.empty(0), 0, 0
        for batch in watch(images, what, len(numbers), len):
            stop = at + len(batch) + (len(left_out) - (at - done))
            due = torch.from_numpy(numbers[at:stop])[good[at:stop]]
            if not torch.equal(batch.index.cpu(), due):
                raise EvalError(
                    f"{path}: the stream gave samples {batch.index.tolist()[:3]} .. where "
                    f"{due[:3].tolist()} .. were due"
                )

            part = self._forward(batch, None)
            # filled in place: a list and its concatenation would need the memory twice
            if not done:
                x = torch.empty(len(numbers), part.shape[1])

            x[done : done + len(part)] = part
            at, done = stop, done + len(part)

        if not done or done + len(left_out) != len(numbers):
            raise EvalError(
                f"{path}: {done} of its {len(numbers)} samples could be read; index the folder "
                "again"
            )

        return x[:done], good

    @torch.no_grad()
    def _forward(self, batch: Batch, keep: Tensor | None) -> Tensor:
        """Float32 features of the samples that the mask `keep` [B] bool allows."""
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
    """Pass the items on under a progress bar, which only a terminal sees."""
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
