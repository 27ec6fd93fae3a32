"""Images to frozen features: the bank, the queries and the augmented stream that benchmarks draw on, each encoded once."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from scaletrain import config
from scaletrain.core import Batch
from scaletrain.data import loader
from scaletrain.data.joined import classes
from scaletrain.data.labels import load as load_subset
from scaletrain.data.partial import CLASSES
from scaletrain.data.plan import Ints
from scaletrain.data.reader import Shards
from scaletrain.evals.targets import EvalError, Subject

Item = TypeVar("Item")


class Config(config.Frozen):
    """How images reach every encoder and benchmark."""

    size: config.Natural = 0  # pixels; 0: of the run's first view
    resize: Literal["auto", "none", "byol", "tv"] = "auto"  # of plain(); auto: the whole image up to 64 px, else byol
    batch: config.Count = 256  # images encoded at once
    workers: config.Natural = 2  # decoding processes
    bf16: bool = False


@dataclass(frozen=True)
class Features:
    """Encoded samples in the order of their number."""

    x: Tensor  # [N, D] float32, on the CPU
    labels: Tensor  # [N] int64


class Scene:
    """One encoder, one training and one test set. What a benchmark has encoded the next one finds ready.

    With a label subset the training set is its samples, numbered 0, 1, ... in their order, and no other image is read.
    """

    def __init__(
        self, subject: Subject, settings: Config, train: str | Path, test: str | Path, subset: Path | None = None
    ) -> None:
        """Raises DataError for a `subset` of other shards than `train`."""
        self.subject, self.settings = subject, settings
        self.train, self.test = str(train), str(test)
        _same_classes(self.train, self.test)
        self._rows: Ints | None = None  # the samples of the shards that are the training set; None: all
        self.known: Tensor | None = None  # the labels [N] of a label subset
        self._labelled_by = self.train
        self._card: dict[str, Any] = {}
        self._opened: dict[str, Shards] = {}
        if subset is not None:
            found = load_subset(subset, self._shards(self.train))
            self._rows, self.known = found.index, torch.from_numpy(found.labels)
            self._labelled_by = str(subset)
            digest = hashlib.sha256(subset.read_bytes()).hexdigest()
            self._card = {"labels": {"file": subset.name, "sha256": digest, "samples": self.samples, "rule": found.rule}}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.size = min(settings.size or subject.size, subject.size if subject.encoder == "pixels" else 1 << 20)
        self.module = subject.module.to(self.device)
        self._bank: Features | None = None
        self._queries: Features | None = None
        self._labels: Tensor | None = None  # of the training set, from the first pass over it

    @cached_property
    def samples(self) -> int:
        """In the training set."""
        return len(self._shards(self.train)) if self._rows is None else len(self._rows)

    @property
    def classes(self) -> int:
        """Of the training set; known after its first pass."""
        assert self._labels is not None, "ask for bank() or part() first"
        return int(self._labels.max()) + 1

    def bank(self) -> Features:
        """All training images through the test transform."""
        if self._bank is None:
            self._bank = Features(*self._encode(self.train, "training images", rows=self._rows))
            self._labels = self._bank.labels
        return self._bank

    def queries(self) -> Features:
        """All test images through the test transform."""
        if self._queries is None:
            self._queries = Features(*self._encode(self.test, "test images"))
            if self._labels is not None and int(self._queries.labels.max()) >= self.classes:
                raise EvalError(
                    f"{self.test}: label {int(self._queries.labels.max())}, but the labels of {self._labelled_by} end at "
                    f"{self.classes - 1}; the two are not one data set. Give the right ones with --train, --test and --labels"
                )
        return self._queries

    def part(self, rows: Tensor) -> Features:
        """The training images of the numbers `rows` (ascending) through the test transform; no other image is encoded."""
        if self._bank is not None:
            return Features(self._bank.x[rows], self._bank.labels[rows])
        x, self._labels = self._encode(self.train, "held-out images", mask(rows, self.samples), self._rows)
        return Features(x, self._labels[rows])

    def augmented(self, wanted: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (features [b, D], labels [b]) on the device: epochs in new order through random crops and flips.

        Of the training images those that the mask `wanted` [N] bool allows.
        """
        batch = min(self.settings.batch, self.samples)
        data = self.subject.data.model_copy(
            update={
                "path": self.train,
                "mixture": (),
                "epoch_samples": 0,
                "lanes": math.gcd(batch, self.subject.data.lanes),  # a small batch still fits
                "workers": self.settings.workers,
                "masks": False,
                "on_bad": "raise",  # a substitute may lie outside a label subset
                "views": (self.view,),
            }
        )
        stream = loader.Stream(data, seed=seed, batch=batch, rank=0, world=1, device=self.device, rows=self._rows)
        try:
            for part in stream.batches(0, sys.maxsize):
                number = part.index.cpu()
                if self._rows is not None:
                    number = torch.searchsorted(torch.from_numpy(self._rows), number)
                keep = wanted[number].to(self.device)
                yield self._forward(part, keep), _labels(part, self.train)[keep]
        finally:
            stream.close()

    # --- for the protocol card ---

    @property
    def resize(self) -> str:
        """Protocol of the test transform."""
        return ("none" if self.size <= 64 else "byol") if self.settings.resize == "auto" else self.settings.resize

    @property
    def view(self) -> config.View:
        """The random view of the augmented stream: resized crop of 8 to 100 % of the area and flip, scaled as in the test."""
        byol = self.resize == "byol"
        scaling: dict[str, Any] = {"interpolation": "bicubic" if byol else "bilinear", "antialias": not byol}
        return config.View(size=self.size, jitter=0.0, grayscale=0.0, blur=0.0, **scaling)

    @property
    def transform(self) -> dict[str, Any]:
        data = self.subject.data
        return {"resize": self.resize, "size": self.size, "mean": data.mean, "std": data.std, "bf16": self.settings.bf16}

    @property
    def augmentation(self) -> dict[str, Any]:
        kept = ("size", "area", "ratio", "interpolation", "antialias", "flip")
        return {"name": "random resized crop and flip", **self.view.model_dump(mode="json", include=set(kept))}

    def provenance(self) -> dict[str, Any]:
        """Of both sets the path, the number of samples and a sha256 of all their bytes; the label subset."""
        paths = {"train": self.train, "test": self.test}
        shards = {name: self._shards(path) for name, path in paths.items()}
        data = {n: {"path": paths[n], "samples": len(found), "sha256": found.fingerprint} for n, found in shards.items()}
        return {**data, **self._card}

    def _shards(self, path: str) -> Shards:
        """Opened once: the list of remote ones is fetched."""
        if path not in self._opened:
            self._opened[path] = Shards(path, cache=self.subject.data.cache)
        return self._opened[path]

    # --- encoding ---

    def _encode(self, path: str, what: str, wanted: Tensor | None = None, rows: Ints | None = None) -> tuple[Tensor, Tensor]:
        """Features [N, D] (of the `wanted` [N] bool only, if given) and all labels [N], in the order of `rows`."""
        samples = len(self._shards(path)) if rows is None else len(rows)
        data = self.subject.data
        images = loader.plain(
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
        )
        numbers = torch.arange(samples) if rows is None else torch.from_numpy(rows)
        kept = samples if wanted is None else int(wanted.sum())
        x, labels, seen, done = torch.empty(0), torch.empty(samples, dtype=torch.int64), 0, 0
        for batch in watch(images, what, samples, len):
            where = torch.arange(seen, seen + len(batch))
            due = numbers[seen : seen + len(batch)]
            if not torch.equal(batch.index.cpu(), due):
                raise EvalError(
                    f"{path}: the stream gave samples {batch.index.tolist()[:3]} .. where {due[:3].tolist()} .. were due"
                )
            labels[where] = _labels(batch, path).cpu()
            seen += len(batch)
            part = self._forward(batch, None if wanted is None else wanted[where].to(self.device))
            if not done:  # filled in place: a list and its concatenation would need the memory twice
                x = torch.empty(kept, part.shape[1])
            x[done : done + len(part)] = part
            done += len(part)
        if seen != samples:
            raise EvalError(f"{path}: the stream gave {seen} of its {samples} samples; index the folder again")
        return x, labels

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


def watch(items: Iterable[Item], what: str, total: int, weigh: Callable[[Item], int] = lambda _: 1) -> Iterator[Item]:
    """Pass the items on under a progress bar, which only a terminal sees."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(task, weigh(item))


def _labels(batch: Batch, path: str) -> Tensor:
    if batch.labels is None or int(batch.labels.min()) < 0:
        raise EvalError(f"{path}: samples without a label; judging needs `.cls` members in every shard of --train and --test")
    return batch.labels


def _same_classes(train: str, test: str) -> None:
    """Class names, where both folders have them, must be the same in the same order: labels are positions in that list."""
    found = [classes(path) for path in (train, test)]
    if None in found:  # shards of another writer have no names
        return
    try:
        ours, theirs = (json.loads(names or b"") for names in found)
    except ValueError:
        return
    if ours != theirs:
        raise EvalError(f"{train} and {test} have different {CLASSES}: the labels do not mean the same classes")
