"""What a terminal shows of a fleet while it is at work."""

from __future__ import annotations

import sys

import pytest

from scaletrain.launch.fleet import table


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
