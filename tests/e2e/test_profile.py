"""`scaletrain train --profile`: a trace of real training steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scaletrain.cli import main as cli

RECIPE = """
batch: 8
steps: 8
data: {path: synthetic, synthetic_samples: 64, lanes: 4, workers: 0, views: [{size: 16, count: 2}]}
model: {name: resnet10, width: 0.0625, stem: cifar}
method: {name: byol, hidden: 16, dim: 8}
optim: {lr: 0.1, warmup_epochs: 0}
monitor: {every: 1, images_every: 0}
"""


@pytest.mark.parametrize("wanted", [True, False])
def test_a_trace_of_training(wanted: bool, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [
        "train",
        str(tmp_path / "recipe.yaml"),
        "--run",
        str(tmp_path / "run"),
        *["--profile"] * wanted,
    ]
    done = CliRunner(
        env={"RANK": None, "SCALETRAIN_ERROR_FILE": None, "SCALETRAIN_DEBUG": None}
    ).invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "profile").exists() == wanted
    if wanted:
        trace = json.loads((tmp_path / "run" / "profile" / "rank0.json").read_text())
        names = [event.get("name", "") for event in trace["traceEvents"]]
        assert {f"ProfilerStep#{step}" for step in (5, 6, 7)} <= set(names)
        assert (
            names.count("aten::convolution_backward") == 3 * 12
        )  # a ResNet-10 has 12 convolutions; targets have no gradient
