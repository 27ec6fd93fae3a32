"""Batches in memory that the main process and its loader workers share, in slots that are used
again and again.

The memory is anonymous and inherited by fork: it does not count against /dev/shm, and nothing of it
stays behind, however the processes end. Only where in its slot each tensor lies, and what else a
batch holds, is sent.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaletrain.data.loading.dataset import RawBatch

# of a tensor: its first byte in the slot, and what it is
TensorLocation = tuple[int, tuple[int, ...], torch.dtype]

# bytes: a cache line
ALIGN = 64
# tensors of a batch that are as large as its sample numbers: these, labels, repeats and planned
_INDICES = 4


def size_of(raw: RawBatch) -> int:
    """Bytes of a slot for such a batch: whole pages."""
    large = (*raw.views, *(raw.params or ()), *([] if raw.masks is None else [raw.masks]))
    return _up(
        sum(_up(x.nbytes, ALIGN) for x in (*large, *[raw.samples] * _INDICES)), mmap.PAGESIZE
    )


class Slots:
    """`count` slots of `size` bytes. Raises OSError or OverflowError where there is no such
    memory.
    """

    def __init__(self, count: int, size: int) -> None:
        self._slots = np.frombuffer(mmap.mmap(-1, count * size), np.uint8).reshape(count, size)

    def __getitem__(self, number: int) -> Slot:
        return Slot(self._slots[number])


class Slot:
    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory, self._used = memory, 0

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As torch.empty, in the slot."""
        start, size = self._used, math.prod(shape) * dtype.itemsize
        if start + size > len(self.memory):
            raise ValueError(f"a batch has more than the {len(self.memory)} bytes of its slot")

        self._used = _up(start + size, ALIGN)
        return self.at(start, shape, dtype)

    def pack(self, item: Any) -> bytes:
        """The item without the content of its tensors, which is in the slot from now on."""
        file = io.BytesIO()
        _Pickler(file, self).dump(item)
        return file.getvalue()

    def unpack(self, data: bytes) -> Any:
        """What `pack` was given. Its tensors are those in the slot: they last until it is used
        again.
        """
        return _Unpickler(io.BytesIO(data), self).load()

    def place(self, tensor: Tensor) -> TensorLocation:
        """Where it lies in the slot; it is copied there unless it was made by `new`."""
        if not (0 <= self._start(tensor) < len(self.memory) and tensor.is_contiguous()):
            tensor = self.new(tuple(tensor.shape), tensor.dtype).copy_(tensor)
        return self._start(tensor), tuple(tensor.shape), tensor.dtype

    def at(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        part = self.memory[start : start + math.prod(shape) * dtype.itemsize]
        return torch.from_numpy(part).view(dtype).view(shape)

    def _start(self, tensor: Tensor) -> int:
        return tensor.data_ptr() - self.memory.ctypes.data


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, slot: Slot) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._slot = slot

    def persistent_id(self, value: Any) -> TensorLocation | None:
        return self._slot.place(value) if isinstance(value, Tensor) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, slot: Slot) -> None:
        super().__init__(file)
        self._slot = slot

    def persistent_load(self, place: TensorLocation) -> Tensor:
        return self._slot.at(*place)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
