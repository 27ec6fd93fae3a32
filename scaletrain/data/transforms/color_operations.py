"""Every colour operation in both of its implementations: compiled, for the rows of one image in a
worker, and in torch, for a batch on a device. Both use Pillow's arithmetic.

In the worker, a row is split into planes that stay in the first-level cache, and the compiler turns
every loop into vector instructions. That needs 32-bit arithmetic throughout: numba widens integers
to 64 bits unless they are cast.

A new operation gets a number, a branch in `_operate` and an entry in ON_DEVICE; `params.py` draws
it and says when it is executed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy import float32, int32, uint64
from torch import Tensor

from scaletrain.runtime.jit import compiled, inlined

# in compiled code the types are numba's
Array = Any
# the first four are those of the jitter, numbered as in params.ORDERS
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, SOLARIZE = range(6)


@compiled
def normalise(src: Array, scale: Array, shift: Array, out: Array) -> None:
    """Rows [n, 3 W] uint8 -> float32 [n, 3 W]: src * scale + shift, whose [3 W] float32 repeat with
    the channels.
    """
    for y in range(src.shape[0]):
        for x in range(src.shape[1]):
            out[y, x] = float32(src[y, x]) * scale[x] + shift[x]


@compiled
def photometric(src: Array, out: Array, operations: Array, amounts: Array, flip: bool) -> None:
    """Rows [H, 3 W] uint8 -> [H, 3 W], which may be the same memory: `operations` [K] in their
    order, then the flip.

    amounts [K] float64: the factor of a brightness, contrast or saturation; the shift of the 8-bit
    hue. Contrast blends with the mean of the gray image that the operations before it produce, so
    those need a pass of their own, which writes its result to `out`.
    """
    first, mean = 0, 0

    for k in range(len(operations)):
        if operations[k] == CONTRAST:
            mean = int(_gray_sum(src, out, operations[:k], amounts) / (src.size // 3) + 0.5)
            first, src = k, out if k else src

    width = src.shape[1] // 3
    rgb, mirrored = np.empty((3, width), np.int32), np.empty((3, width), np.int32)
    for y in range(src.shape[0]):
        _split(src[y], rgb)
        for k in range(first, len(operations)):
            _operate(operations[k], rgb, amounts[k], mean)

        if flip:
            _mirror(rgb, mirrored)
            _merge(mirrored, out[y])
        else:
            _merge(rgb, out[y])


@inlined
def _gray_sum(src: Array, out: Array, operations: Array, amounts: Array) -> int:
    """Sum of the gray image after `operations`; if there are any, the colour image is written to
    `out`.
    """
    width = src.shape[1] // 3
    rgb = np.empty((3, width), np.int32)
    total = 0

    for y in range(src.shape[0]):
        _split(src[y], rgb)
        for k in range(len(operations)):
            _operate(operations[k], rgb, amounts[k], 0)

        if len(operations):
            _merge(rgb, out[y])

        row = int32(0)
        for x in range(width):
            row = int32(row + _luma(rgb[0, x], rgb[1, x], rgb[2, x]))

        total += int(row)

    return total


@inlined
def _operate(operation: int, rgb: Array, amount: float, mean: int) -> None:
    if operation == HUE:
        _hue(rgb[0], rgb[1], rgb[2], int32(amount))
    elif operation == SATURATION:
        _saturate(rgb[0], rgb[1], rgb[2], float32(amount))
    elif operation == GRAY:
        _gray(rgb)
    elif operation == SOLARIZE:
        _solarize(rgb)
    else:
        for c in range(3):
            _blend(rgb[c], float32(mean if operation == CONTRAST else 0), float32(amount))


@inlined
def _luma(r: int32, g: int32, b: int32) -> int32:
    """Pillow's "L": ITU-R 601-2 in 16-bit fixed point, rounded."""
    return int32(int32(int32(19595) * r + int32(38470) * g + int32(7471) * b + int32(0x8000)) >> 16)


@inlined
def _toward(base: float32, value: int32, factor: float32) -> int32:
    """Pillow's blend, in its float32, truncated and clipped."""
    return min(max(int32(base + factor * (float32(value) - base)), int32(0)), int32(255))


@inlined
def _blend(plane: Array, base: float32, factor: float32) -> None:
    for x in range(len(plane)):
        plane[x] = _toward(base, plane[x], factor)


@inlined
def _saturate(r: Array, g: Array, b: Array, factor: float32) -> None:
    for x in range(len(r)):
        base = float32(_luma(r[x], g[x], b[x]))
        r[x] = _toward(base, r[x], factor)
        g[x] = _toward(base, g[x], factor)
        b[x] = _toward(base, b[x], factor)


@inlined
def _hue(r: Array, g: Array, b: Array, shift: int32) -> None:
    """To Pillow's 8-bit HSV, shifted, and back. The six sectors are written as ramps, so that there
    are no branches.
    """
    for x in range(len(r)):
        value = max(r[x], max(g[x], b[x]))
        chroma = int32(value - min(r[x], min(g[x], b[x])))
        if r[x] == value:
            rise, sector = int32(g[x] - b[x]), float32(0)
        elif g[x] == value:
            rise, sector = int32(b[x] - r[x]), float32(2)
        else:
            rise, sector = int32(r[x] - g[x]), float32(4)

        angle = float32(rise) / float32(max(chroma, int32(1))) + sector
        angle = angle + float32(6) if angle < 0 else angle
        hue = int32(int32(int32(angle * float32(42.5)) + shift) & 255)
        saturation = int32(float32(chroma) * float32(255) / float32(max(value, int32(1))))
        turned = float32(hue) * float32(6 / 255)
        top = float32(value) + float32(0.5)
        depth = float32(value) * (float32(saturation) * float32(1 / 255))
        r[x] = int32(top - depth * _unit(float32(2) - abs(turned - float32(3))))
        g[x] = int32(top - depth * _unit(abs(turned - float32(2)) - float32(1)))

        b[x] = int32(top - depth * _unit(abs(turned - float32(4)) - float32(1)))


@inlined
def _unit(x: float32) -> float32:
    x = float32(0) if x < 0 else x
    return float32(1) if x > 1 else x


@inlined
def _gray(rgb: Array) -> None:
    r, g, b = rgb[0], rgb[1], rgb[2]
    for x in range(len(r)):
        luma = _luma(r[x], g[x], b[x])
        r[x] = luma
        g[x] = luma
        b[x] = luma


@inlined
def _solarize(rgb: Array) -> None:
    for c in range(3):
        plane = rgb[c]
        for x in range(len(plane)):
            plane[x] = int32(255 - plane[x]) if plane[x] >= 128 else plane[x]


@inlined
def _split(row: Array, rgb: Array) -> None:
    r, g, b = rgb[0], rgb[1], rgb[2]
    for x in range(len(r)):
        r[x] = row[3 * x]
        g[x] = row[3 * x + 1]
        b[x] = row[3 * x + 2]


@inlined
def _merge(rgb: Array, row: Array) -> None:
    r, g, b = rgb[0], rgb[1], rgb[2]
    for x in range(len(r)):
        row[3 * x] = r[x]
        row[3 * x + 1] = g[x]
        row[3 * x + 2] = b[x]


@inlined
def _mirror(rgb: Array, out: Array) -> None:
    last = rgb.shape[1] - 1
    for c in range(3):
        source, target = rgb[c], out[c]
        for x in range(last + 1):
            # unsigned: else numba looks whether to count from the end
            target[x] = source[uint64(last - x)]


# The same operations for batches on a device: x [N, 3, H, W] are whole numbers 0 .. 255 in float32,
# amounts [N, 1, 1, 1].


def _batch_luma(x: Tensor) -> Tensor:
    """Pillow's "L" [N, 1, H, W]. The products are whole numbers that float32 holds, so this is
    exact.
    """
    red, green, blue = x.unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) / 0x10000).floor_().unsqueeze(1)


def _batch_blend(base: Tensor | float, x: Tensor, factor: Tensor) -> Tensor:
    return (base + factor * (x - base)).trunc_().clamp_(0, 255)


def _batch_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _batch_blend(0.0, x, factor)


def _batch_contrast(x: Tensor, factor: Tensor) -> Tensor:
    # float64: the sum over an image is beyond the whole numbers of float32
    mean = _batch_luma(x).mean((1, 2, 3), keepdim=True, dtype=torch.float64)
    return _batch_blend((mean + 0.5).floor_().float(), x, factor)


def _batch_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _batch_blend(_batch_luma(x), x, factor)


def _batch_hue(x: Tensor, shift: Tensor) -> Tensor:
    """As `_hue`, with the same six sectors."""
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    is_red, is_green = red == value, green == value
    rise = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    angle = rise / chroma.clamp(min=1) + torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0))
    hue = torch.remainder(
        (torch.where(angle < 0, angle + 6, angle) * 42.5).floor_() + shift[:, 0], 256
    ) * (6 / 255)

    depth = value * ((chroma * 255 / value.clamp(min=1)).floor_() * (1 / 255))
    ramps = torch.stack((2 - (hue - 3).abs(), (hue - 2).abs() - 1, (hue - 4).abs() - 1), 1).clamp_(
        0, 1
    )
    return (value.unsqueeze(1) + 0.5 - depth.unsqueeze(1) * ramps).floor_()


def _batch_gray(x: Tensor, _: Tensor) -> Tensor:
    return _batch_luma(x).expand_as(x)


def _batch_solarize(x: Tensor, _: Tensor) -> Tensor:
    return torch.where(x < 128, x, 255 - x)


ON_DEVICE: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    BRIGHTNESS: _batch_brightness,
    CONTRAST: _batch_contrast,
    SATURATION: _batch_saturation,
    HUE: _batch_hue,
    GRAY: _batch_gray,
    SOLARIZE: _batch_solarize,
}
