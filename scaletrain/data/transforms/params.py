"""What is random about a view, drawn as data: a pure function of (seed, epoch, sample, repeat,
view), never of rank or worker.

Meanings follow torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale,
GaussianBlur and RandomSolarize. The same parameters can be executed here (crop.py, colour.py) or on
the device (batched.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

from torch import Tensor

from scaletrain import rng
from scaletrain.config.schema import View

# of a crop box, as in torchvision
TRIES = 10
# uniform numbers per view, some of them spare; another value would change every run
DRAWS = 40
# of brightness 0, contrast 1, saturation 2, hue 3
ORDERS = tuple(permutations(range(4)))
# of `packed`: order, brightness, contrast, saturation, hue, gray, sigma, solarize, flip
COLUMNS = 9
# standard deviations that the blur's kernel reaches
TAIL = 4.0
# pixels; View.sigma is given for this size of view
SIGMA_SIZE = 224

# top, left, height, width
Box = tuple[int, int, int, int]


class Params(NamedTuple):
    """One view of one image. Factors multiply; `hue` is a shift in turns; `sigma` is in pixels of
    this view.
    """

    box: Box
    flip: bool
    jitter: bool
    order: tuple[int, ...]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    gray: bool
    # 0: no blur
    sigma: float
    solarize: bool


def expand(specs: Sequence[View]) -> list[list[View]]:
    """One list of views per crop size, largest first; inside it the recipe's order, each spec
    `count` times.
    """
    sizes = sorted({spec.size for spec in specs if spec.count}, reverse=True)
    return [
        [spec for spec in specs if spec.size == size for _ in range(spec.count)] for size in sizes
    ]


def uniforms(keys: Tensor, views: int) -> list[list[list[float]]]:
    """[B, views, DRAWS] numbers in [0, 1) from core.Batch's keys [B], so that a device could draw
    the same parameters.
    """
    return rng.uniform(keys, "views", views * DRAWS).view(len(keys), views, DRAWS).tolist()


def draw(spec: View, u: Sequence[float], height: int, width: int) -> Params:
    """The parameters of one view of an image of height x width pixels from DRAWS uniform
    numbers.
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


def hue_shift(turns: float) -> int:
    """Of the 8-bit hue, in 1/255 of a turn, truncated as torchvision does."""
    return int(turns * 255)


def radius(sigma: float, side: int) -> int:
    """Pixels that the blur of a view of this short side reaches; 0 if none. Mirrored once, a kernel
    cannot reach further.
    """
    return min(int(TAIL * sigma + 0.5), side - 1)


def packed(p: Params) -> tuple[float, ...]:
    """What the device needs of one view, COLUMNS numbers: the crop is done, and no jitter is a
    jitter that changes nothing.
    """
    jitter = (
        (p.brightness, p.contrast, p.saturation, hue_shift(p.hue))
        if p.jitter
        else (1.0, 1.0, 1.0, 0.0)
    )

    return (ORDERS.index(p.order), *jitter, p.gray, p.sigma, p.solarize, p.flip)


def random_box(
    spec: View, tries: Sequence[float], y: float, x: float, height: int, width: int
) -> Box:
    """torchvision RandomResizedCrop.get_params: ten tries at (area, log-uniform ratio), then the
    largest allowed centre box.
    """
    low, high = spec.ratio
    logs = math.log(low), math.log(high)

    for i in range(0, 2 * TRIES, 2):
        area = height * width * _between(spec.scale, tries[i])
        ratio = math.exp(_between(logs, tries[i + 1]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w

    ratio = min(max(width / height, low), high)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def _between(bounds: tuple[float, float], u: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * u


def _factor(strength: float, u: float) -> float:
    return _between((max(0.0, 1.0 - strength), 1.0 + strength), u)
