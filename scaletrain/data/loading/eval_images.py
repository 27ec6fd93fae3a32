"""Images as an evaluation reads them: every sample once, in the order of the shards, through one
deterministic transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scaletrain.config.schema import View
from scaletrain.data.errors import DataError, ImageError, ShardError
from scaletrain.data.loading.dataset import (
    BatchDataset,
    Failure,
    NewTensor,
    RawBatch,
    Sampler,
    blank_batch,
)
from scaletrain.data.reading.subset_shards import AnyShards, SubsetShards
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.data.storage.prefetch import RangeOrder
from scaletrain.data.transforms.image import Pixels, decode
from scaletrain.runtime import heartbeat


class EvalTransform(Protocol):
    """A deterministic transform of an image [H, W, 3] uint8 to [size, size, 3] uint8."""

    @property
    def size(self) -> int: ...

    def __call__(self, image: Pixels, sample: int, /) -> Pixels:
        """`sample` is the number of the image in its shards, of which a subset may be in use.
        Raises ImageError.
        """


class EvalImages(BatchDataset):
    """One deterministic view of each sample of `ranges`, for evaluation; an item is one of these
    ranges (lo, hi), which ascend.

    With `skip`, a sample that cannot be used is left out of its batch and named in the batch's
    `replaced` with -1 as its substitute.
    """

    def __init__(
        self,
        shards: AnyShards,
        transform: EvalTransform,
        ranges: Sequence[tuple[int, int]],
        max_pixels: int,
        skip: bool = False,
    ) -> None:
        self.shards, self.transform, self.max_pixels = shards, transform, max_pixels
        self.ranges, self.skip = ranges, skip
        self.access_order = RangeOrder(ranges)

    def __getitem__(self, at: tuple[int, int]) -> RawBatch | Failure:
        self.shards.expect(at[0], self.access_order)
        raw = self.blank(at, self.new)
        used, left_out = 0, []

        try:
            for sample in range(*at):
                try:
                    self._fill(raw, used, sample)
                    used += 1
                except ShardError as fault:
                    if not self.skip:
                        raise
                    left_out.append(Replaced(sample, -1, str(fault)))
        except DataError as error:
            return Failure(error)

        if not left_out:
            return raw

        return raw._replace(
            views=(raw.views[0][:, :used],),
            samples=raw.samples[:used],
            labels=raw.labels[:used],
            replaced=tuple(left_out),
        )

    def _fill(self, raw: RawBatch, row: int, sample: int) -> None:
        heartbeat.reading(sample)
        stored = self.shards.read(sample)
        whole = int(self.shards.rows[sample]) if isinstance(self.shards, SubsetShards) else sample
        try:
            view = self.transform(decode(stored.image, self.max_pixels), whole)
        except ImageError as error:
            raise self.shards.fault(sample, error) from None

        raw.views[0].numpy()[0, row] = view
        raw.labels[row], raw.samples[row] = stored.label, sample

    def largest(self, sampler: Sampler) -> tuple[int, int]:
        return max(self.ranges, key=lambda at: at[1] - at[0])

    def blank(self, at: tuple[int, int], new: NewTensor) -> RawBatch:
        return blank_batch(new, 0, [[View(size=self.transform.size)]], at[1] - at[0])
