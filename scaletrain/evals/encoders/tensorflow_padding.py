"""Padding as TensorFlow's and Haiku's "SAME": where a stride of two leaves an odd number of pixels
to add, the one more is at the right and below, and torch's layers have it at the left and above.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


def adapt(net: nn.Module) -> None:
    """Make the convolutions and pools of a network that have a stride pad in this way."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.stride[0] > 1:
            _prepare(module, module.kernel_size[0], module.stride[0], 0.0)
        elif isinstance(module, nn.MaxPool2d):
            kernel, stride = module.kernel_size, module.stride
            assert isinstance(kernel, int)
            assert isinstance(stride, int)
            _prepare(module, kernel, stride, -float("inf"))


def _prepare(module: nn.Conv2d | nn.MaxPool2d, kernel: int, stride: int, fill: float) -> None:
    module.padding = (0, 0)
    if kernel > 1:
        module.register_forward_pre_hook(partial(_pad, kernel=kernel, stride=stride, fill=fill))


def _pad(
    module: nn.Module, inputs: tuple[Tensor, ...], *, kernel: int, stride: int, fill: float
) -> Tensor:
    (x,) = inputs  # [N, C, H, W]
    sides = []

    for length in (x.shape[3], x.shape[2]):
        outputs = -(-length // stride)
        total = max((outputs - 1) * stride + kernel - length, 0)
        sides += [total // 2, total - total // 2]

    return F.pad(x, sides, value=fill)
