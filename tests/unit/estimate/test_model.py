"""`show model`: its arithmetic against published counts, its memory against what a real step
allocates.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from kit import small
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from scaletrain.cli import main as cli
from scaletrain.config.schema import Config, components
from scaletrain.core import Batch, Clock
from scaletrain.estimate import model
from scaletrain.train.build import build

CONFIGS = Path(__file__).parents[3] / "configs"


def recipe(method: str, precision: str = "fp32", **changes: Any) -> Config:
    cfg: Config = small.config(method, engine={"precision": precision}, **changes)
    return cfg


@pytest.mark.parametrize(
    ("depth", "weights"), [(18, "IMAGENET1K_V1"), (50, "IMAGENET1K_V1"), (101, "IMAGENET1K_V1")]
)
def test_multiply_adds_of_a_view_are_torchvisions(depth: int, weights: str) -> None:
    """Its billions of operations are multiply-adds with the classifier, features x 1000."""
    published = torchvision.models.get_model_weights(f"resnet{depth}")[weights].meta["_ops"]
    view = {"size": 224, "count": 2}
    cfg = recipe(
        "simclr",
        model={"name": f"resnet{depth}", "width": 1, "stem": "imagenet"},
        data={"views": [view]},
    )
    (found,) = model.measure(cfg)["views"]
    classifier = 1000 * (512 if depth == 18 else 2048)
    assert (found["size"], found["count"]) == (224, 2)
    assert (found["flops"] / 2 + classifier) / 1e9 == pytest.approx(published, abs=6e-4)


def test_a_finer_map_costs_its_cells() -> None:
    """Layer 4 of a ResNet-18 with a stem of 4 channels: 2 x 2 cells of 64 px, or 4 x 4."""
    found = {
        stride: model.measure(
            recipe(
                "simclr",
                model={"name": "resnet18", "stem": "imagenet", "output_stride": stride},
                data={"views": [{"size": 64, "count": 2}]},
            )
        )
        for stride in (32, 16)
    }
    assert found[16]["parameters"] == found[32]["parameters"]
    assert found[16]["step"]["activations"] > found[32]["step"]["activations"]
    coarse, fine = (found[stride]["views"][0]["flops"] for stride in (32, 16))
    cell = 2 * (9 * 16 * 32 + 3 * 9 * 32 * 32 + 16 * 32)
    assert fine - coarse == (16 - 4) * cell


def test_parameters_and_flops_of_a_step_by_hand() -> None:
    """BYOL's two heads of one hidden layer, and forward passes: two views, each through both
    networks.
    """
    cfg = recipe("byol")
    found = model.measure(cfg)
    encoder, (view,) = found["parameters"]["backbone"], found["views"]
    width, hidden, dim = 32, 24, 8
    projector = (
        width * hidden + hidden + 2 * hidden + hidden * dim
    )  # bias and norm in the middle, none at the end
    predictor = dim * hidden + hidden + 2 * hidden + hidden * dim
    assert found["parameters"] == {
        "backbone": encoder,
        "heads": projector + predictor,
        "targets": encoder + projector,
    }
    dense = [2 * width * hidden + 2 * hidden * dim, 2 * dim * hidden + 2 * hidden * dim]
    online, target = 2 * (view["flops"] + sum(dense)), 2 * (view["flops"] + dense[0])
    assert found["step"]["forward"] == pytest.approx(online + target, rel=1e-12)
    stem = (
        2 * 2 * 27 * 4 * 16 * 16
    )  # the gradient of the images is not computed: 3x3x3 weights, 4 channels, 16x16 px, 2 views
    assert found["step"]["backward"] == pytest.approx(2 * online - stem, rel=1e-12)


def real(cfg: Config) -> int:
    """Bytes that one real forward pass leaves allocated, with the views where it keeps them."""
    engine = build(cfg, small.SAMPLES, small.STEPS_PER_EPOCH, torch.device("cpu"))
    batch: Batch = small.batch(cfg, 0)
    if cfg.engine.precision != "fp64":  # type: ignore[attr-defined]
        batch = dataclasses.replace(
            batch,
            views=tuple(v.float() for v in batch.views),
            pixel_range=batch.pixel_range.float(),
        )
    clock = Clock(0, 20, 0, small.STEPS_PER_EPOCH)
    with engine.autocast():
        engine.forward(batch, clock)  # what is made once is made
    for module in engine.staged:
        module.discard()
    with (
        profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler,
        engine.autocast(),
    ):
        out = engine.forward(batch, clock)
    assert out.losses
    kept = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    # bfloat16 keeps a copy of its own, which is among the allocations
    return int(kept + sum(view.nbytes for view in batch.views) * (cfg.engine.precision != "bf16"))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "precision"),
    [*((name, "fp32") for name in components("methods")), ("byol", "bf16"), ("byol", "fp64")],
)
def test_activations_are_what_a_step_allocates(method: str, precision: str) -> None:
    """Every method, though it decides by values (a full queue, a mask, a cluster).

    Within a fortieth of so small a network: losses, staged statistics and embeddings stay allocated
    too.
    """
    network = (
        {"name": "resnet50", "sk": True, "width": 0.125} if precision == "bf16" else {"width": 0.25}
    )
    cfg = recipe(method, precision, model=network, data={"foreground": {"masks": True}})
    found = model.measure(cfg)
    assert found["precision"] == precision
    assert found["step"]["activations"] * cfg.batch == pytest.approx(real(cfg), rel=0.025)


def show(*arguments: str, columns: int = 80) -> str:
    done = CliRunner(env={"COLUMNS": str(columns), "RANK": None}).invoke(
        cli.app, ["show", "model", *arguments]
    )
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_prints_a_table_or_json() -> None:
    path = str(CONFIGS / "relicv2_r18_cifar10.yaml")
    found = json.loads(show(path, "batch=64", "engine.precision=bf16", "--json"))
    assert (found["method"], found["model"], found["batch"], found["precision"]) == (
        "relicv2",
        "resnet18",
        64,
        "bf16",
    )
    assert [(view["size"], view["count"]) for view in found["views"]] == [(32, 4), (16, 2)]
    assert round(found["parameters"]["backbone"] / 1e6, 2) == 11.17
    lines = [line.rstrip() for line in show(path, "batch=64", "engine.precision=bf16").splitlines()]
    assert max(map(len, lines)) <= 80
    assert "relicv2, resnet18, bf16, batch 64; the step is per sample" in lines[0]
    rows = [" ".join(line.split()) for line in lines]
    assert "parameters, backbone 11.17 M" in rows
    assert "encoder, 32 px view 1.11 GFLOPs 0.56 G multiply-adds; x 4" in rows
    kept = f"{found['step']['activations'] / 1e6:,.1f} MB"
    assert f"step, activations {kept} kept for the backward pass" in rows
    narrow = show(path, "batch=64", "engine.precision=bf16", columns=40).splitlines()
    assert max(map(len, narrow)) <= 40
    assert narrow[narrow.index("step, activations") :] == [
        "step, activations",
        f"  {kept}",
        "  kept for the backward pass",
    ]


def test_a_wide_network_costs_no_memory_and_no_wait() -> None:
    """375 million parameters twice, on 4096 samples: they are never allocated."""
    before = torch.get_default_dtype()
    found = json.loads(
        show(
            str(CONFIGS / "byol_r50_in1k.yaml"), "model.width=4", "engine.precision=fp64", "--json"
        )
    )
    assert round(found["parameters"]["backbone"] / 1e6) == 375
    assert torch.get_default_dtype() is before
