"""Executes the colour operations, blur and flip of one view on the CPU: uint8 in, uint8 out,
clipped after each operation as torchvision does on Pillow images.
"""

from __future__ import annotations

import numpy as np

from scaletrain.data.transforms import blur
from scaletrain.data.transforms.color_operations import photometric
from scaletrain.data.transforms.crop import rows
from scaletrain.data.transforms.image import Pixels
from scaletrain.data.transforms.params import Operations, Params, operations, radius

# parameters that change nothing
PLAIN = Params((0, 0, 8, 8))


def apply(image: Pixels, p: Params, out: Pixels) -> None:
    """Execute the operations of `p` on `image`, which is not changed, and write the result to
    `out`, contiguous [H, W, 3].
    """
    before, after = operations(p)
    reach = radius(p.sigma, min(image.shape[:2]))
    if not reach:
        before, after = before + after, []

    # the flip commutes with everything, so it is done with the first operations
    if before or p.flip:
        _execute(image, out, before, p.flip)
    else:
        out[...] = image

    if reach:
        blur.blur(rows(out), p.sigma, reach)

    if after:
        _execute(out, out, after, flip=False)


def _execute(image: Pixels, out: Pixels, chosen: Operations, flip: bool) -> None:
    numbers = np.array([number for number, _ in chosen], np.int64)
    amounts = np.array([amount for _, amount in chosen], np.float64)
    photometric(rows(image), rows(out), numbers, amounts, flip)


def prepare() -> None:
    """Compile, so that processes forked from this one need not."""
    image = np.zeros((8, 8, 3), np.uint8)
    apply(image, PLAIN._replace(gray=True, sigma=0.5), np.empty_like(image))
