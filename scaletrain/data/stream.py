"""From a step's number to its raw pixels: pure data sets, one item per (epoch, step), that any worker process can answer.

Each image is read and decoded once and all its views are cut from the one array. Pixels stay uint8 until they are on the
device: a quarter of the bytes to hand over.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from scaletrain import dist
from scaletrain.config import Data, View
from scaletrain.data import colour, crop, image
from scaletrain.data.errors import DataError, ImageError
from scaletrain.data.image import Pixels
from scaletrain.data.plan import Ints, Plan
from scaletrain.data.reader import Shards
from scaletrain.data.views import Params, draw, expand, uniforms

SYNTHETIC_SHARD = 1000  # samples per pretended shard


def sample_keys(seed: int, epoch: int, samples: Tensor) -> Tensor:
    """[B] int64, what core.Batch.keys holds. The last part counts repetitions of a sample inside an epoch: none yet."""
    return dist.hash64(seed, epoch, samples, 0)


class Raw(NamedTuple):
    """One rank's part of a batch before normalisation."""

    epoch: int
    views: tuple[Tensor, ...]  # per crop size, largest first: [V, B, H, W, 3] uint8
    samples: Tensor  # [B] int64: numbers in the data set
    labels: Tensor  # [B] int64, -1 where unknown
    masks: Tensor | None  # [V, B, H, W] uint8 in {0, 1}, of views[0]


class Failure(NamedTuple):
    """A DataError on its way out of a worker; raised there, it would arrive wrapped in a traceback."""

    error: DataError


class Images(Dataset[Raw | Failure]):
    """Positions [lo, hi) of the plan's global batches, as augmented views. With `rows` [N], a plan of these samples."""

    def __init__(self, data: Data, shards: Shards, plan: Plan, lo: int, hi: int, rows: Ints | None = None) -> None:
        self.data, self.shards, self.plan, self.lo, self.hi, self.rows = data, shards, plan, lo, hi, rows
        self.groups = expand(data.views)

    def __getitem__(self, at: tuple[int, int]) -> Raw | Failure:
        epoch, step = at
        index = self.plan.batch(epoch, step, self.lo, self.hi)
        index = index if self.rows is None else self.rows[index]
        raw = _empty(epoch, self.groups, len(index), self.data.masks)
        keys = sample_keys(self.plan.seed, epoch, torch.from_numpy(index))
        draws = uniforms(keys, sum(map(len, self.groups)))
        views = [v.numpy() for v in raw.views]
        masks = None if raw.masks is None else raw.masks.numpy()
        labels = raw.labels.numpy()
        try:
            for row, sample in enumerate(index.tolist()):
                labels[row] = self._fill(views, masks, row, sample, draws[row])
        except DataError as error:
            return Failure(error)
        raw.samples.copy_(torch.from_numpy(index))
        return raw

    def _fill(self, out: list[Pixels], masks: Pixels | None, row: int, sample: int, draws: list[list[float]]) -> int:
        """Write one sample's views at `row` and return its label. `draws`: DRAWS numbers for each view."""
        found = self.shards.read(sample, masks is not None)
        try:
            pixels = image.decode(found.image, self.data.max_pixels)
            mask = None if found.mask is None else image.decode_mask(found.mask, self.data.max_pixels)
            if mask is not None and mask.shape != pixels.shape[:2]:
                raise ImageError(f"the mask is {mask.shape} and the image {pixels.shape[:2]} (height, width)")
        except ImageError as error:
            raise self.shards.fault(sample, error) from None
        height, width = pixels.shape[:2]
        rest = iter(draws)
        drawn = [[draw(spec, next(rest), height, width) for spec in group] for group in self.groups]
        for group, params, packed in zip(self.groups, drawn, out, strict=True):
            for v, (spec, p) in enumerate(zip(group, params, strict=True)):
                render(pixels, spec, p, packed[v, row])
        if masks is not None and mask is not None:
            for v, (spec, p) in enumerate(zip(self.groups[0], drawn[0], strict=True)):
                masks[v, row] = crop.crop_mask(mask, p.box, spec.size, p.flip)
        return found.label


def render(pixels: Pixels, spec: View, p: Params, out: NDArray[np.uint8]) -> None:
    """Execute one view's parameters into out [size, size, 3]. The flip comes last: it commutes with all colour operations."""
    view = colour.apply(crop.crop(pixels, p.box, spec.size, spec.interpolation, spec.antialias), p)
    if p.flip:
        cv2.flip(view, 1, out)
    else:
        out[...] = view


class Synthetic(Dataset[Raw | Failure]):
    """No files: each worker makes one batch of noise and hands it out again, so that only the training is measured."""

    def __init__(self, data: Data, plan: Plan, lo: int, hi: int) -> None:
        self.data, self.plan, self.lo, self.hi = data, plan, lo, hi
        self._made: Raw | None = None

    def __getitem__(self, at: tuple[int, int]) -> Raw | Failure:
        epoch, step = at
        if self._made is None:
            self._made = _empty(epoch, expand(self.data.views), self.hi - self.lo, self.data.masks)
            generator = torch.Generator().manual_seed(self.plan.seed)
            for view in self._made.views:
                view.random_(0, 256, generator=generator)
            if self._made.masks is not None:
                self._made.masks.random_(0, 2, generator=generator)
        return self._made._replace(epoch=epoch, samples=torch.from_numpy(self.plan.batch(epoch, step, self.lo, self.hi)))


def synthetic_counts(samples: int) -> NDArray[np.int64]:
    full, rest = divmod(samples, SYNTHETIC_SHARD)
    return np.array([SYNTHETIC_SHARD] * full + [rest] * (rest > 0), np.int64)


class Whole(Dataset[Raw | Failure]):
    """Samples [lo, hi) of a folder, or of its `rows` [N], in their own order, one deterministic view each, for evaluation."""

    def __init__(self, shards: Shards, size: int, protocol: str, max_pixels: int, rows: Ints | None = None) -> None:
        self.shards, self.size, self.protocol, self.max_pixels, self.rows = shards, size, protocol, max_pixels, rows

    def __getitem__(self, at: tuple[int, int]) -> Raw | Failure:
        raw = _empty(0, [[View(size=self.size)]], at[1] - at[0], masks=False)
        out = raw.views[0].numpy()
        index = np.arange(*at) if self.rows is None else self.rows[slice(*at)]
        try:
            for row, sample in enumerate(index.tolist()):
                found = self.shards.read(sample)
                try:
                    pixels = image.decode(found.image, self.max_pixels)
                except ImageError as error:
                    raise self.shards.fault(sample, error) from None
                out[0, row] = crop.evaluate(pixels, self.size, self.protocol)
                raw.labels[row] = found.label
        except DataError as error:
            return Failure(error)
        raw.samples.copy_(torch.from_numpy(index))
        return raw


def _empty(epoch: int, groups: list[list[View]], rows: int, masks: bool) -> Raw:
    """Tensors to fill; in a worker they are made in shared memory, which saves copying them there later."""

    def new(*shape: int) -> Tensor:
        x = torch.empty(shape, dtype=torch.uint8)
        return x.share_memory_() if get_worker_info() else x

    views = tuple(new(len(g), rows, g[0].size, g[0].size, 3) for g in groups)
    size = groups[0][0].size
    mask = new(len(groups[0]), rows, size, size) if masks else None
    return Raw(epoch, views, torch.empty(rows, dtype=torch.int64), torch.full((rows,), -1, dtype=torch.int64), mask)
