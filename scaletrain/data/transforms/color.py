"""Photometric operations on the CPU, uint8 in, uint8 out, clipped after each as torchvision does on
Pillow images.
"""

from __future__ import annotations

import numpy as np

from scaletrain.data.transforms import blur
from scaletrain.data.transforms.color_kernels import photometric
from scaletrain.data.transforms.crop import rows
from scaletrain.data.transforms.image import Pixels
from scaletrain.data.transforms.params import Params, hue_shift, radius

# changes nothing
PLAIN = Params((0, 0, 8, 8), False, False, (0, 1, 2, 3), 1.0, 1.0, 1.0, 0.0, False, 0.0, False)


def apply(image: Pixels, p: Params, out: Pixels) -> None:
    """Jitter in its drawn order, then gray, blur, solarize (SimCLR, appendix A; BYOL, appendix B),
    and the flip.

    out: contiguous [H, W, 3] like `image`, which stays as it is. The flip goes with the jitter: it
    commutes with everything.
    """
    factors = (p.brightness, p.contrast, p.saturation, float(hue_shift(p.hue)))
    order = [k for k in p.order if factors[k] != _NOTHING[k]] if p.jitter else []
    reach = radius(p.sigma, min(image.shape[:2]))

    at_once = p.solarize and not reach
    if order or p.gray or at_once or p.flip:
        photometric(
            rows(image),
            rows(out),
            np.array(order, np.int64),
            np.array(factors),
            p.gray,
            at_once,
            p.flip,
        )
    else:
        out[...] = image

    if reach:
        blur.blur(rows(out), p.sigma, reach, p.solarize)


def prepare() -> None:
    """Compile, so that the processes that are forked from this one need not."""
    image = np.zeros((8, 8, 3), np.uint8)
    apply(image, PLAIN._replace(gray=True, sigma=0.5), np.empty_like(image))


# the factors and the shift that change nothing
_NOTHING = (1.0, 1.0, 1.0, 0.0)
