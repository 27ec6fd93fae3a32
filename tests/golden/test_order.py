"""The order of samples, which only a deliberate change may alter: compared with order.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import order

KNOWN: dict[str, Any] = json.loads(order.FILE.read_text())
FIX = "if the change is meant, run `make golden` and say why in the commit"


def test_samples_come_in_the_same_order(tmp_path: Path) -> None:
    found = order.orders(tmp_path)
    assert found == KNOWN, FIX
    epochs = [epoch["index"] for kind in ("plain", "mixture") for epoch in found[kind]]
    assert len(set(epochs)) == len(epochs) == 2 * order.EPOCHS
