"""The parts of ResNets (He et al., 2016; v1.5: the stride sits in the 3x3 convolution), under
torchvision's names.

`sk` gives SimCLRv2's blocks (arXiv 2006.10029, after google-research/simclr's tf2/resnet.py):
selective kernels (Li et al., arXiv 1903.06586) in the bottleneck, and ResNet-D's stem and shortcuts
(He et al., arXiv 1812.01187).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.nn.norm import BatchNorm

Norm = Callable[[int], BatchNorm]
# channels that weigh the two kernels, as a share of the block's, and at least
SK_RATIO, SK_LEAST = 1 / 16, 32


class Dilation(NamedTuple):
    """Dilation of a block's 3x3 convolutions: of the one that has the stride, and of those after
    it.
    """

    strided: int
    later: int


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        inputs,
        outputs,
        kernel,
        stride,
        padding=kernel // 2 * dilation,
        dilation=dilation,
        bias=False,
    )


def deep_stem(width: int, norm: Norm) -> nn.Sequential:
    """ResNet-D's three 3x3 convolutions in place of the 7x7 one, under timm's names; [N, 3, H, W]
    -> [N, width, H/2, W/2].
    """
    half = width // 2
    first, second = (
        (conv(3, half, 3, 2), norm(half), nn.ReLU()),
        (conv(half, half, 3), norm(half), nn.ReLU()),
    )

    return nn.Sequential(*first, *second, conv(half, width, 3))


class Basic(nn.Module):
    expansion = 1

    def __init__(
        self, inputs: int, planes: int, stride: int, norm: Norm, dilation: Dilation
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, planes, 3, stride, dilation.strided), norm(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, 1, dilation.later), norm(planes)
        self.downsample = _shortcut(inputs, planes, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))

    @property
    def last_norm(self) -> BatchNorm:
        return self.bn2


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int,
        norm: Norm,
        dilation: Dilation,
        sk: bool = False,
    ) -> None:
        super().__init__()
        # both 3x3 kernels in one convolution
        kernels = 2 if sk else 1
        self.conv1, self.bn1 = conv(inputs, planes, 1), norm(planes)
        self.conv2 = conv(planes, kernels * planes, 3, stride, dilation.strided)
        self.bn2 = norm(kernels * planes)
        self.select = Select(planes, norm) if sk else None
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), norm(4 * planes)
        self.downsample = _shortcut(inputs, 4 * planes, stride, norm, sk)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = y if self.select is None else self.select(y)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))

    @property
    def last_norm(self) -> BatchNorm:
        return self.bn3


class Select(nn.Module):
    """[N, 2 C, H, W], the outputs of two kernels, -> [N, C, H, W]: their mean with weights per
    image and channel.
    """

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        middle = max(int(channels * SK_RATIO), SK_LEAST)
        self.conv1, self.bn1 = conv(channels, middle, 1), norm(middle)
        self.conv2 = conv(middle, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernels: Tensor = x.unflatten(1, (2, -1))  # [N, 2, C, H, W]
        context = kernels.sum(1).mean((2, 3), keepdim=True)
        weights: Tensor = self.conv2(F.relu(self.bn1(self.conv1(context))))
        mixed: Tensor = (kernels * weights.unflatten(1, (2, -1)).softmax(1)).sum(1)
        return mixed


class Overlapping(nn.Module):
    """Mean of 2x2 pixels at stride 1 with the size kept: at the lower and right edge, of the pixels
    that exist.
    """

    def forward(self, x: Tensor) -> Tensor:
        means: Tensor = F.avg_pool2d(x, 2, 1, padding=1, count_include_pad=False)
        return means[..., 1:, 1:]


def _shortcut(
    inputs: int, outputs: int, stride: int, norm: Norm, pool: bool = False
) -> nn.Sequential | None:
    """Projection where the shape changes. pool: ResNet-D's average pooling in place of the stride,
    after TensorFlow's edges.
    """
    if stride == 1 and inputs == outputs:
        return None
    if not pool:
        return nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))

    # An odd side is padded with zeros that count: the last window is still divided by four.
    mean = (
        Overlapping()
        if stride == 1
        else nn.AvgPool2d(2, stride, ceil_mode=True, divisor_override=4)
    )

    return nn.Sequential(mean, conv(inputs, outputs, 1), norm(outputs))
