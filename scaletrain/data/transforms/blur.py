"""Gaussian blur of uint8 images in fixed point, faster than OpenCV's more general one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import uint8, uint16, uint32

from scaletrain.runtime.jit import compiled, inlined

# in compiled code the types are numba's
Array = Any


@compiled
def blur(image: Array, sigma: float, radius: int) -> None:
    """Blur rows [H, 3 W] uint8 in place, mirrored at the border; 1 <= radius < H and W.

    Columns are summed first, to 16 bits in units of 1/256; then rows, whose products are truncated
    to their upper 16 bits, so that all arithmetic fits into vectors of 16 bits. What the
    truncations lose on average is added beforehand.
    """
    height, n = image.shape
    kernel = _weights(sigma, radius)

    source = image.copy()
    padded = np.empty(n + 6 * radius, np.uint16)
    line, total = padded[3 * radius : 3 * radius + n], np.empty(n, np.uint16)
    for y in range(height):
        _start(line, source[y], uint16(kernel[0, 0]))
        for k in range(1, radius + 1):
            _columns(
                line,
                source[_inside(y - k, height)],
                source[_inside(y + k, height)],
                uint16(kernel[0, k]),
            )

        for k in range(1, radius + 1):
            for c in range(3):
                padded[3 * (radius - k) + c] = line[3 * k + c]
                padded[3 * radius + n - 3 + 3 * k + c] = line[n - 3 - 3 * k + c]

        _centre(total, line, uint32(kernel[1, 0]), uint16(128 + (radius + 1) // 2))
        for k in range(1, radius + 1):
            left, right = 3 * (radius - k), 3 * (radius + k)
            _rows(
                total, padded[left : left + n], padded[right : right + n], uint32(2 * kernel[1, k])
            )

        _finish(total, image[y])


@inlined
def _weights(sigma: float, radius: int) -> Array:
    """[2, radius + 1] from the centre outwards: the kernel in units of 1/256 and of 1/65536; both
    sum to one.
    """
    curve = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    fixed = np.empty((2, radius + 1), np.uint16)

    for i in range(2):
        one = 65536 if i else 256
        rest = 0
        for k in range(1, radius + 1):
            weight = round(one * curve[k] / (2 * curve.sum() - curve[0]))
            fixed[i, k] = weight
            rest += 2 * weight

        fixed[i, 0] = min(one - rest, 65535)

    return fixed


@inlined
def _inside(y: int, height: int) -> int:
    y = abs(y)
    return 2 * (height - 1) - y if y >= height else y


@inlined
def _start(line: Array, row: Array, weight: uint16) -> None:
    for x in range(len(line)):
        line[x] = uint16(weight * uint16(row[x]))


@inlined
def _columns(line: Array, above: Array, below: Array, weight: uint16) -> None:
    for x in range(len(line)):
        line[x] = uint16(line[x] + uint16(weight * uint16(uint16(above[x]) + uint16(below[x]))))


@inlined
def _centre(total: Array, line: Array, weight: uint32, start: uint16) -> None:
    for x in range(len(total)):
        total[x] = uint16(start + uint16(uint32(uint32(line[x]) * weight) >> 16))


@inlined
def _rows(total: Array, left: Array, right: Array, weight: uint32) -> None:
    """Add weight times the mean of both sides."""
    for x in range(len(total)):
        mean = uint16(uint32(uint32(left[x]) + uint32(right[x]) + uint32(1)) >> 1)
        total[x] = uint16(total[x] + uint16(uint32(uint32(mean) * weight) >> 16))


@inlined
def _finish(total: Array, out: Array) -> None:
    for x in range(len(out)):
        out[x] = uint8(total[x] >> 8)
