"""The networks against torchvision's and timm's with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from scaletrain import checkpoint
from scaletrain.config import ConfigError, Model
from scaletrain.nn import resnet


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_outputs_equal_torchvision_and_timm_with_exported_weights(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = resnet.build(Model(name=name))
    ours(torch.randn(4, 3, 64, 64))  # move the running statistics off their start
    for module in ours.modules():
        if hasattr(module, "commit"):
            module.commit()
    checkpoint.export(ours.state_dict(), tmp_path / "encoder.safetensors", {"model": name})
    tensors, _ = checkpoint.load_file(tmp_path / "encoder.safetensors")
    theirs = getattr(torchvision.models, name)()
    theirs.fc = nn.Identity()
    third = timm.create_model(name, num_classes=0)
    x = torch.randn(2, 3, 64, 64)
    expected = ours.eval()(x)
    assert expected.shape == (2, ours.features)
    for model in (theirs, third):
        model.load_state_dict(tensors, strict=True)
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-5)


def test_training_gradients_equal_torchvision() -> None:
    torch.manual_seed(0)
    ours = resnet.build(Model(name="resnet18")).double()
    theirs = torchvision.models.resnet18().double()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_width_multiplies_every_stage_and_the_stem() -> None:
    narrow = resnet.build(Model(name="resnet18", width=0.25, stem="cifar"))
    assert narrow.conv1.weight.shape == (16, 3, 3, 3)
    assert [narrow.get_submodule(f"layer{i}")[-1].conv2.out_channels for i in range(1, 5)] == [16, 32, 64, 128]  # type: ignore[index]
    assert narrow.features == 128
    assert narrow(torch.randn(2, 3, 32, 32)).shape == (2, 128)


def test_zero_init_and_unknown_names() -> None:
    net = resnet.build(Model(name="resnet18", zero_init=True))
    assert all(not block.bn2.weight.any() for stage in (net.layer1, net.layer4) for block in stage)  # type: ignore[union-attr,operator]
    with pytest.raises(ConfigError, match="no 'resnet19'"):
        resnet.build(Model(name="resnet19"))
