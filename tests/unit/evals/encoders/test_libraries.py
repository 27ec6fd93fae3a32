"""Networks of torchvision and timm, with random weights or those of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from kit.evals import shards
from torch import nn
from torchvision import models

from scaletrain.config.recipe import ConfigError
from scaletrain.evals.encoders.encoder import EncoderConfig
from scaletrain.evals.encoders.targets import find
from scaletrain.evals.errors import EvalError
from scaletrain.evals.run import run

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SEVEN = EncoderConfig(seed=7)


def theirs(name: str, seed: int) -> nn.Module:
    """A network of torchvision, with other running statistics than the initial ones."""
    torch.manual_seed(seed)
    net = models.get_model(name, weights=None)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def test_random_weights_are_those_of_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tv").mkdir()
    torch.manual_seed(7)
    net = models.resnet18().eval()
    net.fc = nn.Identity()

    before = torch.get_rng_state()
    encoder = find("tv/resnet18", config=SEVEN)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(encoder.module(IMAGES), net(IMAGES))
    assert (encoder.kind, encoder.step, encoder.seed) == ("untrained", 0, 7)
    assert (encoder.size, encoder.data.mean) == (224, (0.485, 0.456, 0.406))
    assert (encoder.home, encoder.run, encoder.name) == (Path("results"), None, "tv-resnet18")
    assert "seed 7" in encoder.about
    assert find("tv/resnet18", "untrained", SEVEN).identity == encoder.identity
    assert find("tv/resnet18").weights != encoder.weights
    assert find("tv/resnet18", "pixels").size == 32


@pytest.mark.parametrize("form", ["plain", "wrapped"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_weights_of_a_file(tmp_path: Path, name: str, form: str) -> None:
    net = theirs(name, 5)
    state = net.state_dict()
    content = (
        state
        if form == "plain"
        else {"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    )
    torch.save(content, tmp_path / "weights.pth")
    encoder = find(f"tv/{name}:{tmp_path / 'weights.pth'}")

    head = "fc" if name == "resnet18" else "classifier.1"
    net.set_submodule(head, nn.Identity())
    assert torch.equal(encoder.module(IMAGES), net(IMAGES))
    assert (encoder.kind, encoder.home) == ("trained", tmp_path)
    assert encoder.name == f"tv-{name}-weights"
    assert "left out" in encoder.about
    assert head.partition(".")[0] in encoder.about


def test_timm_with_and_without_a_file(tmp_path: Path) -> None:
    torch.manual_seed(5)
    net = timm.create_model("resnet18", num_classes=10).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    encoder = find(f"timm/resnet18:{tmp_path / 'weights.pth'}")
    net.reset_classifier(0)
    torch.testing.assert_close(encoder.module(IMAGES), net(IMAGES))
    assert "fc" in encoder.about
    fresh = find("timm/resnet18", config=SEVEN)
    assert (fresh.kind, fresh.name, fresh.data.std) == (
        "untrained",
        "timm-resnet18",
        (0.229, 0.224, 0.225),
    )


def test_a_file_of_another_network(tmp_path: Path) -> None:
    torch.save(theirs("resnet34", 0).state_dict(), tmp_path / "a.pth")
    with pytest.raises(EvalError, match=r"a\.pth: does not fit the model.*'layer1\.2\.conv1"):
        find(f"tv/resnet18:{tmp_path / 'a.pth'}")
    with pytest.raises(EvalError, match="holds no encoder"):
        find(f"tv/mobilenet_v2:{tmp_path / 'a.pth'}")


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("tv/resnet51", "no such classifier.*'resnet50'"),
        ("tv/fcn_resnet50", "no such classifier"),
        ("tv/inception_v3", "another normalisation"),
        ("tv/squeezenet1_0", "no linear layer"),
        ("timm/resnet51", "timm has no 'resnet51'"),
        ("timm/hf-hub:some/where", "timm has no 'hf-hub'"),
    ],
)
def test_networks_that_cannot_be_used(target: str, text: str) -> None:
    with pytest.raises((EvalError, ConfigError), match=text):
        find(target)


def test_normalisation_of_the_user() -> None:
    config = EncoderConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    encoder = find("tv/resnet18", config=config)
    assert (encoder.data.mean, encoder.data.std) == (config.mean, config.std)
    assert encoder.identity != find("tv/resnet18").identity


def test_an_evaluation_of_a_network_of_torchvision(tmp_path: Path) -> None:
    """From the command's target to a result, with settings of the encoder in its identity."""
    train, test = shards(tmp_path / "train", [0, 1] * 6), shards(tmp_path / "test", [0, 1] * 3, 1)

    def evaluated(*overrides: str) -> dict[str, Any]:
        return run(
            "tv/resnet18",
            ["knn"],
            train=train,
            test=test,
            overrides=("features.size=32", "features.workers=0", "knn.ks=[1]", *overrides),
            results=tmp_path / "results",
            notice=print,
        )[0]

    plain, seeded = evaluated(), evaluated("encoder.seed=3")
    file = Path(plain["file"])
    assert file.parent == tmp_path / "results"
    assert file.name.startswith("tv-resnet18-knn@")
    assert "-step-0-untrained-" in file.name
    assert plain["digest"] != seeded["digest"]
    assert evaluated()["file"] == plain["file"]
