"""What the first layer of our ResNets sees instead of normalised colours: `model.input`.

Neither choice has parameters, and both have three channels, so that the first layer keeps its name
and shape. They are part of the network: evaluation and export see the same input as training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.config.schema import DataConfig, ModelConfig
from scaletrain.ops.precision import full_precision


def build(config: ModelConfig, data: DataConfig | None) -> nn.Module:
    """The module between the images and the first layer. `data`: how pixels were normalised, which
    lightness has to undo.
    """
    if config.input == "sobel":
        return Sobel()
    if config.input == "rgb":
        return nn.Identity()

    if data is None:
        raise ValueError("model.input=lightness needs the mean and std that normalised its images")
    return Lightness(data.mean, data.std)


class Sobel(nn.Module):
    """Normalised images [N, 3, H, W] -> the same of the grey image's gradients, across and down,
    and black as the third channel (DeepCluster, section 4: two input channels).
    """

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        ramp = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("filters", torch.stack([ramp, ramp.T])[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _edges(x, self.filters)


class Lightness(nn.Module):
    """Normalised images [N, 3, H, W] -> (L - 50) / 100 in each of the three channels, with L of CIE
    Lab: the input of colorization (Zhang et al., 2016), scaled as in richzhang/colorization.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (lightness(x, self.mean, self.std) / 100 - 0.5).expand(-1, 3, -1, -1)


@full_precision
def _edges(x: Tensor, filters: Tensor) -> Tensor:
    slopes = F.conv2d(x.mean(1, keepdim=True), filters, padding=1)
    return F.pad(slopes, (0, 0, 0, 0, 0, 1))


@full_precision
def lightness(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[N, 3, H, W] sRGB pixels, normalised by mean and std [3, 1, 1], -> L of CIE Lab [N, 1, H, W],
    0 to 100.
    """
    # views consist of whole pixel values, so this cuts rounding errors only
    pixels = (x * std + mean).clamp(0, 1)
    linear = torch.where(pixels > 0.04045, ((pixels + 0.055) / 1.055) ** 2.4, pixels / 12.92)
    r, g, b = linear.split(1, dim=1)
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b

    return torch.where(y > (6 / 29) ** 3, 116 * y ** (1 / 3) - 16, (29 / 3) ** 3 * y)
