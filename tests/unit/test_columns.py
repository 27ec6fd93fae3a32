"""Tables as text: whole cells at any width."""

from __future__ import annotations

import pytest

from scaletrain.columns import lines

HEADER, ROWS = ("run", "state", "loss", "accuracy"), [("1", "completed", "0.5", "99.25"), ("12", "pending", "", "7.5")]


def test_a_table_that_fits() -> None:
    assert lines(HEADER, ROWS, 40) == [
        "run      state  loss  accuracy",
        "  1  completed   0.5     99.25",
        " 12    pending             7.5",
    ]
    assert lines(("", "top-1"), [("knn_10", "9.00"), ("linear", "80.00")], 40) == [
        "        top-1",
        "knn_10   9.00",
        "linear  80.00",
    ]
    assert lines(("a", "b"), [], 40) == ["a  b"]


def test_a_wider_one_goes_on_below_with_its_first_column() -> None:
    assert lines(HEADER, ROWS, 20) == [
        "run      state  loss",
        "  1  completed   0.5",
        " 12    pending",
        "",
        "run  accuracy",
        "  1     99.25",
        " 12       7.5",
    ]


@pytest.mark.parametrize("width", [1, 5, 13, 40, 200])
def test_no_cell_is_cut(width: int) -> None:
    text = lines(HEADER, ROWS, width)
    assert sorted(set(" ".join(text).split())) == sorted({*HEADER, *(cell for row in ROWS for cell in row if cell)})


def test_the_width_is_the_consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert lines(HEADER, ROWS) == lines(HEADER, ROWS, 20)
