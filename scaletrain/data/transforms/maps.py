"""Maps of an image with a number for each pixel, which are cropped, scaled and flipped with its
views: foreground {0, 1}, classes 0 .. 254 with 255 as void, or grey values.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from scaletrain.data.errors import ImageError
from scaletrain.data.transforms import image
from scaletrain.data.transforms.crop import resize, visible
from scaletrain.data.transforms.params import Box

Map = NDArray[np.uint8]  # [H, W]
VOID = 255
# what lies outside of the image
OUTSIDE = {"foreground": 0, "classes": VOID, "grey": 0}
# every pixel of a sample that has no map
ABSENT = {"foreground": 1, "classes": VOID}
# colour types of a PNG (PNG specification, 11.2.2)
GREY, PALETTE = 0, 3


def decode(data: bytes, kind: str, max_pixels: int) -> Map:
    """Decode a map. Raises ImageError, also for other formats than PNG where values must be exact.

    foreground: 1 where the pixel is not black. classes: the grey value or the palette index, never
    the palette's colour.
    """
    image.check(data, max_pixels)
    if kind == "grey":
        return image.grey(data)

    if (found := image.kind(data)) != "png":
        raise ImageError(f"a map of kind {kind} must be a PNG, and this is a {found}")
    if kind == "foreground":
        return (image.grey(data) > 0).view(np.uint8)

    depth, color = _form(data)
    if (depth, color) != (8, GREY) and color != PALETTE:
        raise ImageError(
            f"class numbers are read from a PNG with a palette or with 8 bits of grey, and this "
            f"one has {depth} bits of colour type {color}"
        )

    return np.asarray(image.upright(data))


def view(values: Map | None, kind: str, box: Box, size: int, flip: bool) -> Map:
    """The part [size, size] of a map that belongs to the view with this box and flip; for a sample
    without a map, ABSENT.

    Grey values are averaged, others are those of the nearest pixel. Outside of the image they are
    OUTSIDE.
    """
    if values is None:
        return np.full((size, size), ABSENT[kind], np.uint8)

    inner, (top, left, height, width) = visible(box, values.shape, size)
    part = values[inner[0] : inner[0] + inner[2], inner[1] : inner[1] + inner[3]]

    if kind == "grey":
        part = resize(part[..., None], height, width, "bilinear", antialias=True)[..., 0]
    else:
        part = cv2.resize(part, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)  # type: ignore[assignment]

    out = np.full((size, size), OUTSIDE[kind], np.uint8)
    out[top : top + height, left : left + width] = part
    return cv2.flip(out, 1) if flip else out  # type: ignore[return-value]


def on_device(values: Tensor, kind: str) -> Tensor:
    """[V, B, H, W] uint8 -> [V, B, 1, H, W]: class numbers int64, others float32 in [0, 1]."""
    values = values.unsqueeze(2)
    if kind == "classes":
        return values.long()
    return values.float() / 255 if kind == "grey" else values.float()


def foreground(maps: Sequence[Tensor], kinds: Sequence[str]) -> Tensor | None:
    """The first of the maps that is a foreground mask, if one is."""
    return next((m for m, kind in zip(maps, kinds, strict=True) if kind == "foreground"), None)


def shrink(data: bytes, side: int) -> bytes:
    """Reduce the short side of a checked PNG to `side` by nearest neighbour. The form of its pixels
    stays as it is, so that values and palette indices do. Raises ImageError.
    """
    depth, color = _form(data)
    if color == GREY and depth in (2, 4):
        raise ImageError(
            f"a map of {depth} bits of grey cannot be resized without other values: write it with 8"
        )

    whole = image.upright(data)
    scale = side / min(whole.size)
    width, height = (round(pixels * scale) for pixels in whole.size)
    small = whole.resize((width, height), Image.Resampling.NEAREST)
    if small.mode == "P":
        # a short palette is written with few bits, which would cut indices beyond its last colour
        small.putpalette([*(small.getpalette() or []), *[0] * 768][:768])

    out = io.BytesIO()
    small.save(out, "PNG")
    return out.getvalue()


def _form(data: bytes) -> tuple[int, int]:
    """The bits of a value and the colour type, from the header of a PNG."""
    return data[24], data[25]
