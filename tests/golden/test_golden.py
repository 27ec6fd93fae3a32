"""Losses that only a deliberate change may move: compared with losses.json in float64 at 1e-9."""

from __future__ import annotations

import json

import pytest
import regenerate

from scaletrain.config.schema import components

KNOWN: dict[str, list[float]] = json.loads(regenerate.FILE.read_text())
FIX = (
    "if the change is meant, run `make golden` (python tests/golden/regenerate.py) and say why "
    "in the commit"
)


def test_every_method_has_golden_losses() -> None:
    assert sorted(KNOWN) == sorted(components("methods")), FIX
    for method, losses in KNOWN.items():
        assert len(losses) == len(set(losses)) == regenerate.STEPS, f"{method}: {losses}"


@pytest.mark.parametrize("method", components("methods"))
def test_losses_have_not_moved(method: str) -> None:
    assert regenerate.losses(method) == pytest.approx(KNOWN[method], rel=1e-9), FIX
