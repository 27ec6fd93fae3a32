"""The random parameters of a view, drawn before anything is executed: a pure function of (seed,
epoch, sample, repeat, view), never of rank or worker.

They mean what they mean in torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter,
RandomGrayscale, GaussianBlur and RandomSolarize. The same parameters can be executed in a worker
(crop.py, color.py) or on the device (on_device.py).

A new colour operation is a field of config.schema.View, its two implementations in
color_operations.py and, in this file, a field of Params, which `draw` draws from the next spare
number, and a line in `operations`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

from torch import Tensor

from scaletrain import rng
from scaletrain.config.schema import View
from scaletrain.data.transforms.color_operations import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    SATURATION,
    SOLARIZE,
)

# attempts to draw a crop that fits into the image, as in torchvision
TRIES = 10
# uniform numbers per view, the last six of them spare; another value would change every run
DRAWS = 40
# the orders in which the jitter's operations can be executed
ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
# at most so many operations of a view are executed before and after its blur
BEFORE_BLUR, AFTER_BLUR = 5, 1
# numbers that `packed` returns: each operation with its amount, sigma and flip
COLUMNS = 2 * (BEFORE_BLUR + AFTER_BLUR) + 2
# the blur's kernel ends at this many standard deviations
TAIL = 4.0
# size of the view, in pixels, for which View.sigma is given
SIGMA_SIZE = 224

# top, left, height, width
Box = tuple[int, int, int, int]
# operations of color_operations.py, each with its amount
Operations = list[tuple[int, float]]


class Params(NamedTuple):
    """The parameters of one view of one image; those not given change nothing."""

    box: Box
    flip: bool = False
    # whether the operations in `order` are executed
    jitter: bool = False
    order: tuple[int, ...] = ORDERS[0]
    # factors
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    # shift in turns
    hue: float = 0.0
    gray: bool = False
    # of the blur, in pixels of this view; 0: no blur
    sigma: float = 0.0
    solarize: bool = False


def expand(specs: Sequence[View]) -> list[list[View]]:
    """One list of views per crop size, largest first; inside it the recipe's order, each spec
    `count` times.
    """
    sizes = sorted({spec.size for spec in specs if spec.count}, reverse=True)
    return [
        [spec for spec in specs if spec.size == size for _ in range(spec.count)] for size in sizes
    ]


def uniforms(keys: Tensor, views: int) -> list[list[list[float]]]:
    """[B, views, DRAWS] numbers in [0, 1), a function of the keys [B] of core.Batch."""
    return rng.uniform(keys, "views", views * DRAWS).view(len(keys), views, DRAWS).tolist()


def draw(spec: View, u: Sequence[float], height: int, width: int) -> Params:
    """The parameters of one view of an image of height x width pixels, from DRAWS uniform numbers
    `u`.
    """
    tries, rest = u[: 2 * TRIES], u[2 * TRIES :]
    (
        crop,
        y,
        x,
        flip,
        jitter,
        order,
        brightness,
        contrast,
        saturation,
        hue,
        gray,
        blur,
        sigma,
        solarize,
    ) = rest[:14]

    return Params(
        box=random_box(spec, tries, y, x, height, width)
        if crop < spec.crop
        else (0, 0, height, width),
        flip=flip < spec.flip,
        jitter=jitter < spec.jitter,
        order=ORDERS[int(order * len(ORDERS))],
        brightness=_factor(spec.brightness, brightness),
        contrast=_factor(spec.contrast, contrast),
        saturation=_factor(spec.saturation, saturation),
        hue=(2 * hue - 1) * spec.hue,
        gray=gray < spec.grayscale,
        sigma=_between(spec.sigma, sigma) * spec.size / SIGMA_SIZE if blur < spec.blur else 0.0,
        solarize=solarize < spec.solarize,
    )


def operations(p: Params) -> tuple[Operations, Operations]:
    """The colour operations of a view in the order of their execution, before and after its blur:
    the jitter in its drawn order, then gray; solarize (SimCLR, appendix A; BYOL, appendix B).
    """
    before: Operations = []
    if p.jitter:
        # the 8-bit hue is shifted in 1/255 of a turn, truncated as in torchvision
        amounts = (p.brightness, p.contrast, p.saturation, float(int(p.hue * 255)))
        unchanged = (1.0, 1.0, 1.0, 0.0)
        before = [(k, amounts[k]) for k in p.order if amounts[k] != unchanged[k]]

    if p.gray:
        before.append((GRAY, 0.0))

    return before, [(SOLARIZE, 0.0)] if p.solarize else []


def radius(sigma: float, side: int) -> int:
    """Pixels that the blur of a view with this short side reaches, 0 without a blur. The border is
    mirrored once, so a kernel cannot reach beyond the image.
    """
    return min(int(TAIL * sigma + 0.5), side - 1)


def packed(p: Params) -> tuple[float, ...]:
    """The parameters of one view that the device executes, COLUMNS numbers; its crop is done in the
    worker.
    """
    before, after = operations(p)
    return (*_slots(before, BEFORE_BLUR), *_slots(after, AFTER_BLUR), p.sigma, p.flip)


def _slots(chosen: Operations, count: int) -> list[float]:
    """`count` pairs of operation and amount; -1 where there is no operation."""
    padded = chosen + [(-1, 0.0)] * (count - len(chosen))
    return [number for pair in padded for number in pair]


def random_box(
    spec: View, tries: Sequence[float], y: float, x: float, height: int, width: int
) -> Box:
    """torchvision's RandomResizedCrop.get_params: ten tries with a uniform area and a log-uniform
    ratio, then the largest centred box of an allowed ratio.

    With a scale above 1, the first box is taken. On a side where it is longer than the image, it
    contains the image at a random position.
    """
    low, high = spec.ratio
    beyond = spec.scale[1] > 1
    logs = math.log(low), math.log(high)

    for i in range(0, 2 * TRIES, 2):
        area = height * width * _between(spec.scale, tries[i])
        ratio = math.exp(_between(logs, tries[i + 1]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w > 0 and h > 0 and (beyond or (w <= width and h <= height)):
            return _position(y, height - h), _position(x, width - w), h, w

    ratio = min(max(width / height, low), high)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def _position(u: float, room: int) -> int:
    """A uniform whole number between 0 and `room`, which is negative if a box is too long."""
    return int(math.copysign(int(u * (abs(room) + 1)), room))


def _between(bounds: tuple[float, float], u: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * u


def _factor(strength: float, u: float) -> float:
    return _between((max(0.0, 1.0 - strength), 1.0 + strength), u)
