"""TensorFlow's bicubic resize, which BYOL's and ReLICv2's code uses: the cubic with a = -.5 of Keys
(1981, "Cubic convolution interpolation"), pixel centres at half-integers, four neighbours whatever
the reduction, and weights normalised over the neighbours inside the image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32, int32, uint8, uint64

from scaletrain.runtime.jit import compiled, inlined

# in compiled code the types are numba's
Array = Any


@compiled
def resize(image: Array, top: int, left: int, height: int, width: int, out: Array) -> None:
    """Resize a box of an image, rows [H, 3 W] uint8, to out [h, 3 w] uint8, clipped to 0 .. 255 and
    rounded once.

    Columns are summed first, all channels of a row in one vector loop. Then rows, four numbers at a
    time, of which the fourth belongs to the next pixel and is overwritten by it.
    """
    first_y, weights_y = _weights(height, out.shape[0])
    first_x, weights_x = _weights(width, out.shape[1] // 3)
    # padded with two pixels of zeros before and more after, which have no weight
    line = np.zeros(3 * width + 13, np.float32)

    sums = np.empty(out.shape[1] + 1, np.float32)
    start, stop = 3 * left, 3 * (left + width)
    for y in range(out.shape[0]):
        at = first_y[y]
        a, b = image[top + max(at, 0)], image[top + min(max(at + 1, 0), height - 1)]
        c, d = image[top + min(at + 2, height - 1)], image[top + min(at + 3, height - 1)]
        _columns(
            line[6 : 6 + 3 * width],
            a[start:stop],
            b[start:stop],
            c[start:stop],
            d[start:stop],
            weights_y[y],
        )

        _row(line, sums, first_x, weights_x)
        _round(sums, out[y])


@inlined
def _columns(line: Array, a: Array, b: Array, c: Array, d: Array, w: Array) -> None:
    p, q, r, s = w[0], w[1], w[2], w[3]
    for x in range(len(line)):
        line[x] = p * float32(a[x]) + q * float32(b[x]) + r * float32(c[x]) + s * float32(d[x])


@inlined
def _row(line: Array, sums: Array, first: Array, weights: Array) -> None:
    for x in range(len(first)):
        # unsigned, or numba would check for negative indices
        i, o = uint64(3 * (first[x] + 2)), uint64(3 * x)
        p, q, r, s = weights[x, 0], weights[x, 1], weights[x, 2], weights[x, 3]
        t = (
            p * line[i]
            + q * line[i + uint64(3)]
            + r * line[i + uint64(6)]
            + s * line[i + uint64(9)]
        )
        u = (
            p * line[i + uint64(1)]
            + q * line[i + uint64(4)]
            + r * line[i + uint64(7)]
            + s * line[i + uint64(10)]
        )

        v = (
            p * line[i + uint64(2)]
            + q * line[i + uint64(5)]
            + r * line[i + uint64(8)]
            + s * line[i + uint64(11)]
        )
        w = (
            p * line[i + uint64(3)]
            + q * line[i + uint64(6)]
            + r * line[i + uint64(9)]
            + s * line[i + uint64(12)]
        )

        sums[o] = t
        sums[o + uint64(1)] = u
        sums[o + uint64(2)] = v
        sums[o + uint64(3)] = w


@inlined
def _round(sums: Array, out: Array) -> None:
    for x in range(len(out)):
        out[x] = uint8(min(max(int32(sums[x] + float32(0.5)), int32(0)), int32(255)))


@inlined
def _weights(before: int, after: int) -> tuple[Array, Array]:
    """For each of `after` pixels, the first of its four neighbours in `before` pixels, which may be
    outside, and their weights.
    """
    first, weights = np.empty(after, np.int64), np.zeros((after, 4), np.float32)

    for x in range(after):
        centre = (x + 0.5) * before / after - 0.5
        first[x] = int(np.floor(centre)) - 1
        total = 0.0
        for k in range(4):
            t = abs(first[x] + k - centre)
            w = (1.5 * t - 2.5) * t * t + 1.0 if t < 1.0 else ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
            if 0 <= first[x] + k < before:
                weights[x, k] = w
                total += w

        for k in range(4):
            weights[x, k] /= total

    return first, weights
