"""The table of a fleet, and how it stays in its place on a terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scaletrain.evals.request import Request
from scaletrain.launch.fleet import table
from scaletrain.launch.fleet.cells import Cell, Status
from scaletrain.launch.fleet.fleet import Fleet
from scaletrain.launch.fleet.plan import Plan


def fleet(run: Path, statuses: dict[tuple[int, str, str], Status]) -> Fleet:
    plan = Plan(run, [Request(("knn",))])
    plan.cells = [Cell(run, step, name, dataset, (), None) for step, name, dataset in statuses]
    made = Fleet([plan], None, 1)
    made.statuses = dict(zip(plan.cells, statuses.values(), strict=True))
    return made


def test_a_row_for_each_step_and_a_column_for_each_benchmark(tmp_path: Path) -> None:
    statuses = {
        (1000, "knn", "a"): Status("measured", "50.00 [48.00, 52.00]"),
        (1000, "svm", "a"): Status("failed", "exit code 2; no labels (log)"),
        (2000, "knn", "a"): Status("running", "job 7"),
        (2000, "svm", "a"): Status("missing"),
    }
    assert table.lines(fleet(tmp_path, statuses)) == [
        str(tmp_path),
        " step  knn                   svm",
        "1,000  50.00 [48.00, 52.00]  failed",
        "2,000  running               -",
        "",
        "failed: exit code 2; no labels (log)",
        "",
        "1 measured, 1 running, 1 missing, 1 failed",
    ]
    two = {(1, "knn", "a"): Status("missing"), (1, "knn", "b"): Status("pending")}
    assert "step  knn@a  knn@b" in table.lines(fleet(tmp_path, two))
    assert table.lines(fleet(tmp_path, {}))[1] == "no step to evaluate yet"


def test_lines_on_a_terminal_are_replaced_as_a_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "6")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    screen = table.Screen()

    def shown(*text: str) -> list[str]:
        screen.show(text)
        return capsys.readouterr().out.splitlines()

    assert shown("first", "x" * 30, "") == ["first", "x" * 20, "x" * 10, ""]
    # more than the terminal has lines: those that leave it could not be erased again
    many = [f"line {n}" for n in range(9)]
    assert shown(*many) == ["\033[4F\033[J... 5 lines above", *many[-4:]]
    assert shown("last") == ["\033[5F\033[Jlast"]

    screen.say("by the way")
    screen.close(many)
    assert capsys.readouterr().out.splitlines() == ["\033[1F\033[Jby the way", *many]
