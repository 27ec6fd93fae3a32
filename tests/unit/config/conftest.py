"""Toy methods and a toy engine among the components, and recipes in a temporary folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.toy_components import ALPHA, BETA, ENGINE, TOY, Write

import scaletrain.engines
import scaletrain.methods


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for package, files in (
        (scaletrain.methods, {"toyalpha": ALPHA, "toybeta": BETA}),
        (scaletrain.engines, {"toyengine": ENGINE}),
    ):
        folder = tmp_path / package.__name__
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    yield
    for name in [name for name in sys.modules if ".toy" in name]:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(text: str, name: str = "recipe.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return make


@pytest.fixture
def recipe(toys: None, write: Write) -> Path:
    return write(TOY)
