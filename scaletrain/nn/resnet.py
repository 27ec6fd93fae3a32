"""ResNets with torchvision's parameter names (He et al., 2016; v1.5: the stride sits in the 3x3 convolution), any width.

`width` multiplies every stage and the stem, as in SimCLR and ReLICv2; a fraction gives the narrow nets of small studies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.config import ConfigError, Model
from scaletrain.nn.norm import BatchNorm

Norm = Callable[[int], BatchNorm]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Basic(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, planes, 3, stride), norm(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3), norm(planes)
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

    def __init__(self, inputs: int, planes: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, planes, 1), norm(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3, stride), norm(planes)
        self.conv3, self.bn3 = _conv(planes, 4 * planes, 1), norm(4 * planes)
        self.downsample = _shortcut(inputs, 4 * planes, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))

    @property
    def last_norm(self) -> BatchNorm:
        return self.bn3


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Sequential | None:
    return None if stride == 1 and inputs == outputs else nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs))


LAYERS: dict[str, tuple[type[Basic] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (Basic, (2, 2, 2, 2)),
    "resnet34": (Basic, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "resnet200": (Bottleneck, (3, 24, 36, 3)),
}


class ResNet(nn.Module):
    """[N, 3, H, W] -> globally pooled features [N, features]; no classifier."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, config: Model) -> None:
        super().__init__()
        if config.name not in LAYERS:
            raise ConfigError(f"model.name: there is no '{config.name}'; known: {', '.join(LAYERS)}")
        block, depths = LAYERS[config.name]
        base = round(64 * config.width)
        if base < 1:
            raise ConfigError(f"model.width={config.width} leaves no channel")

        def norm(channels: int) -> BatchNorm:
            return BatchNorm(channels, group=config.norm_group)

        cifar = config.stem == "cifar"
        self.conv1 = _conv(3, base, 3) if cifar else _conv(3, base, 7, 2)
        self.bn1 = norm(base)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        inputs = base
        for stage, depth in enumerate(depths):
            planes = base * 2**stage
            blocks: list[nn.Module] = []
            for i in range(depth):
                blocks.append(block(inputs, planes, 2 if stage and not i else 1, norm))
                inputs = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.features = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if config.zero_init and isinstance(module, (Basic, Bottleneck)):
                nn.init.zeros_(module.last_norm.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x.mean((2, 3))


def build(config: Model) -> ResNet:
    return ResNet(config)
