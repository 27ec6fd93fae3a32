"""Selective kernels against a transcription of the formulas of SimCLRv2's network, written
channels-last as its code is.

Source: google-research/simclr, tf2/resnet.py. The batch norms run in eval mode with given
statistics.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from scaletrain.config.schema import ModelConfig
from scaletrain.nn import resnet
from scaletrain.nn.norm import BatchNorm, per_view

State = Mapping[str, Tensor]


def convolve(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """[N, H, W, C] with the edges padded by zeros before striding, the kernel's side less one in
    all.
    """
    side = kernel.shape[-1]
    before, after = (side - 1) // 2, side - 1 - (side - 1) // 2
    padded = torch.zeros(
        len(x), x.shape[1] + side - 1, x.shape[2] + side - 1, x.shape[3], dtype=x.dtype
    )
    padded[:, before : padded.shape[1] - after, before : padded.shape[2] - after] = x
    patches = padded.unfold(1, side, stride).unfold(2, side, stride)  # [N, H', W', C, side, side]
    return torch.einsum("nhwcij,ocij->nhwo", patches, kernel)


def normalise(x: Tensor, s: State, name: str) -> Tensor:
    mean, var, scale, shift = (
        s[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def average(x: Tensor, stride: int) -> Tensor:
    """2x2 windows. Stride 1: pixels past the edge are left out of the mean; stride 2: they are
    zeros within it.
    """
    count = torch.ones_like(x)
    x, count = (torch.cat([t, torch.zeros_like(t[:, :1])], 1) for t in (x, count))
    x, count = (torch.cat([t, torch.zeros_like(t[:, :, :1])], 2) for t in (x, count))
    sums, pixels = (t.unfold(1, 2, stride).unfold(2, 2, stride).sum((-1, -2)) for t in (x, count))
    return sums / (pixels if stride == 1 else 4)


def block(x: Tensor, s: State, stride: int) -> Tensor:
    short = x
    if "downsample.1.weight" in s:
        short = normalise(convolve(average(x, stride), s["downsample.1.weight"]), s, "downsample.2")
    y = normalise(convolve(x, s["conv1.weight"]), s, "bn1").relu()
    y = normalise(convolve(y, s["conv2.weight"], stride), s, "bn2").relu()
    first, second = y.chunk(2, -1)
    context = (first + second).mean((1, 2), keepdim=True)
    context = normalise(convolve(context, s["select.conv1.weight"]), s, "select.bn1").relu()
    a, b = convolve(context, s["select.conv2.weight"]).chunk(2, -1)
    share = 1 / (1 + (b - a).exp())  # softmax of two
    y = normalise(convolve(first * share + second * (1 - share), s["conv3.weight"]), s, "bn3")
    return (y + short).relu()


def stem(x: Tensor, s: State) -> Tensor:
    x = normalise(convolve(x, s["conv1.0.weight"], 2), s, "conv1.1").relu()
    x = normalise(convolve(x, s["conv1.3.weight"]), s, "conv1.4").relu()
    x = normalise(convolve(x, s["conv1.6.weight"]), s, "bn1").relu()
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1), value=-torch.inf)
    return padded.unfold(1, 3, 2).unfold(2, 3, 2).amax((-1, -2))


def network(width: float) -> resnet.ResNet:
    torch.manual_seed(0)
    net = resnet.ResNet(ModelConfig(name="resnet50", width=width, sk=True)).double()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    return net


@pytest.mark.parametrize("size", [64, 56])  # 56: the stages see odd sides
def test_the_network_is_simclrv2s(size: int) -> None:
    net = network(0.125).eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    y = stem(x.permute(0, 2, 3, 1), net.state_dict())
    for stage in range(1, 5):
        for i, layer in enumerate(net.get_submodule(f"layer{stage}").children()):
            y = block(y, layer.state_dict(), 2 if stage > 1 and i == 0 else 1)
    torch.testing.assert_close(net(x), y.mean((1, 2)), rtol=1e-9, atol=1e-9)


def test_widths_of_the_selection() -> None:
    """A sixteenth of the channels, but 32 at least; two kernels in one convolution."""
    with torch.device("meta"):
        net = resnet.ResNet(ModelConfig(name="resnet50", width=2, sk=True))
    last = [net.get_submodule(f"layer{i}.0") for i in range(1, 5)]
    assert [layer.get_parameter("select.conv1.weight").shape[0] for layer in last] == [
        32,
        32,
        32,
        64,
    ]
    assert [layer.get_parameter("conv2.weight").shape[0] for layer in last] == [
        256,
        512,
        1024,
        2048,
    ]
    assert net.get_parameter("conv1.0.weight").shape == (64, 3, 3, 3)
    assert net.get_parameter("conv1.6.weight").shape == (128, 64, 3, 3)


def test_a_cifar_stem_keeps_its_single_convolution() -> None:
    net = resnet.ResNet(ModelConfig(name="resnet50", width=0.125, sk=True, stem="cifar"))
    assert net.get_parameter("conv1.weight").shape == (8, 3, 3, 3)
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 256)


def test_views_keep_their_own_statistics_within_the_selection() -> None:
    net = network(0.125)
    x = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    together = per_view(net, x)
    torch.testing.assert_close(
        together, torch.stack([net(view) for view in x]), rtol=1e-9, atol=1e-9
    )
    norms = [module for module in net.modules() if isinstance(module, BatchNorm)]
    assert all(len(norm.staged) == 3 for norm in norms)
