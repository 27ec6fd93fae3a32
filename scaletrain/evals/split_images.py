"""Opens the shards of a dataset's splits, with their labels in one numbering."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaletrain.config.recipe import listed
from scaletrain.config.recipe import shards as list_of
from scaletrain.config.schema import CacheConfig
from scaletrain.data.format import selection
from scaletrain.data.format.names import CLASSES
from scaletrain.data.reading.concat import ConcatShards
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.replacement import admit
from scaletrain.data.reading.subset import Subset, load_samples
from scaletrain.data.reading.subset import load as load_subset
from scaletrain.data.reading.subset_shards import AnyShards, SubsetShards
from scaletrain.data.sampling.plan import Ints
from scaletrain.evals.classes import LabelledSet, named, read_names
from scaletrain.evals.datasets import BenchmarkDataset, SplitConfig
from scaletrain.evals.errors import EvalError

# Paths that select shards of one folder.
Place = tuple[str, ...]


@dataclass(frozen=True)
class SplitImages:
    """The images of one or several splits. path: of their shards, for people. base: all samples of
    these shards. shards: those that belong to a split. val: which of these are official validation
    images. subset: the file that chooses among the samples, with its identity.
    """

    path: str
    base: Shards | ConcatShards
    shards: AnyShards
    val: Tensor | None = None
    subset: dict[str, Any] | None = None

    @property
    def rows(self) -> Ints:
        """Numbers of the samples in `base`."""
        shards = self.shards
        return shards.rows if isinstance(shards, SubsetShards) else np.arange(len(shards))

    @property
    def chosen(self) -> str | None:
        """Identity of the choice of samples; None where all belong to a split."""
        return self.shards.fingerprint if isinstance(self.shards, SubsetShards) else None

    @property
    def parts(self) -> Sequence[Shards]:
        """The shards of each folder."""
        return self.base.parts if isinstance(self.base, ConcatShards) else [self.base]

    def common(self, rows: Ints, other: SplitImages, other_rows: Ints) -> int:
        """How many of the samples `rows` of `base` are among the samples `other_rows` of another
        base: shards are compared by their content, wherever they are.
        """
        ours, theirs = self._by_shard(rows), other._by_shard(other_rows)
        return sum(
            len(np.intersect1d(ours[sha256], theirs[sha256])) for sha256 in ours.keys() & theirs
        )

    def _by_shard(self, rows: Ints) -> dict[bytes, Ints]:
        """Places of ascending samples within their shards, by the sha256 of these."""
        ends = np.cumsum(self.base.counts)
        starts = ends - self.base.counts
        cuts = rows.searchsorted(ends)[:-1]
        sums = np.concatenate([part.checksums for part in self.parts])
        listing: dict[bytes, Ints] = {}
        for sha256, own, start in zip(sums.tolist(), np.split(rows, cuts), starts, strict=True):
            if len(own):
                listing[sha256] = np.union1d(listing.get(sha256, own - start), own - start)

        return listing


class Opener:
    """Opens the shards of a dataset, each folder and list of folders once."""

    def __init__(
        self, dataset: BenchmarkDataset, cache: CacheConfig, skip: bool, max_bad: float
    ) -> None:
        self.dataset, self.cache, self.skip, self.max_bad = dataset, cache, skip, max_bad
        self._opened: dict[tuple[Place, ...], Shards | ConcatShards] = {}
        self._files: dict[SplitConfig, Subset] = {}

    def images(
        self, split: SplitConfig, val: SplitConfig | None = None
    ) -> tuple[SplitImages, LabelledSet]:
        """The images of a split and of its official validation images, with their labels. Raises
        EvalError or DataError.
        """
        splits = [split] if val is None else [split, val]
        places = tuple(dict.fromkeys(place for one in splits for place in _places(one)))
        base = self._open(places)
        admit(base.losses, "skip" if self.skip else "raise", self.max_bad, "--set features.")

        parts = base.parts if isinstance(base, ConcatShards) else [base]
        starts = np.cumsum([0, *map(len, parts)])
        ranges = {
            place: np.arange(lo, hi)
            for place, lo, hi in zip(places, starts[:-1], starts[1:], strict=True)
        }
        chosen = [self._rows(one, ranges) for one in splits]
        rows = np.unique(np.concatenate(chosen))
        shards = base if len(rows) == len(base) else SubsetShards(base, rows)
        paths = dict.fromkeys(path for one in splits for path in listed(one.shards))
        path = split.shards if len(paths) == 1 else str(list_of([*paths]))
        images = SplitImages(path, base, shards, subset=self._subset(split, len(chosen[0])))

        if val is not None:
            if twice := images.common(chosen[0], images, chosen[1]):
                raise EvalError(
                    f"dataset {self.dataset.name}: {twice:,} images are training and validation "
                    "images; correct its descriptor"
                )
            images = replace(images, val=torch.from_numpy(np.isin(rows, chosen[1])))

        labels, names = self._labels(places, parts)
        bare = "" if labels[rows].min(initial=0) >= 0 or split.file else shards.unlabelled()
        source = split.file or path
        return images, LabelledSet(path, source, labels[rows], base.fingerprint, names, bare)

    def close(self) -> None:
        """Close all files; they are opened again when a sample is read."""
        for shards in self._opened.values():
            shards.close()

    def _open(self, places: tuple[Place, ...]) -> Shards | ConcatShards:
        if places not in self._opened:
            self._opened[places] = (
                Shards(places[0], cache=self.cache, skip=self.skip)
                if len(places) == 1
                else ConcatShards(places, cache=self.cache, skip=self.skip)
            )

        return self._opened[places]

    def _rows(self, split: SplitConfig, ranges: Mapping[Place, Ints]) -> Ints:
        """Numbers of the samples of a split among those of all its folders."""
        places = _places(split)
        rows = np.concatenate([ranges[place] for place in places])
        if not split.file:
            return rows

        chosen = self._listed(split).index
        return rows[chosen] if split.subset else np.delete(rows, chosen)

    def _listed(self, split: SplitConfig) -> Subset:
        """The samples in the file of a split."""
        if split not in self._files:
            read = load_subset if split.subset else load_samples
            self._files[split] = read(Path(split.file), self._open(_places(split)))
        return self._files[split]

    def _labels(
        self, places: tuple[Place, ...], parts: Sequence[Shards]
    ) -> tuple[Ints, list[str] | None]:
        """The labels of all samples and the names of the classes, those of several folders in one
        numbering.
        """
        labels = [part.labels() for part in parts]
        if self.dataset.same_numbers:
            return np.concatenate(labels), None

        names = [read_names(place) for place in places]
        first = names[0]
        if all(part == first for part in names):
            if first is None and len(places) > 1:
                raise EvalError(
                    f"{parts[0].folder} and {len(parts) - 1} more folders have no {CLASSES}, so it "
                    "is unknown whether they number their classes alike; import them with class "
                    "names, or say --same-numbers if you know that they do"
                )
            return np.concatenate(labels), first

        together: dict[str, int] = {}
        for number, (part, own) in enumerate(zip(parts, names, strict=True)):
            if own is None:
                raise EvalError(
                    f"{part.folder} has no {CLASSES}, and other folders of the same split do; "
                    "import all alike"
                )
            if len(set(own)) < len(own):
                raise EvalError(f"{part.folder}/{CLASSES} names a class twice")

            named(LabelledSet(str(part.folder), str(part.folder), labels[number], ""), own)
            new = np.array([together.setdefault(name, len(together)) for name in own])
            labels[number] = np.where(labels[number] < 0, -1, new[labels[number]])

        return np.concatenate(labels), list(together)

    def _subset(self, split: SplitConfig, samples: int) -> dict[str, Any] | None:
        """The file that chooses the samples of a split, as written in results."""
        if not split.file:
            return None

        path, listing = Path(split.file), self._listed(split)
        return {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "samples": samples,
            "rule": f"all but {listing.rule}" if split.without else listing.rule,
        }


def _places(split: SplitConfig) -> tuple[Place, ...]:
    """The folders of a split, each with the patterns that choose its shards."""
    return tuple(place.paths for place in selection.by_folder(split.shards))
