"""Turns raw uint8 batches into core.Batch on the device: copies them asynchronously, augments them
there if configured, and normalises them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from time import monotonic, sleep

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaletrain.core import Batch
from scaletrain.data.loading.dataset import RawBatch, sample_keys
from scaletrain.data.transforms import maps as maps_of_images
from scaletrain.data.transforms import on_device
from scaletrain.data.transforms.color_operations import normalise

# seconds to wait for copies that are queued on the GPU
PATIENCE = 5.0


class ToDevice:
    """Converts raw batches; `mean` and `std` are per channel, of pixels in [0, 1]; `kinds`: of the
    maps. No tensor of the result shares memory with the raw batch.
    """

    def __init__(
        self,
        device: torch.device,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        kinds: Sequence[str] = (),
    ) -> None:
        self.device, self.seed, self.kinds = device, seed, tuple(kinds)
        m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.scale = (1 / (255 * s)).float().view(3, 1, 1).to(device)
        self.shift = (-m / s).float().view(3, 1, 1).to(device)
        self.pixel_range = torch.stack((-m / s, (1 - m) / s)).float().to(device)  # [2, 3]

    def __call__(self, raw: RawBatch) -> Batch:
        index = self._copy(raw.samples)
        maps = tuple(
            maps_of_images.on_device(self._copy(values), kind)
            for values, kind in zip(raw.maps, self.kinds, strict=True)
        )
        repeats = raw.repeats if isinstance(raw.repeats, int) else self._copy(raw.repeats)
        return Batch(
            views=tuple(self._views(raw)),
            index=index,
            keys=sample_keys(
                self.seed,
                raw.epoch,
                index if raw.planned is None else self._copy(raw.planned),
                repeats,
            ),
            pixel_range=self.pixel_range,
            labels=self._copy(raw.labels),
            masks=maps_of_images.foreground(maps, self.kinds),
            maps=maps,
            groups=None if raw.groups is None else self._copy(raw.groups),
        )

    def _copy(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True, copy=True)

    def _views(self, raw: RawBatch) -> Iterator[Tensor]:
        """[V, B, H, W, 3] uint8 -> [V, B, 3, H, W] float32 that is channels_last once V and B are
        flattened together.
        """
        for pixels, params in zip(raw.views, raw.params or [None] * len(raw.views), strict=True):
            if params is None and self.device.type == "cpu":
                yield self._on_cpu(pixels)
                continue

            x = self._copy(pixels).permute(0, 1, 4, 2, 3).float()
            if params is not None:
                # one view at a time, since the intermediate copies are as large as the view
                for view, rest in zip(x, params, strict=True):
                    on_device.augment(view, rest)

            yield x.mul_(self.scale).add_(self.shift)

    def _on_cpu(self, pixels: Tensor) -> Tensor:
        """The same values, computed in one pass over memory instead of three."""
        out = torch.empty(pixels.shape)
        width = pixels.shape[-2]
        scale, shift = (x.flatten().repeat(width).numpy() for x in (self.scale, self.shift))
        normalise(
            pixels.contiguous().view(-1, width * 3).numpy(),
            scale,
            shift,
            out.view(-1, width * 3).numpy(),
        )

        return out.permute(0, 1, 4, 2, 3)


class Pinned:
    """Page-locks the memory of loader workers, so that the GPU copies from it asynchronously.

    Where the driver refuses, copies are merely slower. For a CPU this does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._on = device, device.type == "cuda"
        # addresses of locked memory
        self._locked: set[int] = set()
        self._last: torch.cuda.Event | None = None

    def add(self, memory: NDArray[np.uint8]) -> None:
        """Must be called before each copy; at the first one the pages are already mapped, so that
        locking them is fast.
        """
        address = memory.ctypes.data
        if not self._on or address in self._locked:
            return

        if (
            torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0)
            == torch.cuda.cudart().cudaError.success
        ):
            self._locked.add(address)
            return

        self._on = False
        # clear the error, or it would be reported by the next kernel
        with suppress(RuntimeError):
            torch.ones(1, device=self._device)

    def event(self) -> torch.cuda.Event | None:
        """An event that completes with all copies queued so far; None on a CPU."""
        if self._device.type == "cuda":
            self._last = torch.cuda.Event()
            self._last.record()
        return self._last

    def close(self) -> None:
        """Unlock the memory after the last copy. If the GPU hangs, the memory stays locked until
        the process ends.
        """
        end = monotonic() + PATIENCE

        # the failure of a GPU is reported elsewhere
        with suppress(RuntimeError):
            while self._last is not None and not self._last.query():
                if monotonic() > end:
                    return
                sleep(0.001)

            while self._locked:
                torch.cuda.cudart().cudaHostUnregister(self._locked.pop())
