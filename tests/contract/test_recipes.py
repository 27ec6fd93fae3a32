"""Every recipe loads, holds the values that its source gives, and takes two real steps in miniature."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from scaletrain import checkpoint
from scaletrain import config as configuration
from scaletrain.config import Config
from scaletrain.data.errors import DataError
from scaletrain.optim import schedule
from scaletrain.train import build, train

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
METHODS = ("byol", "deepcluster_v2", "relicv2", "simclr", "swav")
BATCH, SAMPLES = 12, 24  # more than ReLICv2's ten negatives; two steps per epoch
SMALL = {"hidden": 16, "dim": 8, "prototypes": 6, "clusters": [6, 5, 4], "queue": 2 * BATCH}

# batch, epochs, learning rate at the first step, at its peak and after the last step, weight decay
PUBLISHED = {
    "byol_r50_in1k": (4096, 1000, 0.0, 3.2, 0.0, 1.5e-6),
    "simclr_r50_in1k": (4096, 1000, 0.0, 4.8, 0.0, 1e-6),
    "swav_r50_in1k": (4096, 800, 0.3, 4.8, 0.0048, 1e-6),
    "deepcluster_v2_r50_in1k": (4096, 800, 0.3, 4.8, 0.0048, 1e-6),
    "relicv2_r50_in1k": (4096, 1000, 0.0, 4.8, 0.0, 1.5e-6),
    "byol_r18_cifar10": (256, 1000, 0.0, 1.0, 0.0, 1e-5),
    "simclr_r18_cifar10": (512, 1000, 0.0, 2.0, 0.0, 1e-4),
    "swav_r18_cifar10": (256, 1000, 0.0, 0.6, 0.0, 1e-6),
    "deepcluster_v2_r18_cifar10": (256, 1000, 0.0, 0.6, 0.0006, 1e-6),
    "relicv2_r18_cifar10": (256, 1000, 0.0, 1.0, 0.0, 1e-5),
}


def recipe(name: str, *overrides: str) -> Config:
    return configuration.load(CONFIGS / f"{name}.yaml", overrides)


def shrunken(name: str) -> Config:
    """The recipe with all its options and views, smaller in everything that only costs time."""
    full = recipe(name)
    sides = dict(zip(sorted({view.size for view in full.data.views}, reverse=True), (16, 8), strict=False))
    method = full.method.model_dump()
    return recipe(
        name,
        *(f"method.{key}={value}" for key, value in SMALL.items() if method.get(key)),
        *(f"data.views.{i}.size={sides[view.size]}" for i, view in enumerate(full.data.views)),
        f"batch={BATCH}",
        f"data.synthetic_samples={SAMPLES}",
        *("data.path=synthetic", "data.lanes=4", "data.workers=0", "model.name=resnet18", "model.width=0.125"),
        *("steps=2", "optim.warmup_epochs=0", "monitor.every=1", "threads=1"),
    )


def test_every_method_has_its_recipes() -> None:
    assert {f"{method}_{setting}" for method in METHODS for setting in ("r50_in1k", "r18_cifar10")} == set(PUBLISHED)
    assert set(RECIPES) == {*PUBLISHED, "demo_fashion_mnist"}


@pytest.mark.parametrize("name", RECIPES)
def test_head_comment(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    head = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert f"python launchers/local.py --procs {'8' if 'in1k' in name else '2'} configs/{name}.yaml data.path=" in head
    assert "Values: " in head
    assert name not in PUBLISHED or ("Published: " in head and "Not measured here" in head)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedule(name: str) -> None:
    config = recipe(name)
    per_epoch = (1_281_167 if "in1k" in name else 50_000) // config.batch
    total = int(config.epochs) * per_epoch
    warmup = round(config.optim.warmup_epochs * per_epoch)
    rates = [schedule.lr(config.optim, config.batch, step, per_epoch, total) for step in (0, warmup, total)]
    assert (config.batch, config.epochs, *rates, config.optim.weight_decay) == pytest.approx(PUBLISHED[name])
    assert config.optim.warmup_epochs == (11 if name == "deepcluster_v2_r18_cifar10" else 10)
    assert (config.model.name, config.model.stem) == (("resnet50", "imagenet") if "in1k" in name else ("resnet18", "cifar"))
    assert config.data.path == ""


def test_simclr_sees_pixels_between_0_and_1() -> None:
    for name in ("simclr_r50_in1k", "simclr_r18_cifar10"):
        data = recipe(name).data
        assert (data.mean, data.std) == ((0, 0, 0), (1, 1, 1))


def test_lars_variants() -> None:
    def variant(name: str) -> tuple[object, ...]:
        optim = recipe(name).optim
        return optim.trust, optim.trust_clip, optim.lars_norm, optim.lars_momentum, optim.exclude

    jax, tf, larc = ("sum", "outside", "norm_bias"), ("sum", "inside", "norm_bias"), ("parts", "outside", "none")
    assert variant("byol_r50_in1k") == variant("relicv2_r50_in1k") == (1e-3, False, *jax)
    assert variant("simclr_r50_in1k") == variant("simclr_r18_cifar10") == (1e-3, False, *tf)
    assert variant("swav_r50_in1k") == variant("deepcluster_v2_r50_in1k") == (1e-3, False, *larc)
    for method in ("byol", "swav", "deepcluster_v2", "relicv2"):
        assert variant(f"{method}_r18_cifar10") == (0.02, True, "parts", "outside", "ndim1")


def test_byol_and_relicv2_views() -> None:
    first, second = recipe("byol_r50_in1k").data.views
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1, 0, 0.1, 0.2)
    assert first.model_copy(update={"blur": 0.1, "solarize": 0.2}) == second
    views = recipe("relicv2_r50_in1k").data.views
    assert [(v.size, v.area, v.blur, v.solarize) for v in views] == [  # Table 16: odd, even, odd, even; odd, even
        *[(224, (0.14, 1), 0.1, 0.2), (224, (0.08, 1), 1, 0)] * 2,
        *[(96, (0.05, 0.14), 0.1, 0.2), (96, (0.08, 1), 1, 0)],
    ]
    for view in (first, second, *views):
        assert (view.interpolation, view.antialias, view.crop, view.flip, view.jitter) == ("bicubic", False, 1, 0.5, 0.8)
        assert (view.brightness, view.contrast, view.saturation, view.hue, view.grayscale) == (0.4, 0.4, 0.2, 0.1, 0.2)


def test_multicrop_views() -> None:
    for name in ("swav_r50_in1k", "deepcluster_v2_r50_in1k"):
        views = recipe(name).data.views
        assert [(v.size, v.count, v.area) for v in views] == [(224, 2, (0.14, 1)), (96, 6, (0.05, 0.14))]
        for view in views:
            assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.8, 0.8, 0.8, 0.2)
            # in pixels of the view, whatever its size
            assert [s * view.size / 224 for s in view.sigma] == pytest.approx([0.1, 2], rel=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps(name: str, tmp_path: Path) -> None:
    config = shrunken(name)
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(math.isfinite(line["train/loss"]) and not line["steps/skipped"] for line in lines)
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.step == 2
    fresh = build(config, SAMPLES, SAMPLES // BATCH, torch.device("cpu")).method.state_dict()
    weights = "backbone.layer4.0.conv2.weight"
    assert not torch.equal(saved.read(f"method.{weights}").view_as(fresh[weights]), fresh[weights])


def test_a_recipe_without_data_says_how_to_name_it(tmp_path: Path) -> None:
    name = "simclr_r18_cifar10"
    with pytest.raises(DataError, match=r"data\.path is empty: add data\.path=FOLDER"):
        train(recipe(name), tmp_path / "run")
    train(shrunken(name), tmp_path / "run")  # the refused start does not stand in the way
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None
