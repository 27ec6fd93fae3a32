"""ResNets with torchvision's parameter names, 10 to 295 layers deep and of any width.

`width` multiplies every stage and the stem, as in SimCLR and ReLICv2; a fraction gives the narrow
nets of small studies.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import ModelConfig
from scaletrain.core import Backbone
from scaletrain.nn.blocks import Basic, Bottleneck, conv, deep_stem
from scaletrain.nn.norm import BatchNorm
from scaletrain.ops.precision import full_precision

LAYERS: dict[str, tuple[type[Basic] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (Basic, (1, 1, 1, 1)),
    "resnet18": (Basic, (2, 2, 2, 2)),
    "resnet34": (Basic, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "resnet200": (Bottleneck, (3, 24, 36, 3)),
    # differs: ReLICv2 says only that its ResNet-295 has 87M parameters. 98 blocks and the stem are
    # 295 convolutions; they are spread in ResNet-200's proportion of 2 to 3, which gives 87.5M.
    "resnet295": (Bottleneck, (3, 37, 55, 3)),
}


class ResNet(Backbone):
    """[N, 3, H, W] -> globally pooled features [N, features]; no classifier.

    With `pool` off, the last feature map [N, features, H / 32, W / 32]; H / 8 and W / 8 with the
    CIFAR stem.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.name not in LAYERS:
            raise ConfigError(
                f"model.name: there is no '{config.name}'; known: {', '.join(LAYERS)}, timm/NAME"
            )

        block, depths = LAYERS[config.name]
        base = round(64 * config.width)
        # the deep stem starts with half of it
        if base < 1 + config.sk:
            raise ConfigError(f"model.width={config.width} leaves no channel")
        if config.sk and block is Basic:
            raise ConfigError(
                f"model.sk needs a network of bottlenecks, resnet50 or deeper; {config.name} has "
                "none"
            )

        def norm(channels: int) -> BatchNorm:
            return BatchNorm(channels, group=config.norm_group)

        make = partial(Bottleneck, sk=True) if config.sk else block
        cifar = config.stem == "cifar"
        self.conv1 = (
            conv(3, base, 3)
            if cifar
            else deep_stem(base, norm)
            if config.sk
            else conv(3, base, 7, 2)
        )

        self.bn1 = norm(base)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        inputs = base
        for stage, depth in enumerate(depths):
            planes = base * 2**stage
            blocks: list[nn.Module] = []
            for i in range(depth):
                blocks.append(make(inputs, planes, 2 if stage and not i else 1, norm))
                inputs = planes * block.expansion

            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

        self.features, self.pool = inputs, True
        self.filters: Tensor | None
        ramp = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer(
            "filters",
            torch.stack([ramp, ramp.T])[:, None] if config.sobel else None,
            persistent=False,
        )

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if config.zero_init and isinstance(module, (Basic, Bottleneck)):
                nn.init.zeros_(module.last_norm.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.filters is None else edges(x, self.filters)
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x.mean((2, 3)) if self.pool else x


@full_precision
def edges(x: Tensor, filters: Tensor) -> Tensor:
    """[N, 3, H, W] -> the same of the grey image's Sobel gradients, across and down, and black as
    the third colour.

    So the first layer, and its name and shape, are those of any network (DeepCluster, section 4:
    two input channels).
    """
    slopes = F.conv2d(x.mean(1, keepdim=True), filters, padding=1)

    return F.pad(slopes, (0, 0, 0, 0, 0, 1))
