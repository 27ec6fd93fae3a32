"""The networks against torchvision's and timm's with the same weights, and their sizes against the
papers'.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from scaletrain.checkpoint import files
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import ModelConfig
from scaletrain.core import DeferredState
from scaletrain.nn import backbone, resnet

DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

# Millions of parameters: ReLICv2 (arXiv 2201.05119), and table 1 of SimCLRv2 (arXiv 2006.10029),
# which also has the former's.
RELICV2 = {
    ("resnet50", 1): 24,
    ("resnet50", 2): 94,
    ("resnet50", 4): 375,
    ("resnet101", 1): 43,
    ("resnet152", 1): 58,
    ("resnet200", 1): 63,
    ("resnet200", 2): 250,
    ("resnet295", 1): 87,
}
SIMCLRV2 = {
    ("resnet50", 1): (24, 35),  # without and with selective kernels
    ("resnet50", 2): (94, 140),
    ("resnet101", 1): (43, 65),
    ("resnet101", 2): (170, 257),
    ("resnet152", 1): (58, 89),
    ("resnet152", 2): (233, 354),
    ("resnet152", 3): (None, 795),
}


def commit(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, DeferredState):
            module.commit()


def numbers(name: str, width: float, sk: bool = False) -> tuple[int, int]:
    """Parameters, and running statistics."""
    with torch.device("meta"):
        model = backbone.build(ModelConfig(name=name, width=width, sk=sk))
    buffers = (b for b in model.buffers() if b.is_floating_point())
    return sum(p.numel() for p in model.parameters()), sum(b.numel() for b in buffers)


@pytest.mark.parametrize("name", DEPTHS)
def test_names_and_shapes_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = resnet.ResNet(ModelConfig(name=name)), getattr(torchvision.models, name)()
    theirs.fc = nn.Identity()
    shapes = [{key: x.shape for key, x in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


# one of each block: what is deeper is made of the same
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_outputs_equal_torchvision_and_timm_with_exported_weights(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    ours = resnet.ResNet(ModelConfig(name=name))
    ours(torch.randn(8, 3, 32, 32))  # move the running statistics off their start
    commit(ours)
    files.export(ours.state_dict(), tmp_path / "encoder.safetensors", {"model": name})
    tensors, _ = files.load_file(tmp_path / "encoder.safetensors")
    theirs = getattr(torchvision.models, name)()
    theirs.fc = nn.Identity()
    third = timm.create_model(name, num_classes=0)
    x = torch.randn(2, 3, 48, 48)
    expected = ours.eval()(x)
    assert expected.shape == (2, ours.features)
    for model in (theirs, third):
        model.load_state_dict(tensors, strict=True)
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training_equals_torchvision(name: str) -> None:
    """Outputs, gradients and running statistics of a step in train mode, in float64."""
    torch.manual_seed(0)
    ours = resnet.ResNet(ModelConfig(name=name)).double()
    theirs = getattr(torchvision.models, name)().double()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    outputs = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-8)
    for y in outputs:
        y.square().mean().backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-8, msg=key)
    commit(ours)
    for (key, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize(("name", "width"), RELICV2)
def test_parameters_are_the_relicv2_papers(name: str, width: int) -> None:
    assert round(numbers(name, width)[0] / 1e6) == RELICV2[name, width]


@pytest.mark.parametrize(("name", "width"), SIMCLRV2)
def test_parameters_are_the_simclrv2_papers(name: str, width: int) -> None:
    """Its figures include the running statistics: without them, ResNet-152 at 2x would be 232 and
    353 million.
    """
    for sk, published in enumerate(SIMCLRV2[name, width]):
        assert published in (None, round(sum(numbers(name, width, bool(sk))) / 1e6))


def test_resnet295_has_295_convolutions() -> None:
    """The stem and three a block; the projections of the shortcuts are not counted as layers."""
    with torch.device("meta"):
        net = resnet.ResNet(ModelConfig(name="resnet295"))
    convolutions = [
        key
        for key, module in net.named_modules()
        if isinstance(module, nn.Conv2d) and "downsample" not in key
    ]
    assert len(convolutions) == 295


def test_width_multiplies_every_stage_and_the_stem() -> None:
    narrow = resnet.ResNet(ModelConfig(name="resnet18", width=0.25, stem="cifar"))
    assert narrow.conv1.weight.shape == (16, 3, 3, 3)
    assert [narrow.get_submodule(f"layer{i}")[-1].conv2.out_channels for i in range(1, 5)] == [
        16,
        32,
        64,
        128,
    ]  # type: ignore[index]
    assert narrow.features == 128
    assert narrow(torch.randn(2, 3, 32, 32)).shape == (2, 128)


def test_zero_init_and_what_does_not_fit() -> None:
    net = resnet.ResNet(ModelConfig(name="resnet18", zero_init=True))
    assert all(not block.bn2.weight.any() for stage in (net.layer1, net.layer4) for block in stage)  # type: ignore[union-attr,operator]
    wrong: list[tuple[dict[str, object], str]] = [
        ({"name": "resnet19"}, r"there is no 'resnet19'; known: resnet10, .*resnet295, timm/NAME"),
        ({"name": "resnet34", "sk": True}, r"model\.sk needs .* resnet50 or deeper"),
        ({"name": "resnet50", "width": 0.001}, r"model\.width=0\.001 leaves no channel"),
        ({"name": "resnet50", "width": 1 / 64, "sk": True}, r"leaves no channel"),
    ]
    for options, text in wrong:
        with pytest.raises(ConfigError, match=text):
            resnet.ResNet(ModelConfig(**options))
