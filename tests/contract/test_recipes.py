"""Every recipe loads, has the values that its source gives, and takes two real steps in miniature.
Schedules are compared with their sources in tests/golden.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import small

from scaletrain.checkpoint import reader
from scaletrain.config import load
from scaletrain.config import schema as configuration
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import ComponentConfig, Config
from scaletrain.data.errors import DataError
from scaletrain.data.loading.sources import open_plan
from scaletrain.optim import schedule
from scaletrain.train import records
from scaletrain.train.build import build, total_steps
from scaletrain.train.loop import train

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
# One recipe of each method and kind of model: widths, depths and lengths run the same code.
KINDS = {re.sub(r"_r\d+(x\d)?|_\d+ep$", "", name): name for name in reversed(RECIPES)}.values()
METHODS = configuration.components("methods")
BATCH, SAMPLES = 12, 24  # more than ReLICv2's ten negatives; two steps per epoch

# shrunken to bottlenecks; the others to basic blocks
BOTTLENECKS = ("relicv2_r50_in1k", "simclrv2_r50sk_in1k", "simclrv2_r152x3sk_in1k")


@functools.cache
def recipe(name: str, *overrides: str) -> Config:
    return load.load(CONFIGS / f"{name}.yaml", overrides)


def smaller(method: ComponentConfig) -> list[str]:
    """Overrides that give the sizes of a method the values of its miniature, where these are
    smaller, and options that a recipe leaves to the user.
    """

    def size(value: object) -> bool:
        return isinstance(value, int | tuple) and not isinstance(value, bool)

    return [
        f"method.{key}={list(value) if isinstance(value, tuple) else value}"
        for key, value in method.miniature.items()
        if getattr(method, key) == "" or (size(value) and value < getattr(method, key))
    ]


def shrunken(name: str) -> Config:
    """The recipe with all its options and views, smaller in everything that only costs time."""
    full = recipe(name)
    sides = dict(
        zip(sorted({view.size for view in full.data.views}, reverse=True), (16, 8), strict=False)
    )
    return recipe(
        name,
        *smaller(full.method),
        *(f"data.views.{i}.size={sides[view.size]}" for i, view in enumerate(full.data.views)),
        *(("data.support.classes=3", "data.support.per_class=4") if full.data.support else ()),
        f"batch={BATCH}",
        *((f"model.norm_group={BATCH // 2}",) if full.model.norm_group else ()),
        f"data.synthetic_samples={SAMPLES}",
        *("data.path=synthetic", "data.lanes=4", "data.workers=0"),
        *(
            ("model.name=resnet50", "model.width=0.0625")
            if name in BOTTLENECKS
            else ("model.name=resnet10", "model.width=0.125")
        ),
        *("steps=2", "optim.warmup_epochs=0", "monitor.every=1", "threads=1"),
    )


def head_of(name: str) -> str:
    text = (CONFIGS / f"{name}.yaml").read_text()
    return " ".join(
        line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")
    )


def network(name: str) -> tuple[str, float, bool, str]:
    """What a recipe's name says: `relicv2_r200x2_in1k` is ResNet-200 at twice the width."""
    found = re.search(r"_r(\d+)(?:x(\d))?(sk)?_(in1k|cifar10|jft)", name)
    assert found
    depth, width, sk, data = found.groups()
    return (
        f"resnet{depth}",
        float(width or 1),
        bool(sk),
        "cifar" if data == "cifar10" else "imagenet",
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_recipe(method: str) -> None:
    """And one that pretrains, for ImageNet and for CIFAR-10."""
    found = {name for name in RECIPES if recipe(name).method.name == method}
    assert found
    if small.pretrains(method):
        assert {f"{method}_r50_in1k", f"{method}_r18_cifar10"} <= found


@pytest.mark.parametrize("name", RECIPES)
def test_head_comment(name: str) -> None:
    head = head_of(name)
    small = name.endswith(("_cifar10", "_mnist"))
    command = f"python launchers/{'local.py --procs 2' if small else 'slurm.py --nodes 8 --config'}"
    assert f"{command} configs/{name}.yaml data.path=" in head
    assert "Values: " in head


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_is_published(name: str) -> None:
    """And marks what was not read in the source itself."""
    published = recipe(name).published
    assert published or name == "demo_fashion_mnist"
    assert "not verified" in published or "recalled" not in published


@pytest.mark.parametrize("name", RECIPES)
def test_a_name_says_network_and_length(name: str) -> None:
    config = recipe(name)
    assert (config.data.path, config.steps) == ("", 0)
    if name != "demo_fashion_mnist":
        built = (config.model.name, config.model.width, config.model.sk, config.model.stem)
        assert built == network(name)
    if found := re.search(r"_(\d+)ep$", name):
        assert config.epochs == int(found[1])


def test_a_published_figure_is_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"base: {CONFIGS / 'byol_r50_in1k.yaml'}\nepochs: 3\n")
    assert load.load(tmp_path / "a.yaml").published == ""
    saved = recipe("byol_r50_in1k")
    (tmp_path / "config.yaml").write_text(load.dump(saved))
    assert load.load(tmp_path / "config.yaml") == saved


def test_a_run_resumes_with_another_published_figure(tmp_path: Path) -> None:
    config = shrunken("simclr_r18_cifar10")
    train(config, tmp_path / "run")
    longer = {"steps": 3, "published": "another figure"}
    with pytest.raises(ConfigError, match="steps: 2 -> 3") as refused:
        train(config.model_copy(update=longer), tmp_path / "run")
    assert "figure" not in str(refused.value)
    train(config.model_copy(update={"published": "another figure"}), tmp_path / "run")


def test_large_collections_are_counted_in_epochs_of_imagenet() -> None:
    """However large the collection: the schedule is that of the recipe for ImageNet."""
    config, usual = recipe("relicv2_r50_jft"), recipe("relicv2_r50_in1k")
    assert {key for key, *_ in load.diff(usual, config)} == {"data.epoch_samples"}
    assert config.data == usual.data.model_copy(update={"epoch_samples": 1_281_167})
    plan = open_plan(
        config.data.model_copy(update={"path": "synthetic", "synthetic_samples": 300_000_000}),
        seed=0,
        batch=config.batch,
    )
    total = total_steps(config, plan.steps_per_epoch)
    assert (plan.samples, plan.steps_per_epoch, total) == (300_000_000, 312, 312_000)
    rates = [
        schedule.lr(config.optim, config.batch, step, plan.steps_per_epoch, total)
        for step in (0, 3120, total)
    ]
    assert rates == pytest.approx([0, 4.8, 0], abs=1e-3)


def test_memories_of_every_sample_need_whole_epochs(tmp_path: Path) -> None:
    config = shrunken("deepcluster_v2_r50_in1k")
    virtual = config.model_copy(
        update={"data": config.data.model_copy(update={"epoch_samples": SAMPLES})}
    )
    with pytest.raises(
        ConfigError,
        match=r"deepcluster_v2 keeps every sample's embedding .* without data.mixture and "
        r"data.ep",
    ):
        train(virtual, tmp_path / "run")


def test_tau_follows_the_length() -> None:
    """The authors' presets for BYOL, and the best of ReLICv2's ablation at a short length."""
    taus = {
        ending: recipe(f"byol_r50_in1k{ending}").method.model_dump()["tau"]
        for ending in ("", "_100ep", "_200ep", "_300ep")
    }
    assert taus == {"": 0.996, "_100ep": 0.99, "_200ep": 0.99, "_300ep": 0.99}
    methods = [
        recipe(f"relicv2_r50_in1k{ending}").method.model_dump()
        for ending in ("", "_100ep", "_200ep")
    ]
    assert [(method["tau"], method["tau_end"]) for method in methods] == [
        (0.996, 1),
        (0.99, 0.99),
        (0.99, 0.99),
    ]


def test_a_variant_changes_nothing_else() -> None:
    def rest(name: str) -> dict[str, Any]:
        raw = recipe(name).model_dump(mode="json", exclude={"published"})
        del raw["model"]["name"], raw["model"]["width"]
        return raw

    for name in RECIPES:
        method = name.partition("_r")[0]
        if re.fullmatch(r"(byol|simclr|relicv2)_r\d+(x\d)?_in1k", name):
            assert rest(name) == rest(f"{method}_r50_in1k"), name
    assert rest("simclrv2_r152x3sk_in1k") == rest("simclrv2_r50sk_in1k")


def test_wide_swav_and_simclrv2() -> None:
    twice, four = (recipe(f"swav_{size}_in1k") for size in ("r50x2", "r50x4"))
    assert [(v.size, v.count, v.scale) for v in twice.data.views] == [
        (224, 2, (0.14, 1)),
        (96, 4, (0.05, 0.14)),
    ]
    assert [(v.size, v.count, v.scale) for v in four.data.views] == [
        (224, 2, (0.08, 1)),
        (96, 4, (0.08, 0.14)),
    ]
    for config, queue, first in ((twice, 0, 15), (four, 2560, 0)):
        method = config.method.model_dump()
        assert (
            method["hidden"],
            method["queue"],
            method["queue_epoch"],
            method["freeze_steps"],
        ) == (8192, queue, first, 313)
    method = recipe("simclrv2_r50sk_in1k").method.model_dump()
    assert (method["name"], method["layers"], method["dim"], method["temperature"]) == (
        "simclr",
        3,
        128,
        0.1,
    )


def test_simclr_sees_pixels_between_0_and_1() -> None:
    for name in ("simclr_r50_in1k", "simclr_r18_cifar10", "simclrv2_r50sk_in1k"):
        data = recipe(name).data
        assert (data.mean, data.std) == ((0, 0, 0), (1, 1, 1))


def test_lars_variants() -> None:
    def variant(name: str) -> tuple[object, ...]:
        optim = recipe(name).optim
        return (
            optim.trust_coefficient,
            optim.trust_clip,
            optim.lars_norm,
            optim.lars_momentum,
            optim.exclude,
        )

    jax, tf, larc = (
        ("sum", "outside", "norm_bias"),
        ("sum", "inside", "norm_bias"),
        ("parts", "outside", "none"),
    )
    assert variant("byol_r50_in1k") == variant("relicv2_r50_in1k") == (1e-3, False, *jax)
    for name in ("simclr_r50_in1k", "simclr_r18_cifar10", "c_simclr_r50_in1k", "c_byol_r50_in1k"):
        assert variant(name) == (1e-3, False, *tf)
    assert recipe("c_simclr_r50_in1k").model.zero_init
    assert recipe("c_byol_r50_in1k").model.zero_init
    assert variant("swav_r50_in1k") == variant("deepcluster_v2_r50_in1k") == (1e-3, False, *larc)
    for method in ("byol", "swav", "deepcluster_v2", "relicv2"):
        assert variant(f"{method}_r18_cifar10") == (0.02, True, "parts", "outside", "ndim1")


def test_byol_and_relicv2_views() -> None:
    first, second = recipe("byol_r50_in1k").data.views
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1, 0, 0.1, 0.2)
    assert first.model_copy(update={"blur": 0.1, "solarize": 0.2}) == second
    views = recipe("relicv2_r50_in1k").data.views
    assert [
        (v.size, v.scale, v.blur, v.solarize) for v in views
    ] == [  # Table 16: odd, even, odd, even; odd, even
        *[(224, (0.14, 1), 0.1, 0.2), (224, (0.08, 1), 1, 0)] * 2,
        *[(96, (0.05, 0.14), 0.1, 0.2), (96, (0.08, 1), 1, 0)],
    ]
    for view in (first, second, *views):
        assert (view.interpolation, view.antialias, view.crop, view.flip, view.jitter) == (
            "keys",
            False,
            1,
            0.5,
            0.8,
        )
        assert (view.brightness, view.contrast, view.saturation, view.hue, view.grayscale) == (
            0.4,
            0.4,
            0.2,
            0.1,
            0.2,
        )


def test_cifar_views() -> None:
    """Of VICReg and SimSiam in solo-learn, and of DirectPred in luckmatters."""
    fields = (
        "scale",
        "brightness",
        "contrast",
        "saturation",
        "hue",
        "blur",
        "solarize",
        "interpolation",
    )
    for name, *expected in (
        ("vicreg", (0.2, 1), 0.4, 0.4, 0.2, 0.1, 0, 0.1, "bicubic"),
        ("simsiam", (0.08, 1), 0.4, 0.4, 0.4, 0.1, 0.5, 0, "bicubic"),
        ("directpred", (0.08, 1), 0.4, 0.4, 0.4, 0.1, 0, 0, "bilinear"),
    ):
        (view,) = recipe(f"{name}_r18_cifar10").data.views
        assert (view.count, view.flip, view.jitter, view.grayscale, view.antialias) == (
            2,
            0.5,
            0.8,
            0.2,
            True,
        )
        assert [getattr(view, field) for field in fields] == expected


def test_suncet_batches_and_weights() -> None:
    """The authors' 20 classes of 2 on each of 64 GPUs; relative to SimCLR's doubled loss,
    their weight of 1 is 4.
    """
    for name, weight in (("simclr", 4), ("swav", 1)):
        config = recipe(f"{name}_suncet_r50_in1k")
        asked = config.data.support
        assert asked is not None
        assert (asked.classes, asked.per_class, asked.epochs) == (20, 2 * 64, 250)
        for setting in ("r50_in1k", "r18_cifar10"):
            (auxiliary,) = recipe(f"{name}_suncet_{setting}").auxiliaries
            assert (auxiliary.model_dump()["weight"], auxiliary.model_dump()["temperature"]) == (
                weight,
                0.1,
            )


def test_multicrop_views() -> None:
    usual, small = (
        [(224, 2, (0.14, 1)), (96, 6, (0.05, 0.14))],
        [(160, 2, (0.08, 1)), (96, 4, (0.05, 0.14))],
    )
    for name, expected in (
        ("swav_r50_in1k", usual),
        ("deepcluster_v2_r50_in1k", usual),
        ("deepcluster_v2_r50_in1k_400ep", small),
    ):
        views = recipe(name).data.views
        assert [(v.size, v.count, v.scale) for v in views] == expected
        for view in views:
            assert (view.brightness, view.contrast, view.saturation, view.hue) == (
                0.8,
                0.8,
                0.8,
                0.2,
            )
            # in pixels of the view, whatever its size
            assert [s * view.size / 224 for s in view.sigma] == pytest.approx([0.1, 2], rel=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_two_steps(name: str, tmp_path: Path) -> None:
    config = shrunken(name)
    train(config, tmp_path / "run")
    recorded = records.read(tmp_path / "run").steps
    assert [record.step for record in recorded] == [0, 1]
    lines = [record.scalars for record in recorded]
    assert all(math.isfinite(line["train/loss"]) and not line["steps/skipped"] for line in lines)
    saved = reader.latest(tmp_path / "run" / "checkpoints")
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
    assert reader.latest(tmp_path / "run" / "checkpoints") is not None
