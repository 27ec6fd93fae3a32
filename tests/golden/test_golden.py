"""Losses and schedules that only a deliberate change may move: compared with methods/METHOD.json,
losses in float64 at 1e-9.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import regenerate
from kit import small

from scaletrain.config.schema import components

FIX = (
    "if the change is meant, run `make golden` (python tests/golden/regenerate.py) and say why "
    "in the commit"
)


def known(method: str) -> dict[str, Any]:
    file = regenerate.FOLDER / f"{method}.json"
    assert file.exists(), f"a new method: run `python tests/golden/regenerate.py {method}`"
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def test_every_file_is_that_of_a_method() -> None:
    files = {path.stem for path in regenerate.FOLDER.glob("*.json")}
    assert files <= set(components("methods")), FIX


@pytest.mark.parametrize("method", components("methods"))
def test_losses_have_not_moved(method: str) -> None:
    expected = known(method)["losses"]
    assert len(expected) == len(set(expected)) == regenerate.STEPS
    assert regenerate.losses(method) == pytest.approx(expected, rel=1e-9), FIX


@pytest.mark.parametrize("method", components("methods"))
def test_schedules_have_not_moved(method: str) -> None:
    expected = known(method)["schedules"]
    assert expected or not small.pretrains(method), f"no recipe trains {method}: add one"
    assert regenerate.schedules(method) == expected, FIX


@pytest.mark.parametrize("method", components("methods"))
def test_names_in_checkpoints_have_not_changed(method: str) -> None:
    """Checkpoints of other names could not be read."""
    assert regenerate.names(method) == known(method)["checkpoint"], FIX
