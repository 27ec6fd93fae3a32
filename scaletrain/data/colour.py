"""Photometric operations on the CPU, uint8 in, uint8 out, clipped after each as torchvision does on Pillow images."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from scaletrain.data.image import Pixels
from scaletrain.data.views import Params

_RAMP = np.arange(256)
_LUMA = np.tile((0.299, 0.587, 0.114), (3, 1))  # ITU-R 601-2, Pillow's "L", in each row
_TRUNCATE = -0.498  # turns OpenCV's rounding into Pillow's truncation, and whole numbers into themselves
_COLOUR = np.hstack((np.eye(3) - _LUMA, np.zeros((3, 1))))  # what of a pixel is not gray
_GRAY = np.hstack((_LUMA, np.full((3, 1), _TRUNCATE)))
_SOLARIZE = np.where(_RAMP < 128, _RAMP, 255 - _RAMP).astype(np.uint8)
_TAIL = 4.0  # standard deviations that the blur's kernel reaches


def apply(image: Pixels, p: Params) -> Pixels:
    """Jitter in its drawn order, then gray, blur, solarize (SimCLR, appendix A; BYOL, appendix B)."""
    if p.jitter:
        for operation in p.order:
            image = _JITTER[operation](image, p)
    if p.gray:
        image = gray(image)
    if p.sigma:
        image = blur(image, p.sigma)
    return solarize(image) if p.solarize else image


def brightness(image: Pixels, factor: float) -> Pixels:
    return _affine(image, factor, 0.0)


def contrast(image: Pixels, factor: float) -> Pixels:
    """Blend with the mean of the gray image, rounded as Pillow rounds it."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _affine(image, factor, mean * (1 - factor))


def saturation(image: Pixels, factor: float) -> Pixels:
    """Blend with the gray image, as one 3 x 4 matrix."""
    return image if factor == 1.0 else cv2.transform(image, _COLOUR * factor + _GRAY)  # type: ignore[return-value]


def hue(image: Pixels, turns: float) -> Pixels:
    """Shift in 8-bit HSV, as Pillow does."""
    shift = int(turns * 255)
    if shift == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    return cv2.cvtColor(cv2.LUT(hsv, _SHIFTS[shift & 255]), cv2.COLOR_HSV2RGB_FULL)  # type: ignore[return-value]


def gray(image: Pixels) -> Pixels:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]


def blur(image: Pixels, sigma: float) -> Pixels:
    """Gaussian of `sigma` pixels, mirrored at the border; too narrow to reach a neighbour, it does nothing."""
    radius = min(int(_TAIL * sigma + 0.5), min(image.shape[:2]) - 1)
    side = 2 * radius + 1
    return cv2.GaussianBlur(image, (side, side), sigma) if radius else image  # type: ignore[return-value]


def solarize(image: Pixels) -> Pixels:
    return cv2.LUT(image, _SOLARIZE)  # type: ignore[return-value]


def _affine(image: Pixels, factor: float, offset: float) -> Pixels:
    """image * factor + offset, truncated and clipped; faster than a table for any size of image."""
    return image if factor == 1.0 else cv2.addWeighted(image, factor, image, 0.0, offset + _TRUNCATE)  # type: ignore[return-value]


def _hue_tables() -> NDArray[np.uint8]:
    """[256, 1, 256, 3]: the table of every shift; saturation and value pass unchanged."""
    shifted = (_RAMP[:, None] + _RAMP[None]) & 255
    same = np.broadcast_to(_RAMP, (256, 256))
    return np.stack((shifted, same, same), -1).astype(np.uint8)[:, None]


_SHIFTS = _hue_tables()
_JITTER = (
    lambda image, p: brightness(image, p.brightness),
    lambda image, p: contrast(image, p.contrast),
    lambda image, p: saturation(image, p.saturation),
    lambda image, p: hue(image, p.hue),
)
