"""Data sets whose items are whole batches of raw pixels: a pure function of (epoch, step), so that
any worker process can make any batch.

Each image is read and decoded once, and all its views are cut from the one array. Pixels stay uint8
until they are on the device, which quarters the bytes to transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaletrain import rng
from scaletrain.config.schema import DataConfig, View
from scaletrain.data.errors import DataError, ImageError, ShardError
from scaletrain.data.reading.maps import SampleMaps
from scaletrain.data.reading.subset_shards import AnyShards
from scaletrain.data.sampling.plan import Batches, Ints
from scaletrain.data.sampling.substitutes import TRIES, Replaced, substitutes
from scaletrain.data.storage.prefetch import EpochOrder
from scaletrain.data.transforms import color, crop, foreground_crops, image, mask_ablations
from scaletrain.data.transforms import maps as map_of
from scaletrain.data.transforms.image import Pixels
from scaletrain.data.transforms.maps import Map
from scaletrain.data.transforms.params import COLUMNS, Params, draw, expand, packed, uniforms
from scaletrain.runtime import heartbeat

# samples in each shard of the synthetic data set
SYNTHETIC_SHARD = 1000
# labels of synthetic samples, valid for methods with any number of classes
SYNTHETIC_CLASSES = 2

# makes an uninitialised tensor, as torch.empty does
NewTensor = Callable[..., Tensor]


def sample_keys(seed: int, epoch: int, samples: Tensor, repeats: Tensor | int = 0) -> Tensor:
    """The keys [B] int64 of core.Batch, from which all randomness of a sample is derived; `repeats`
    [B] as in plan.Draws.
    """
    return rng.hash64(seed, epoch, samples, repeats)


class RawBatch(NamedTuple):
    """One rank's part of a batch before it is copied to the device and normalised."""

    epoch: int
    # one tensor [V, B, H, W, 3] uint8 per crop size, largest first
    views: tuple[Tensor, ...]
    # [B] int64: numbers of the samples in the data set
    samples: Tensor
    # [B] int64, -1 where unknown
    labels: Tensor
    # one [V, B, H, W] uint8 per map of data.all_maps, of views[0]; values as in transforms/maps.py
    maps: tuple[Tensor, ...] = ()
    # like views, [V, B, COLUMNS] float32: colour operations and flips that the device executes
    params: tuple[Tensor, ...] | None = None
    # [B] int64, as in plan.Draws
    repeats: Tensor | int = 0
    # [B] int64: what `samples` would be without bad samples; None if there are none
    planned: Tensor | None = None
    replaced: tuple[Replaced, ...] = ()
    # [B] int64, of data.groups
    groups: Tensor | None = None


class Failure(NamedTuple):
    """Returned in place of a batch that cannot be made."""

    error: Exception


class Sampler(Protocol):
    """The item of the data set that each batch is, in order."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


class BatchDataset:
    """A data set whose items are whole batches."""

    # makes the tensors of a batch; in a loader worker they are in shared memory
    new: NewTensor = staticmethod(torch.empty)

    def __getitem__(self, at: Any) -> RawBatch | Failure:
        raise NotImplementedError

    def blank(self, at: Any, new: NewTensor) -> RawBatch:
        """The batch `at` before anything is read, with tensors made by `new`."""
        raise NotImplementedError

    def largest(self, sampler: Sampler) -> Any:
        """The item whose batch takes most memory."""
        return sampler[0]


@dataclass(frozen=True, slots=True)
class DrawPlan:
    """The row of a batch that a sample fills, and the random numbers that its augmentation uses."""

    row: int
    # DRAWS numbers for each view
    views: list[list[float]]
    # for crops that hold foreground; empty where the usual crop is used
    candidates: foreground_crops.CandidateDraws
    # for a mask ablation; empty without one
    mask: list[float]


class Images(BatchDataset):
    """Augmented views of the samples at positions [lo, hi) of the plan's global batches.

    A sample's number is its place in `shards`, which may be a subset. `groups` [N]: an integer for
    each of them. `maps`: as `open_maps` returns them.
    """

    def __init__(
        self,
        data: DataConfig,
        shards: AnyShards,
        plan: Batches,
        lo: int,
        hi: int,
        groups: Ints | None = None,
        maps: Sequence[SampleMaps] = (),
    ) -> None:
        self.data, self.shards, self.plan = data, shards, plan
        self.lo, self.hi, self.sample_groups = lo, hi, groups
        self.groups, self.maps = expand(data.views), maps
        kinds = [source.config.kind for source in maps]
        # the number of the map that foreground crops and studies of masks use
        self._mask = kinds.index("foreground") if "foreground" in kinds else None
        self._masks_stored = any(not source.config.path for source in maps)
        self._outside = [round(255 * mean) for mean in data.mean]

        self.access_order = EpochOrder(plan, lo, hi)
        color.prepare()
        if any(spec.interpolation == "keys" for spec in data.views):
            crop.prepare()

    def __getitem__(self, at: tuple[int, int]) -> RawBatch | Failure:
        epoch, step = at
        for source in (self.shards, *self.maps):
            source.expect(epoch * self.plan.steps_per_epoch + step, self.access_order)
        index, passes = self.plan.draws(epoch, step, self.lo, self.hi)
        repeats = torch.from_numpy(passes)
        raw = self.blank(at, self.new)._replace(repeats=repeats)
        keys = sample_keys(self.plan.seed, epoch, torch.from_numpy(index), repeats)

        labels = raw.labels.numpy()
        used = index.copy()
        replaced: list[Replaced] = []

        try:
            for plan in self._draw(keys):
                row, sample = plan.row, int(index[plan.row])
                try:
                    labels[row] = self._fill(raw, plan, sample)
                except ShardError as fault:
                    others = substitutes(
                        self.plan.seed, epoch, sample, int(passes[row]), self.shards.span(sample)
                    )
                    labels[row], used[row] = self._substitute(raw, plan, others, fault)
                    replaced.append(Replaced(sample, int(used[row]), str(fault)))
        except DataError as error:
            return Failure(error)

        raw.samples.copy_(torch.from_numpy(used))
        if self.sample_groups is not None:
            # a substitute has its own group, as it has its own label
            raw = raw._replace(groups=torch.from_numpy(self.sample_groups[used]))

        if not replaced:
            return raw
        return raw._replace(planned=torch.from_numpy(index), replaced=tuple(replaced))

    def blank(self, at: tuple[int, int], new: NewTensor) -> RawBatch:
        on_device = self.data.augment == "device"
        rows = self.hi - self.lo
        return blank_batch(new, at[0], self.groups, rows, len(self.maps), on_device)

    def _draw(self, keys: Tensor) -> Iterator[DrawPlan]:
        """The plan of each row, from the keys [B] of its samples."""
        views = uniforms(keys, sum(map(len, self.groups)))
        candidates = foreground_crops.draws(
            keys, len(self.groups[0]), self.data.foreground.good_crops
        )
        masks = mask_ablations.draws(keys, self.data.foreground.study)
        return map(DrawPlan, range(len(keys)), views, candidates, masks)

    def _substitute(
        self, raw: RawBatch, plan: DrawPlan, others: Iterator[int], fault: ShardError
    ) -> tuple[int, int]:
        """Fill the row of a bad sample with the first of `others` that can be read -> its label and
        number. Raises DataError.
        """
        if self.data.on_bad == "raise":
            raise fault

        for other in others:
            with suppress(ShardError):
                return self._fill(raw, plan, other), other

        raise DataError(f"{fault}; and none of its {TRIES} substitutes can be used")

    def _fill(self, raw: RawBatch, plan: DrawPlan, sample: int) -> int:
        """Write one sample's views at the plan's row and return its label."""
        pixels, maps, label = self._read(sample)
        mask = None if self._mask is None else maps[self._mask]
        if self._mask is not None and mask is not None and self.data.foreground.study:
            kind, share = self.data.foreground.study, self.data.foreground.study_share
            mask = maps[self._mask] = mask_ablations.alter(mask, kind, share, plan.mask)

        drawn = self._params(plan, pixels, mask)
        for number, (group, params) in enumerate(zip(self.groups, drawn, strict=True)):
            out = raw.views[number].numpy()[:, plan.row]
            for v, (spec, p) in enumerate(zip(group, params, strict=True)):
                if raw.params is None:
                    render(pixels, spec, p, out[v], self._outside)
                else:
                    out[v] = cut(pixels, spec, p, self._outside)
                    raw.params[number].numpy()[v, plan.row] = packed(p)

        for source, tensor, values in zip(self.maps, raw.maps, maps, strict=True):
            rows = tensor.numpy()[:, plan.row]
            for v, (spec, p) in enumerate(zip(self.groups[0], drawn[0], strict=True)):
                rows[v] = map_of.view(values, source.config.kind, p.box, spec.size, p.flip)

        return label

    def _read(self, sample: int) -> tuple[Pixels, list[Map | None], int]:
        """Pixels, maps and label of a sample. Raises ShardError."""
        heartbeat.reading(sample)
        stored = self.shards.read(sample, self._masks_stored)
        limit = self.data.max_pixels
        try:
            pixels = image.decode(stored.image, limit)
            maps = [source.read(sample, stored, pixels, limit) for source in self.maps]
        except ImageError as error:
            raise self.shards.fault(sample, error) from None

        return pixels, maps, stored.label

    def _params(self, plan: DrawPlan, pixels: Pixels, mask: Pixels | None) -> list[list[Params]]:
        """The parameters of all views of one sample, grouped as `groups`."""
        height, width = pixels.shape[:2]
        numbers = iter(plan.views)
        drawn = [
            [draw(spec, next(numbers), height, width) for spec in group] for group in self.groups
        ]

        if plan.candidates and mask is not None:
            cover = self.data.foreground.good_cover
            largest = zip(self.groups[0], drawn[0], plan.candidates, strict=True)
            drawn[0] = [
                p._replace(box=foreground_crops.box(spec, p.box, u, mask, cover))
                for spec, p, u in largest
            ]

        return drawn


def cut(pixels: Pixels, spec: View, p: Params, outside: Sequence[int] = (0, 0, 0)) -> Pixels:
    """The crop of a view, [size, size, 3]. `outside`: the colour of what is not in the image."""
    return crop.crop(pixels, p.box, spec.size, spec.interpolation, spec.antialias, outside)


def render(
    pixels: Pixels,
    spec: View,
    p: Params,
    out: NDArray[np.uint8],
    outside: Sequence[int] = (0, 0, 0),
) -> None:
    """Write one view with the parameters `p` into out, contiguous [size, size, 3]."""
    color.apply(cut(pixels, spec, p, outside), p, out)


class SyntheticImages(BatchDataset):
    """Noise without any file: each worker makes one batch and returns it again and again, so that
    only the training is measured.
    """

    def __init__(
        self, data: DataConfig, plan: Batches, lo: int, hi: int, classes: int = SYNTHETIC_CLASSES
    ) -> None:
        self.data, self.plan, self.lo, self.hi, self.classes = data, plan, lo, hi, classes
        self._made: RawBatch | None = None

    def __getitem__(self, at: tuple[int, int]) -> RawBatch | Failure:
        epoch, step = at
        if self._made is None:
            self._made = self.blank(at, torch.empty)
            generator = torch.Generator().manual_seed(self.plan.seed)
            for view in self._made.views:
                view.random_(0, 256, generator=generator)

            for values in self._made.maps:
                values.random_(0, 2, generator=generator)

        samples, repeats = map(torch.from_numpy, self.plan.draws(epoch, step, self.lo, self.hi))
        return self._made._replace(
            epoch=epoch, samples=samples, repeats=repeats, labels=samples % self.classes
        )

    def blank(self, at: tuple[int, int], new: NewTensor) -> RawBatch:
        rows, maps = self.hi - self.lo, len(self.data.all_maps)
        return blank_batch(new, at[0], expand(self.data.views), rows, maps)


def synthetic_counts(samples: int) -> NDArray[np.int64]:
    """Samples of each shard of a synthetic data set."""
    full, rest = divmod(samples, SYNTHETIC_SHARD)
    return np.array([SYNTHETIC_SHARD] * full + [rest] * (rest > 0), np.int64)


def blank_batch(
    new: NewTensor,
    epoch: int,
    groups: list[list[View]],
    rows: int,
    maps: int = 0,
    on_device: bool = False,
) -> RawBatch:
    """A batch of `rows` samples with so many maps, whose tensors are to be filled; `on_device`:
    with the parameters of what the device executes.
    """

    def tensors(*shapes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(new(shape, dtype=dtype) for shape in shapes)

    sizes = [(len(group), rows, group[0].size) for group in groups]
    views = tensors(*((v, b, size, size, 3) for v, b, size in sizes), dtype=torch.uint8)
    v, b, size = sizes[0]
    values = tensors(*[(v, b, size, size)] * maps, dtype=torch.uint8)
    params = (
        tensors(*((v, b, COLUMNS) for v, b, _ in sizes), dtype=torch.float32) if on_device else None
    )
    samples, labels = tensors((rows,), (rows,), dtype=torch.int64)

    return RawBatch(epoch, views, samples, labels.fill_(-1), values, params)
