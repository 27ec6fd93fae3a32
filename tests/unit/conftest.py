"""What the tests of commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from kit.commands import RECIPE


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "toy.yaml").write_text(RECIPE)
    return tmp_path / "toy.yaml"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Puts a function in the place of scaletrain.train.loop.train."""

    def replace(function: Callable[..., None]) -> None:
        monkeypatch.setitem(sys.modules, "scaletrain.train.loop", SimpleNamespace(train=function))  # type: ignore[arg-type]

    return replace
