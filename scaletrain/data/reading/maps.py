"""Maps of the samples of a data set: the samples' own masks, or the images of other shards that
have the keys of the samples.

The maps of other shards may be in any order. They are matched by the hashes of the whole keys, such
as `000000012-cat`, that both indexes contain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletrain.config.schema import DataConfig, MapConfig
from scaletrain.data.errors import DataError, ImageError
from scaletrain.data.format import index
from scaletrain.data.format.names import is_remote
from scaletrain.data.reading.concat import ConcatShards, shards_of
from scaletrain.data.reading.reader import OPEN_SHARDS, Shards, StoredSample
from scaletrain.data.reading.subset_shards import AnyShards, SubsetShards
from scaletrain.data.sampling.plan import Ints
from scaletrain.data.storage.prefetch import AccessOrder, MatchedOrder
from scaletrain.data.transforms import maps
from scaletrain.data.transforms.image import Pixels
from scaletrain.data.transforms.maps import Map

# of samples or maps that a message names
SHOWN = 3
# what stands for a path where the maps are members of the samples
OWN = "key.mask.png"
# options that accept samples without a map, and maps without a sample
ALLOW_MISSING, ALLOW_FOREIGN = "on_missing=none", "on_foreign=ignore"


class SampleMaps:
    """The maps that are members of the samples."""

    name = "mask"

    def __init__(self, config: MapConfig, samples: AnyShards) -> None:
        self.config, self.samples = config, samples

    def read(
        self, sample: int, stored: StoredSample, pixels: Pixels, max_pixels: int
    ) -> Map | None:
        """The map of a sample; None if it has none and need not. Raises ShardError, and ImageError
        for one that cannot be decoded or is not of the size of the image.
        """
        data = self._find(sample, stored)
        if data is None:
            return None

        try:
            values = maps.decode(data, self.config.kind, max_pixels)
        except ImageError as error:
            raise ImageError(f"the {self.name}: {error}") from None
        if values.shape != pixels.shape[:2]:
            raise ImageError(
                f"the {self.name} is {values.shape} and the image {pixels.shape[:2]} (height, "
                "width)"
            )

        return values

    def expect(self, step: int, order: AccessOrder) -> None:
        """If the maps' shards are cached, prefetch those of this step and the next ones."""

    def fits(self, shards: int) -> None:
        """As Shards.fits, where the node uses so many shards of samples at once."""

    def check(self) -> None:
        """As Shards.check, of shards of maps."""

    def identity(self) -> list[dict[str, Any]]:
        """What a checkpoint stores of the maps, for each of their folders."""
        return [{"kind": self.config.kind, "path": OWN}]

    def _find(self, sample: int, stored: StoredSample) -> bytes | None:
        if stored.mask is None and self.config.on_missing == "raise":
            text = "it has no .mask.png member; add masks, or read none "
            text += "(data.foreground.masks=false, data.maps=[])"
            raise self.samples.fault(sample, text)

        return stored.mask


class MatchedMaps(SampleMaps):
    """The maps that are the images of other shards.

    `section` is their key in the configuration. Raises DataError for samples without a map and maps
    without a sample, unless `config` allows them, and for a key that occurs twice. A map may belong
    to a sample of the shards that is not in the subset in use.
    """

    def __init__(
        self,
        config: MapConfig,
        samples: AnyShards,
        data: DataConfig,
        section: str,
        keep: int,
    ) -> None:
        super().__init__(config, samples)
        self.name = f"map in {config.path}"
        self.shards = shards_of(config.path, data.on_bad == "skip", data.cache, keep)
        self._cached = data.cache.stage or is_remote(config.path)
        whole = samples.shards if isinstance(samples, SubsetShards) else samples
        rows = match(whole, self.shards)
        # the number of each sample's map [N], -1 without one
        self.rows = rows[samples.rows] if isinstance(samples, SubsetShards) else rows
        self._complain(section, rows)

    def expect(self, step: int, order: AccessOrder) -> None:
        self.shards.expect(step, MatchedOrder(order, self.rows))

    def fits(self, shards: int) -> None:
        if not self._cached:
            return

        here, there = (
            np.repeat(np.arange(len(counts)), counts)
            for counts in (self.samples.counts, self.shards.counts)
        )
        found = self.rows >= 0
        # in another order, the maps of the samples of one shard come from many
        pairs = here[found] * len(self.shards.counts) + there[self.rows[found]]
        self.shards.fits(math.ceil(shards * len(np.unique(pairs)) / len(self.samples.counts)))

    def check(self) -> None:
        self.shards.check()

    def identity(self) -> list[dict[str, Any]]:
        parts = (
            {str(part.folder): part for part in self.shards.parts}
            if isinstance(self.shards, ConcatShards)
            else {self.config.path: self.shards}
        )
        return [
            {
                "kind": self.config.kind,
                "path": path,
                "samples": len(part),
                "sha256": part.fingerprint,
            }
            for path, part in parts.items()
        ]

    def _find(self, sample: int, stored: StoredSample) -> bytes | None:
        number = int(self.rows[sample])
        if number >= 0:
            return self.shards.read(number).image
        if self.config.on_missing == "raise":
            raise self.samples.fault(sample, f"it has no map in {self.config.path}")
        return None

    def _complain(self, section: str, rows: Ints) -> None:
        """Raise DataError for samples without a map and maps without a sample, or print those that
        `config` allows. `rows`: as self.rows, of all samples of the shards.
        """
        path, samples = self.config.path, f"{len(self.rows):,} samples"
        without = np.flatnonzero(self.rows < 0)
        belongs = np.zeros(len(self.shards), np.bool_)
        belongs[rows[rows >= 0]] = True
        foreign = np.flatnonzero(~belongs)
        faults: list[str] = []
        fixes: list[str] = []

        for odd, shards, text, fix in (
            (without, self.samples, f"{samples} have no map in {path}", ALLOW_MISSING),
            (
                foreign,
                self.shards,
                f"{len(belongs):,} maps in {path} belong to no sample",
                ALLOW_FOREIGN,
            ),
        ):
            key, allowed = fix.split("=")
            line = f"{len(odd):,} of {text}, {_names(shards, odd)}"
            if len(odd) and getattr(self.config, key) == allowed:
                index.say(line)
            elif len(odd):
                faults.append(line)
                fixes.append(f"{section}.{fix}")

        if faults:
            raise DataError(
                f"{'; '.join(faults)}: maps need the whole keys of their samples; write them with "
                f"these, or accept what is there with {' '.join(fixes)}"
            )


def open_maps(data: DataConfig, shards: AnyShards) -> list[SampleMaps]:
    """Open the maps of data.all_maps for the samples of `shards`. Raises DataError."""
    others = sum(bool(config.path) for config in data.all_maps)
    # half as many open files as the samples have
    keep = max(1, OPEN_SHARDS // 2 // max(1, others))
    return [
        MatchedMaps(config, shards, data, f"data.maps.{number}", keep)
        if config.path
        else SampleMaps(config, shards)
        for number, config in enumerate(data.all_maps)
    ]


def match(samples: Shards | ConcatShards, others: Shards | ConcatShards) -> Ints:
    """The number of the map of each sample [N], -1 where no map has its key. Raises DataError if
    two samples or two maps have one key, or keys of one hash.
    """
    order, keys = _sorted(samples)
    their_order, their_keys = _sorted(others)

    place = np.searchsorted(their_keys, keys).clip(max=len(their_keys) - 1)
    rows = np.empty_like(order)
    rows[order] = np.where(their_keys[place] == keys, their_order[place], -1)
    return rows


def _sorted(shards: Shards | ConcatShards) -> tuple[Ints, NDArray[np.uint64]]:
    """The order of ascending hashes of keys, and these. Raises DataError if one occurs twice."""
    hashes = shards.key_hashes()
    order: Ints = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    twice = np.flatnonzero(hashes[1:] == hashes[:-1])
    if len(twice):
        raise DataError(
            f"{len(twice):,} keys are not unique, or their hashes are not, so that samples cannot "
            f"be matched with maps: {_names(shards, order[twice[0] : twice[0] + 2], ' and ')}; "
            "write one of them again with another name"
        )

    return order, hashes


def _names(shards: AnyShards, numbers: Ints, and_: str = ", ") -> str:
    """The names of the first samples, and how many more there are."""
    first = and_.join(shards.name(int(number)) for number in numbers[:SHOWN])
    return first + (f" and {len(numbers) - SHOWN:,} more" if len(numbers) > SHOWN else "")


def identities(data: DataConfig, sources: Sequence[SampleMaps]) -> list[dict[str, Any]]:
    """The identities of all maps, as checkpoints store them; `sources`: none for synthetic data."""
    if not sources:
        return [{"kind": config.kind, "path": OWN} for config in data.all_maps]
    return [identity for source in sources for identity in source.identity()]
