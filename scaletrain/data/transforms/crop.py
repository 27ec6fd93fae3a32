"""Crops and resizing on the CPU: uint8 in, uint8 out."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from scaletrain.data.errors import ImageError
from scaletrain.data.transforms import tf_bicubic
from scaletrain.data.transforms.image import Pixels
from scaletrain.data.transforms.params import Box

_OPENCV = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
# pixels of an intermediate image; it is larger only for images a hundred times as long as wide
LARGE = 1 << 24
# ratio of the sides above which an image is cropped before it is enlarged
LONG = 16
# the deterministic views of evaluation
PROTOCOLS = ("tv", "byol", "simclr-transfer", "native", "none")


def resize(image: Pixels, height: int, width: int, interpolation: str, antialias: bool) -> Pixels:
    """[H, W, C] -> [height, width, C], C = 3, or any number with antialiasing.

    With antialiasing the filter widens with the reduction, as in Pillow; torch's uint8 kernel
    returns Pillow's values and is faster than OpenCV's INTER_AREA. Without it, four or sixteen
    neighbours are used, whatever the reduction: bilinear and bicubic are OpenCV's (the cubic with
    a = -.75, as torch's), keys is TensorFlow's bicubic, as in BYOL's and ReLICv2's code.
    """
    if image.shape[:2] == (height, width):
        return image
    if not antialias:
        return cv2.resize(image, (width, height), interpolation=_OPENCV[interpolation])  # type: ignore[return-value]

    if image.shape[0] * width > max(LARGE, 4 * image.shape[0] * image.shape[1], 4 * height * width):
        # torch resizes the width first, so reduce the height beforehand
        image = resize(image, height, image.shape[1], interpolation, antialias)

    # the batch axis is added before the permutation, so that torch uses channels_last throughout
    x = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    x = F.interpolate(x, size=(height, width), mode=interpolation, antialias=True)
    return x.permute(0, 2, 3, 1)[0].numpy()


def crop(
    image: Pixels,
    box: Box,
    size: int,
    interpolation: str,
    antialias: bool,
    outside: Sequence[int] = (0, 0, 0),
) -> Pixels:
    """Crop the box and resize it to [size, size, 3]; what is not in the image has the colour
    `outside`.
    """
    inner, (top, left, height, width) = visible(box, image.shape, size)
    part = _cut(image, inner, height, width, interpolation, antialias)
    if (height, width) == (size, size):
        return part

    out = np.empty((size, size, 3), np.uint8)
    out[:] = outside
    out[top : top + height, left : left + width] = part
    return out


def visible(box: Box, shape: Sequence[int], size: int) -> tuple[Box, Box]:
    """The part of a box inside of an image [H, W, ...], and where a view [size, size] of the box
    shows it: all of both, unless the box extends beyond the image.
    """
    top, inner_height, top_view, height_view = _overlap(box[0], box[2], shape[0], size)
    left, inner_width, left_view, width_view = _overlap(box[1], box[3], shape[1], size)
    inner = top, left, inner_height, inner_width
    return inner, (top_view, left_view, height_view, width_view)


def _overlap(start: int, length: int, limit: int, size: int) -> tuple[int, int, int, int]:
    """One side of `visible`: start and length in the image, and start and length in the view, where
    it has a pixel at least.
    """
    first, stop = max(start, 0), min(start + length, limit)
    begin, end = (round((at - start) * size / length) for at in (first, stop))
    begin = min(begin, size - 1)
    return first, stop - first, begin, max(end - begin, 1)


def _cut(
    image: Pixels, box: Box, rows_out: int, columns_out: int, interpolation: str, antialias: bool
) -> Pixels:
    """Cut out a box inside of the image, resized to [rows_out, columns_out, 3]."""
    top, left, height, width = box
    if interpolation == "keys":
        out = np.empty((rows_out, columns_out, 3), np.uint8)
        tf_bicubic.resize(rows(image), top, left, height, width, rows(out))
        return out

    part = image[top : top + height, left : left + width]
    return resize(part, rows_out, columns_out, interpolation, antialias)


def prepare() -> None:
    """Compile `keys`, so that processes forked from this one need not."""
    crop(np.zeros((8, 8, 3), np.uint8), (0, 0, 8, 8), 8, "keys", antialias=False)


def rows(image: Pixels) -> NDArray[np.uint8]:
    """[H, W, 3] -> [H, 3 W], the shape that compiled code uses; the same memory if contiguous."""
    return image.reshape(len(image), -1)


def evaluate(image: Pixels, size: int, protocol: str) -> Pixels:
    """The deterministic view of evaluation, [size, size, 3].

    tv: short side to 256/224 of `size` (bilinear, antialiased), centre crop. byol: centre square of
    224/256 of the short side, then bicubic without antialiasing. simclr-transfer: short side to
    `size`, bicubic, centre crop (SimCLR, appendix B.8; antialiased as in Pillow, which the paper
    does not specify). native: centre crop of the image as it is. none: the whole image, resized.
    Raises ImageError for an image that is smaller than a native crop.
    """
    height, width = image.shape[:2]
    short = min(height, width)

    match protocol:
        case "tv":
            return _short_side(image, round(size * 256 / 224), size, "bilinear")
        case "simclr-transfer":
            return _short_side(image, size, size, "bicubic")
        case "native":
            if short < size:
                raise ImageError(
                    f"{width} x {height} pixels are less than the {size} of a native crop"
                )
            return np.ascontiguousarray(_centre(image, size))
        case "byol":
            return resize(
                _centre(image, max(1, round(short * 224 / 256))),
                size,
                size,
                "bicubic",
                antialias=False,
            )
        case "none":
            return resize(image, size, size, "bilinear", antialias=True)

    raise ValueError(f"there is no resize protocol '{protocol}'; known: {', '.join(PROTOCOLS)}")


def _short_side(image: Pixels, side: int, size: int, interpolation: str) -> Pixels:
    """Resize the short side to `side` with antialiasing, and crop the centre [size, size, 3]."""
    height, width = image.shape[:2]
    short = min(height, width)
    if max(height, width) > LONG * short and side * side * max(height, width) // short > LARGE:
        image = _middle(image, 2 * short + 8)
        height, width = image.shape[:2]

    # torchvision's Resize() truncates the long side
    shape = side * height // short, side * width // short
    return np.ascontiguousarray(_centre(resize(image, *shape, interpolation, antialias=True), size))


def _middle(image: Pixels, length: int) -> Pixels:
    """Crop the long side symmetrically to about `length` pixels, more than a centre crop uses."""
    cut = max(0, (max(image.shape[:2]) - length) // 2)
    return (
        image[cut : len(image) - cut]
        if len(image) > image.shape[1]
        else image[:, cut : image.shape[1] - cut]
    )


def _centre(image: Pixels, side: int) -> Pixels:
    top, left = round((image.shape[0] - side) / 2), round((image.shape[1] - side) / 2)
    return image[top : top + side, left : left + side]
