"""What the network sees of an image: Sobel's gradients, CIE lightness; and that evaluation and
export see the same.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from kit import evals as evals_kit
from torch import Tensor, nn

from scaletrain.checkpoint import files
from scaletrain.config import load
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import DataConfig, ModelConfig
from scaletrain.core import Backbone
from scaletrain.evals.encoders import targets
from scaletrain.nn import backbone, inputs

MEAN, STD = (0.3, 0.45, 0.6), (0.2, 0.25, 0.3)


def network(kind: str) -> Backbone:
    data = DataConfig(mean=MEAN, std=STD)
    return backbone.build(ModelConfig(name="resnet18", width=0.125, input=kind), data)  # type: ignore[arg-type]


def shown(net: nn.Module, x: Tensor) -> Tensor:
    """What the first layer is given."""
    seen: list[Tensor] = []
    net.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[union-attr,operator]
    net(x)
    return seen[0]


@pytest.mark.parametrize("kind", ["sobel", "lightness"])
def test_names_and_shapes_stay_torchvisions(kind: str) -> None:
    one, other = (
        {name: t.shape for name, t in network(which).state_dict().items()}
        for which in (kind, "rgb")
    )
    assert one == other


def test_sobel_shows_the_gradients_of_the_grey_image() -> None:
    """Across and down, pixel by pixel."""
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = shown(network("sobel").double(), x)
    grey = x.mean(1)
    for n, row, column in ((0, 1, 2), (1, 30, 17)):
        patch = grey[n, row - 1 : row + 2, column - 1 : column + 2]
        across = sum(w * (patch[i, 0] - patch[i, 2]).item() for i, w in enumerate((1, 2, 1)))
        down = sum(w * (patch[0, i] - patch[2, i]).item() for i, w in enumerate((1, 2, 1)))
        assert seen[n, :, row, column].tolist() == pytest.approx([across, down, 0], abs=1e-12)


def test_sobel_is_exact_beside_bfloat16() -> None:
    """On a bright ramp the gradients are small differences of large numbers."""
    ramp = (100 + torch.arange(32.0) / 64).expand(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        seen = inputs.Sobel()(ramp)
    assert seen[0, 0, 5, 5].item() == pytest.approx(-8 / 64)


@pytest.mark.parametrize("half", [False, True])
def test_lightness_is_opencvs(half: bool) -> None:
    """Of all grey levels and random colours, normalised by an unusual mean and std; within .25."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    pixels[:8] = np.arange(256, dtype=np.uint8).reshape(8, 32, 1)
    expected = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[..., 0]
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        seen = shown(network("lightness"), (images - mean) / std)

    assert seen.shape == (1, 3, 32, 32)
    assert torch.equal(seen[:, 0], seen[:, 2])
    found = 50 + 100 * seen[0, 1]
    assert (found - torch.from_numpy(expected)).abs().max() < 0.25
    assert 0 <= found.min() < found.max() <= 100.01


def test_lightness_needs_to_know_the_normalisation() -> None:
    with pytest.raises(ValueError, match=r"model\.input=lightness needs the mean and std"):
        backbone.build(ModelConfig(name="resnet18", input="lightness"))


def test_evaluation_and_export_see_what_training_saw(tmp_path: Path) -> None:
    cfg = evals_kit.settings("data", input="lightness")
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"mean": MEAN, "std": STD})})
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(load.dump(cfg))
    trained = backbone.build(cfg.model, cfg.data).eval()
    evals_kit.save(run, 7, trained.state_dict())
    files.export(trained.state_dict(), tmp_path / "a.safetensors", targets.describe(cfg, 7))
    x = torch.randn(2, 3, 16, 16)
    for place in (run, tmp_path / "a.safetensors"):
        torch.testing.assert_close(targets.find(place).module(x), trained(x))


@pytest.mark.parametrize("sobel", [False, True])
def test_earlier_runs_and_files_keep_their_input(sobel: bool, tmp_path: Path) -> None:
    """`model.sobel` is what `model.input` was."""
    cfg = evals_kit.settings("data", input="sobel" if sobel else "rgb")
    before = load.dump(cfg).replace(f"input: {cfg.model.input}", f"sobel: {str(sobel).lower()}")
    assert "sobel: " in before
    (tmp_path / "config.yaml").write_text(before)
    assert load.load(tmp_path / "config.yaml") == cfg

    about = targets.describe(cfg, 7)
    model = json.loads(about["model"])
    del model["input"]
    about["model"] = json.dumps({**model, "sobel": sobel})
    files.export(backbone.build(cfg.model).state_dict(), tmp_path / "a.safetensors", about)
    assert targets.find(tmp_path / "a.safetensors").model == cfg.model


def test_recipes_and_overrides_use_the_present_key(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, overrides in (("model: {sobel: true}\n", []), ("seed: 1\n", ["model.sobel=true"])):
        recipe.write_text(text)
        with pytest.raises(ConfigError, match=r"'model\.sobel'; it was renamed to 'model\.input'"):
            load.load(recipe, overrides)
