"""From a step's number to its raw pixels: pure data sets, one item per (epoch, step), that any
worker process can answer.

Each image is read and decoded once and all its views are cut from the one array. Pixels stay uint8
until they are on the device: a quarter of the bytes to hand over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaletrain import rng
from scaletrain.config.schema import Data, View
from scaletrain.data.errors import DataError, ImageError, ShardError
from scaletrain.data.reading.concat import ConcatShards
from scaletrain.data.reading.reader import Shards
from scaletrain.data.sampling.plan import Batches, Ints
from scaletrain.data.sampling.substitutes import TRIES, Replaced, substitutes
from scaletrain.data.storage.prefetch import Epochs, Sweep
from scaletrain.data.transforms import color, crop, foreground_crops, image, mask_ablations
from scaletrain.data.transforms.image import Pixels
from scaletrain.data.transforms.params import COLUMNS, Params, draw, expand, packed, uniforms
from scaletrain.runtime import heartbeat

# samples per pretended shard
SYNTHETIC_SHARD = 1000
# whatever number a method expects
SYNTHETIC_CLASSES = 2

# as torch.empty
New = Callable[..., Tensor]


def sample_keys(seed: int, epoch: int, samples: Tensor, repeats: Tensor | int = 0) -> Tensor:
    """[B] int64, what core.Batch.keys holds; `repeats` [B] as in plan.Draws."""
    return rng.hash64(seed, epoch, samples, repeats)


class Raw(NamedTuple):
    """One rank's part of a batch before normalisation."""

    epoch: int
    # per crop size, largest first: [V, B, H, W, 3] uint8
    views: tuple[Tensor, ...]
    samples: Tensor  # [B] int64: numbers in the data set
    labels: Tensor  # [B] int64, -1 where unknown
    masks: Tensor | None  # [V, B, H, W] uint8 in {0, 1}, of views[0]
    # like views, [V, B, COLUMNS] float32: colours and flips left to the device
    params: tuple[Tensor, ...] | None = None
    repeats: Tensor | int = 0  # [B] int64, as in plan.Draws
    planned: Tensor | None = (
        None  # [B] int64: what `samples` would be if none were bad; None where they are the same
    )
    replaced: tuple[Replaced, ...] = ()


class Failure(NamedTuple):
    """In place of a batch: why there is none."""

    error: Exception


class BatchDataset:
    """An item is a whole batch."""

    # makes the tensors of a batch; in a loader worker they lie in shared memory
    new: New = staticmethod(torch.empty)

    def __getitem__(self, at: Any) -> Raw | Failure:
        raise NotImplementedError

    def blank(self, at: Any, new: New) -> Raw:
        """A batch as it is before anything is read, of tensors that `new` makes."""
        raise NotImplementedError


class Images(BatchDataset):
    """Positions [lo, hi) of the plan's global batches, as augmented views. With `rows` [N], a plan
    of these samples.
    """

    def __init__(
        self,
        data: Data,
        shards: Shards | ConcatShards,
        plan: Batches,
        lo: int,
        hi: int,
        rows: Ints | None = None,
    ) -> None:
        self.data, self.shards, self.plan, self.lo, self.hi, self.rows = (
            data,
            shards,
            plan,
            lo,
            hi,
            rows,
        )
        self.groups = expand(data.views)

        self.course = Epochs(plan, lo, hi)
        color.prepare()
        if any(spec.interpolation == "keys" for spec in data.views):
            crop.prepare()

    def __getitem__(self, at: tuple[int, int]) -> Raw | Failure:
        epoch, step = at
        self.shards.expect(epoch * self.plan.steps_per_epoch + step, self.course)
        index, again = self.plan.draws(epoch, step, self.lo, self.hi)
        index = index if self.rows is None else self.rows[index]
        repeats = torch.from_numpy(again)
        raw = self.blank(at, self.new)._replace(repeats=repeats)
        keys = sample_keys(self.plan.seed, epoch, torch.from_numpy(index), repeats)
        draws = uniforms(keys, sum(map(len, self.groups)))
        goods = foreground_crops.draws(keys, len(self.groups[0]), self.data.good_crops)

        worse = mask_ablations.draws(keys, self.data.mask_study)
        views = [v.numpy() for v in raw.views]
        masks = None if raw.masks is None else raw.masks.numpy()
        rests = None if raw.params is None else [p.numpy() for p in raw.params]
        labels = raw.labels.numpy()
        used, replaced = index.copy(), []

        try:
            for row, sample in enumerate(index.tolist()):
                fill = partial(
                    self._fill, views, masks, rests, row, draws[row], goods[row], worse[row]
                )
                try:
                    labels[row] = fill(sample)
                except ShardError as fault:
                    others = substitutes(
                        self.plan.seed, epoch, sample, int(again[row]), self.shards.span(sample)
                    )
                    labels[row], used[row] = self._substitute(fill, others, fault)
                    replaced.append(Replaced(sample, int(used[row]), str(fault)))
        except DataError as error:
            return Failure(error)

        raw.samples.copy_(torch.from_numpy(used))
        return (
            raw._replace(planned=torch.from_numpy(index), replaced=tuple(replaced))
            if replaced
            else raw
        )

    def blank(self, at: tuple[int, int], new: New) -> Raw:
        return _empty(
            new,
            at[0],
            self.groups,
            self.hi - self.lo,
            self.data.masks,
            self.data.augment == "device",
        )

    def _substitute(
        self, fill: Callable[[int], int], others: Iterator[int], fault: ShardError
    ) -> tuple[int, int]:
        """Label and number of the first of `others` that is good, now in the place of a bad sample.
        Raises DataError.
        """
        if self.data.on_bad == "raise":
            raise fault

        for other in others:
            with suppress(ShardError):
                return fill(other), other

        raise DataError(f"{fault}; and none of its {TRIES} substitutes can be used")

    def _fill(
        self,
        out: list[Pixels],
        masks: Pixels | None,
        rests: list[NDArray[np.float32]] | None,
        row: int,
        draws: list[list[float]],
        goods: foreground_crops.Draws,
        worse: list[float],
        sample: int,
    ) -> int:
        """Write one sample's views at `row` and return its label. `draws`: DRAWS numbers a view."""
        heartbeat.reading(sample)
        found = self.shards.read(sample, masks is not None)
        try:
            pixels = image.decode(found.image, self.data.max_pixels)
            mask = (
                None if found.mask is None else image.decode_mask(found.mask, self.data.max_pixels)
            )
            if mask is not None and mask.shape != pixels.shape[:2]:
                raise ImageError(
                    f"the mask is {mask.shape} and the image {pixels.shape[:2]} (height, width)"
                )
        except ImageError as error:
            raise self.shards.fault(sample, error) from None

        if mask is not None and self.data.mask_study:
            mask = mask_ablations.alter(mask, self.data.mask_study, self.data.mask_share, worse)

        height, width = pixels.shape[:2]
        rest = iter(draws)
        drawn = [[draw(spec, next(rest), height, width) for spec in group] for group in self.groups]
        if goods and mask is not None:
            large = zip(self.groups[0], drawn[0], goods, strict=True)
            drawn[0] = [
                p._replace(box=foreground_crops.box(spec, p.box, u, mask, self.data.good_cover))
                for spec, p, u in large
            ]

        for size, (group, params) in enumerate(zip(self.groups, drawn, strict=True)):
            for v, (spec, p) in enumerate(zip(group, params, strict=True)):
                if rests is None:
                    render(pixels, spec, p, out[size][v, row])
                else:
                    out[size][v, row] = crop.crop(
                        pixels, p.box, spec.size, spec.interpolation, spec.antialias
                    )
                    rests[size][v, row] = packed(p)

        if masks is not None and mask is not None:
            for v, (spec, p) in enumerate(zip(self.groups[0], drawn[0], strict=True)):
                masks[v, row] = crop.crop_mask(mask, p.box, spec.size, p.flip)

        return found.label


def render(pixels: Pixels, spec: View, p: Params, out: NDArray[np.uint8]) -> None:
    """Execute one view's parameters into out, contiguous [size, size, 3]."""
    color.apply(crop.crop(pixels, p.box, spec.size, spec.interpolation, spec.antialias), p, out)


class Synthetic(BatchDataset):
    """No files: each worker makes one batch of noise and hands it out again, so that only the
    training is measured.
    """

    def __init__(
        self, data: Data, plan: Batches, lo: int, hi: int, classes: int = SYNTHETIC_CLASSES
    ) -> None:
        self.data, self.plan, self.lo, self.hi, self.classes = data, plan, lo, hi, classes
        self._made: Raw | None = None

    def __getitem__(self, at: tuple[int, int]) -> Raw | Failure:
        epoch, step = at
        if self._made is None:
            self._made = self.blank(at, torch.empty)
            generator = torch.Generator().manual_seed(self.plan.seed)
            for view in self._made.views:
                view.random_(0, 256, generator=generator)

            if self._made.masks is not None:
                self._made.masks.random_(0, 2, generator=generator)

        samples, repeats = map(torch.from_numpy, self.plan.draws(epoch, step, self.lo, self.hi))
        return self._made._replace(
            epoch=epoch, samples=samples, repeats=repeats, labels=samples % self.classes
        )

    def blank(self, at: tuple[int, int], new: New) -> Raw:
        return _empty(new, at[0], expand(self.data.views), self.hi - self.lo, self.data.masks)


def synthetic_counts(samples: int) -> NDArray[np.int64]:
    full, rest = divmod(samples, SYNTHETIC_SHARD)
    return np.array([SYNTHETIC_SHARD] * full + [rest] * (rest > 0), np.int64)


class Whole(BatchDataset):
    """Samples [lo, hi) of a folder, or of its `rows` [N], in their own order, one deterministic
    view each, for evaluation.

    `skip`: a sample that cannot be used is left out of the batch and named in its `replaced`, with
    -1 as what is used for it.
    """

    def __init__(
        self,
        shards: Shards,
        size: int,
        protocol: str,
        max_pixels: int,
        rows: Ints | None = None,
        skip: bool = False,
    ) -> None:
        self.shards, self.size, self.protocol, self.max_pixels, self.rows = (
            shards,
            size,
            protocol,
            max_pixels,
            rows,
        )
        self.skip = skip
        self.course = Sweep(len(shards))

    def __getitem__(self, at: tuple[int, int]) -> Raw | Failure:
        index = np.arange(*at) if self.rows is None else self.rows[slice(*at)]
        self.shards.expect(int(index[0]), self.course)
        raw = self.blank(at, self.new)
        used, lost = 0, []

        try:
            for sample in index.tolist():
                try:
                    self._fill(raw, used, sample)
                    used += 1
                except ShardError as fault:
                    if not self.skip:
                        raise
                    lost.append(Replaced(sample, -1, str(fault)))
        except DataError as error:
            return Failure(error)

        if not lost:
            return raw

        kept = raw._replace(
            views=(raw.views[0][:, :used],), samples=raw.samples[:used], labels=raw.labels[:used]
        )
        return kept._replace(replaced=tuple(lost))

    def _fill(self, raw: Raw, row: int, sample: int) -> None:
        heartbeat.reading(sample)
        found = self.shards.read(sample)
        try:
            pixels = image.decode(found.image, self.max_pixels)
        except ImageError as error:
            raise self.shards.fault(sample, error) from None

        raw.views[0].numpy()[0, row] = crop.evaluate(pixels, self.size, self.protocol)
        raw.labels[row], raw.samples[row] = found.label, sample

    def blank(self, at: tuple[int, int], new: New) -> Raw:
        return _empty(new, 0, [[View(size=self.size)]], at[1] - at[0], masks=False)


def _empty(
    new: New, epoch: int, groups: list[list[View]], rows: int, masks: bool, params: bool = False
) -> Raw:
    """Tensors to fill."""
    views = tuple(new((len(g), rows, g[0].size, g[0].size, 3), dtype=torch.uint8) for g in groups)
    size = groups[0][0].size
    mask = new((len(groups[0]), rows, size, size), dtype=torch.uint8) if masks else None
    rests = (
        tuple(new((len(g), rows, COLUMNS), dtype=torch.float32) for g in groups) if params else None
    )
    samples, labels = new((rows,), dtype=torch.int64), new((rows,), dtype=torch.int64).fill_(-1)

    return Raw(epoch, views, samples, labels, mask, rests)
