"""Memory that the main process and its loader workers share, divided into slots of one batch each
that are reused.

The memory is anonymous and inherited by fork: it does not count against /dev/shm and is freed
however the processes end. What is sent is the location of each tensor in its slot, and the rest of
the batch.
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

# first byte of a tensor in its slot, its shape and its type
TensorLocation = tuple[int, tuple[int, ...], torch.dtype]

# bytes: a cache line
ALIGN = 64
# tensors of a batch with one int64 per sample: samples, labels, repeats, planned and groups
_INDICES = 5


def size_of(raw: RawBatch) -> int:
    """Bytes of a slot for such a batch, a multiple of the page size."""
    large = (*raw.views, *(raw.params or ()), *raw.maps)
    return _up(
        sum(_up(x.nbytes, ALIGN) for x in (*large, *[raw.samples] * _INDICES)), mmap.PAGESIZE
    )


class Slots:
    """`count` slots of `size` bytes. Raises OSError or OverflowError where the memory cannot be
    allocated.
    """

    def __init__(self, count: int, size: int) -> None:
        self._slots = np.frombuffer(mmap.mmap(-1, count * size), np.uint8).reshape(count, size)

    def __getitem__(self, number: int) -> Slot:
        return Slot(self._slots[number])


class Slot:
    """The memory of one batch."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory, self._used = memory, 0

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As torch.empty, with its memory in the slot."""
        start, size = self._used, math.prod(shape) * dtype.itemsize
        if start + size > len(self.memory):
            raise ValueError(f"a batch has more than the {len(self.memory)} bytes of its slot")

        self._used = _up(start + size, ALIGN)
        return self.at(start, shape, dtype)

    def pack(self, item: Any) -> bytes:
        """Serialise an item without the content of its tensors, which is copied into the slot."""
        file = io.BytesIO()
        _Pickler(file, self).dump(item)
        return file.getvalue()

    def unpack(self, data: bytes) -> Any:
        """The item that was packed. Its tensors share the memory of the slot and are valid until
        the slot is reused.
        """
        return _Unpickler(io.BytesIO(data), self).load()

    def place(self, tensor: Tensor) -> TensorLocation:
        """The location of a tensor in the slot, to which it is copied unless it was made by
        `new`.
        """
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
