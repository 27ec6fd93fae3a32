"""Commands of the tool, called in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from scaletrain.cli import main as cli

RECIPE = (
    "method: byol\nbatch: 32\nmodel: {name: resnet18, width: 0.25, stem: cifar}\ndata: "
    "{views: [{size: 32, count: 2}]}\n"
)


def call(*arguments: object, **environment: str) -> Any:
    clean = {
        "RANK": None,
        "SCALETRAIN_ERROR_FILE": None,
        "SCALETRAIN_DEBUG": None,
        "COLUMNS": "200",
    }
    return CliRunner(env={**clean, **environment}).invoke(cli.app, [str(a) for a in arguments])
