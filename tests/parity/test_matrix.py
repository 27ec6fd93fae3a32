"""The printed matrix: an engine that refuses a method does not end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import matrix
import pytest
from kit.parity import ENGINES, Case, Run
from kit.toys import ADVERSARY


def test_an_engine_that_refuses_a_method_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several losses under DeepSpeed, which takes one backward pass; on one rank, to be quick."""

    def alone(
        world: int, function: Callable[..., Run], folder: Path, cases: Mapping[str, Case]
    ) -> list[Run]:
        return [function(cases)]

    monkeypatch.setattr(matrix.ranks, "run", alone)
    chosen = ("ddp", "deepspeed stage=0")
    monkeypatch.setattr(matrix, "ENGINES", {name: ENGINES[name] for name in chosen})
    assert matrix.main((ADVERSARY,)) == 0
    assert f"| {ADVERSARY} | 0e+00, 0e+00 | refused |" in capsys.readouterr().out
    assert not matrix.passes(1e-3, 1e-9)
