"""`scaletrain show datasets`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from kit.evals import shards
from typer.testing import CliRunner

from scaletrain.cli.main import app
from scaletrain.evals import datasets


def test_every_dataset_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for split in ("train", "test"):
        shards(tmp_path / "cifar10" / split, [0, 1])
    actual = CliRunner().invoke(app, ["show", "datasets", "--data-root", str(tmp_path)])
    assert actual.exit_code == 0, actual.output
    title, _, *rows = actual.stdout.splitlines()
    assert title.endswith(str(tmp_path))
    assert [row.split()[0] for row in rows] == datasets.names()
    by_name = {row.split()[0]: row for row in rows}
    assert by_name["cifar10"].endswith("there")
    assert by_name["pets"].split()[1:3] == ["37", "per_class"]
    assert re.search(r"held out: 20 of each class +missing$", by_name["pets"])
    assert " of imagenet " in by_name["objectnet"]
