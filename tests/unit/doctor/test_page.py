"""The doctor's page: how findings of several ranks become one page, and what it must not show."""

from __future__ import annotations

from typing import Any

import pytest

from scaletrain import dist
from scaletrain.doctor.page import Finding, discreet, guarded, lines, measured, merged, spans


def test_findings_of_ranks_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    same, old, new = (
        Finding("ok", "gpu", "one"),
        Finding("ok", "torch", "2.1"),
        Finding("ok", "torch", "2.2"),
    )
    ranks = [[same, old], [same, new], [same, old], [same, old]]
    monkeypatch.setattr(
        dist, "gather_objects", lambda own: [[tuple(f) for f in findings] for findings in ranks]
    )
    texts = [(f.name, f.text) for f in merged(ranks[0])]
    assert texts == [("gpu", "one"), ("torch", "2.1 [ranks 0, 2-3]"), ("torch", "2.2 [rank 1]")]
    assert spans([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken() -> Any:
        raise KeyError("MemTotal:\n odd")

    (found,) = guarded("memory", broken)
    assert (found.status, found.name) == ("fail", "memory")
    assert "KeyError" in found.text
    assert found.fix
    values, (other,) = measured("memory", broken, "try this")
    assert (values, other.status, other.fix) == ({}, "fail", "try this")


def test_the_page_is_discreet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("LOGNAME", "ada")
    text = "/home/ada/runs, /scratch/ada/x, /scratch/ada: /home/adam /data/canada ada"
    assert discreet(text) == "~/runs, /scratch/USER/x, /scratch/USER: /home/adam /data/canada ada"
    shown = lines([Finding("warn", "disk", "/home/ada/runs is slow", "move /home/ada/runs")])
    assert shown.splitlines()[0].split() == ["warn", "disk", "~/runs", "is", "slow"]
    assert shown.splitlines()[1].strip() == "fix: move ~/runs"
