"""Colour operations and flips of whole batches, on any device: the parameters of views.py executed
as colour.py does.

Which samples an operation touches is decided on the CPU, where the parameters come from, so an
accelerator is never waited for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from scaletrain.data.transforms.color_kernels import BRIGHTNESS, CONTRAST, HUE, SATURATION
from scaletrain.data.transforms.params import ORDERS, TAIL, radius

_ORDERS = torch.tensor(ORDERS)


def augment(x: Tensor, params: Tensor) -> None:
    """In place on [N, 3, H, W] floats that are whole numbers 0 .. 255; params: [N, COLUMNS] float32
    on the CPU (views.packed).

    Jitter in each sample's drawn order, then gray, blur, solarize, flip.
    """
    order, brightness, contrast, saturation, hue, gray, sigma, solarize, flip = params.unbind(1)
    steps = _ORDERS[order.long()]  # [N, 4]
    jitter = (
        (BRIGHTNESS, _brightness, brightness),
        (CONTRAST, _contrast, contrast),
        (SATURATION, _saturation, saturation),
    )

    for slot in range(4):
        for operation, change, factor in jitter:
            _where(x, (steps[:, slot] == operation) & (factor != 1), change, factor)
        _where(x, (steps[:, slot] == HUE) & (hue != 0), _hue, hue)

    _where(x, gray > 0, lambda part, _: _luma(part).expand_as(part), gray)
    side = min(x.shape[-2:])
    reach = torch.tensor([radius(s, side) for s in sigma.tolist()])
    longest = int(reach.max())
    _where(
        x,
        reach > 0,
        lambda part, weights: _blur(part, weights, longest),
        _kernels(sigma, reach, longest),
    )

    _where(x, solarize > 0, lambda part, _: torch.where(part < 128, part, 255 - part), solarize)
    _where(x, flip > 0, lambda part, _: part.flip(-1), flip)


def _where(
    x: Tensor, mask: Tensor, change: Callable[[Tensor, Tensor], Tensor], values: Tensor
) -> None:
    """x[mask] = change(x[mask], values[mask]), the values shaped like images; mask [N] and values
    [N, ...] on the CPU.
    """
    at = mask.nonzero().flatten()

    if len(at):
        chosen = values[at].view(len(at), -1, 1, 1).to(x.device, non_blocking=True)
        at = at.to(x.device, non_blocking=True)
        x.index_copy_(0, at, change(x.index_select(0, at), chosen))


def _luma(x: Tensor) -> Tensor:
    """Pillow's "L" [N, 1, H, W]. The products are whole numbers that float32 holds, so this is
    exact.
    """
    red, green, blue = x.unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) / 0x10000).floor_().unsqueeze(1)


def _blend(base: Tensor | float, x: Tensor, factor: Tensor) -> Tensor:
    return (base + factor * (x - base)).trunc_().clamp_(0, 255)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(0.0, x, factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    # float64: the sum over an image is beyond the whole numbers of float32
    mean = _luma(x).mean((1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend((mean + 0.5).floor_().float(), x, factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(_luma(x), x, factor)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """To Pillow's 8-bit HSV, shifted, and back; as pixelwise.py, whose sectors these are."""
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


def _kernels(sigma: Tensor, reach: Tensor, longest: int) -> Tensor:
    """[N, 2 * longest + 1]: each row a Gaussian that ends at its own reach."""
    at = torch.arange(-longest, longest + 1)
    kernel = torch.exp(-0.5 * (at / sigma.double().clamp(min=1 / TAIL)[:, None]) ** 2) * (
        at.abs() <= reach[:, None]
    )

    return (kernel / kernel.sum(1, keepdim=True)).float()


def _blur(x: Tensor, kernels: Tensor, longest: int) -> Tensor:
    """Depthwise, columns and then rows, mirrored at the border; kernels [N, 2 * longest + 1, 1, 1],
    one for each sample.
    """
    n, channels, height, width = x.shape
    weights = kernels.flatten(1).repeat_interleave(channels, 0)
    y = F.pad(x.reshape(1, n * channels, height, width), (longest,) * 4, mode="reflect")
    y = F.conv2d(y, weights[:, None, :, None], groups=n * channels)
    y = F.conv2d(y, weights[:, None, None, :], groups=n * channels)

    return y.add_(0.5).floor_().view_as(x)
