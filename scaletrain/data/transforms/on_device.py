"""Executes the colour operations, blurs and flips of a whole batch on any device, with the same
parameters and the same result as `color.py` in a worker.

Which samples an operation changes is decided on the CPU, where the parameters are, so the host
never waits for an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from scaletrain.data.transforms.color_operations import ON_DEVICE
from scaletrain.data.transforms.params import AFTER_BLUR, BEFORE_BLUR, TAIL, radius


def augment(x: Tensor, params: Tensor) -> None:
    """Augment x [N, 3, H, W], floats that are whole numbers 0 .. 255, in place; params: [N,
    COLUMNS] float32 on the CPU, as `params.packed` makes them.
    """
    *slots, sigma, flip = params.unbind(1)
    operations, amounts = slots[0::2], slots[1::2]

    for slot in range(BEFORE_BLUR):
        _operate(x, operations[slot], amounts[slot])

    side = min(x.shape[-2:])
    reach = torch.tensor([radius(s, side) for s in sigma.tolist()])
    longest = int(reach.max())
    _where(
        x,
        reach > 0,
        lambda part, weights: _blur(part, weights, longest),
        _kernels(sigma, reach, longest),
    )

    for slot in range(BEFORE_BLUR, BEFORE_BLUR + AFTER_BLUR):
        _operate(x, operations[slot], amounts[slot])

    _where(x, flip > 0, lambda part, _: part.flip(-1), flip)


def _operate(x: Tensor, operations: Tensor, amounts: Tensor) -> None:
    """Execute one operation of each image, operations and amounts [N]."""
    for operation, change in ON_DEVICE.items():
        _where(x, operations == operation, change, amounts)


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
