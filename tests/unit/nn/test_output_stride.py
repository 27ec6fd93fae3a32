"""Dilated ResNets: the weights of stride 32 at a smaller output stride, and what encoders say of
their stride.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import ModelConfig
from scaletrain.nn import backbone
from scaletrain.nn.norm import BatchNorm


def feature_map(
    state: dict[str, Tensor] | None, x: Tensor, **options: Any
) -> tuple[dict[str, Tensor], Tensor, int]:
    """The weights, the map in evaluation mode, and the stride that the network declares."""
    torch.manual_seed(0)
    net = backbone.unpooled(backbone.build(ModelConfig(width=0.125, **options))).double()
    for module in net.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    if state:
        net.load_state_dict(state)
    with torch.no_grad():
        return net.state_dict(), net.eval()(x), net.stride


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("side", [64, 72])
def test_a_smaller_stride_refines_the_map_of_the_same_weights(name: str, side: int) -> None:
    """Every second or fourth cell is that of the network without dilation, whose kernels see the
    same pixels (Yu and Koltun, 2016, arXiv 1511.07122); those in between are new.
    """
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    state, coarse, stride = feature_map(None, x, name=name)
    assert stride == 32
    assert coarse.shape[-1] == -(-side // 32)
    for wanted in (16, 8):
        _, fine, stride = feature_map(state, x, name=name, output_stride=wanted)
        assert stride == wanted
        assert fine.shape[-1] == -(-side // wanted)
        step = 32 // wanted
        torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(fine[..., 1::step, ::step][..., :2, :], coarse[..., :2, :])


def test_the_cifar_stem_has_a_stride_of_8() -> None:
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for output_stride in (32, 8):
        _, found, stride = feature_map(
            None, x, name="resnet18", stem="cifar", output_stride=output_stride
        )
        assert (found.shape[-1], stride) == (4, 8)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stem": "cifar", "output_stride": 16}, r"output_stride=16 is more than the 8 of"),
        ({"name": "resnet50", "sk": True, "output_stride": 8}, r"output_stride=8 needs plain conv"),
        ({"name": "timm/resnet18", "output_stride": 8}, r"output_stride=8 is for our own ResNets"),
        ({"name": "timm/resnet18", "input": "sobel"}, r"input=sobel is for our own ResNets"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        backbone.build(ModelConfig(**{"name": "resnet18", **options}))


@pytest.mark.parametrize("name", ["resnet10t", "regnetx_002", "convnext_atto"])
def test_networks_of_timm_say_their_stride(name: str) -> None:
    net: Any = backbone.build(ModelConfig(name=f"timm/{name}")).eval()
    with torch.no_grad():
        assert net.forward_features(torch.randn(1, 3, 64, 64)).shape[-1] == 64 // net.stride


def momenta(**options: Any) -> set[float]:
    net = backbone.build(ModelConfig(**options))
    return {m.momentum for m in net.modules() if isinstance(m, BatchNorm)}


def test_the_momentum_of_norms_can_be_set() -> None:
    usual = {"name": "timm/tf_mobilenetv3_small_minimal_100"}
    assert momenta(name="resnet18", width=0.125) == {0.1}
    assert momenta(name="resnet18", width=0.125, norm_momentum=0.003) == {0.003}
    assert 0.003 not in momenta(**usual)
    assert momenta(**usual, norm_momentum=0.003) == {0.003}
