"""Tables: every number whole and beside its name, at any width, in terminals and pipes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from scaletrain.doctor.page import Finding, lines
from scaletrain.runtime import tables
from scaletrain.runtime.tables import plural, render, wrap

ROOT = Path(__file__).parents[3]
COLUMNS = ("engine", "MB", "share", "note")
ROWS = (("ddp", "1,234.500", "9.1%", "what a word"), (), ("zero 3", "-", "100.0%", ""))


def test_columns_are_aligned_and_numbers_flush_right() -> None:
    assert render(COLUMNS, ROWS, title="of a step", notes=("below",), width=80).split("\n") == [
        "of a step",
        "engine         MB   share  note",
        "ddp     1,234.500    9.1%  what a word",
        "",
        "zero 3          -  100.0%",
        "below",
    ]
    assert render(("", ""), [("a", "2.5 MB"), ("bcd", "10.5 MB")]) == "a     2.5 MB\nbcd  10.5 MB"
    assert render(("key", "value"), [("a", 1), ("b", "[1, 2]")]).split("\n")[1:] == [
        "a    1",
        "b    [1, 2]",
    ]
    assert render(("key",), []) == "key"


@pytest.mark.parametrize("width", [10, 20, 37])
def test_a_narrow_terminal_shows_a_block_for_each_row(width: int) -> None:
    shown = render(COLUMNS, ROWS, title="of a step", width=width)
    found = shown.split("\n")
    assert max(map(len, found)) <= max(width, len("  share  100.0%"))
    for row in ROWS:
        for name, cell in zip(COLUMNS[1:3], row[1:3], strict=False):
            assert any(line.split() in ([name, cell], [cell]) for line in found), (name, cell)
    if width == 20:
        ddp = ["ddp", "  MB     1,234.500", "  share  9.1%", "  note   what a word"]
        assert found == ["of a step", *ddp, "zero 3", "  MB     -", "  share  100.0%"]


def test_a_pipe_takes_a_row_as_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ("x" * 300, "word " * 60, "7")
    monkeypatch.delenv("COLUMNS", raising=False)
    tables.show(("a", "b", "c"), [long])
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setenv("COLUMNS", "40")
    tables.show(("a", "b", "c"), [long])
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_a_terminal_says_how_wide_it_is() -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 40))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {
        "PYTHONPATH": str(ROOT)
    }
    code = "from scaletrain.runtime import tables; print(tables.width())"
    subprocess.run(
        [sys.executable, "-c", code], stdout=slave, env=environment, timeout=60, check=True
    )
    os.close(slave)
    assert os.read(master, 100).split() == [b"40"]
    os.close(master)


def test_words_stay_whole() -> None:
    assert wrap("one two three", 8) == "one two\nthree"
    assert (
        wrap("ok    name  some-thing /a/long/path", 16, 6)
        == "ok    name\n      some-thing\n      /a/long/path"
    )
    assert wrap("x" * 50 + " y", 10) == "x" * 50 + "\ny"
    assert wrap("x" * 50, None) == "x" * 50


def test_counts_go_with_their_nouns() -> None:
    assert [plural(n, "shard") for n in (0, 1, 2, 1_000_000)] == [
        "0 shards",
        "1 shard",
        "2 shards",
        "1,000,000 shards",
    ]
    assert [plural(n, noun) for n in (1, 2) for noun in ("process", "class")] == [
        "1 process", "1 class", "2 processes", "2 classes",
    ]  # fmt: skip


def test_the_page_of_the_doctor_hangs_below_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding(
        "warn", "memory", "3.5 GiB in the machine, limit of 3 GiB", "ask for more, or lower batch"
    )
    monkeypatch.setenv("COLUMNS", "40")
    narrow = lines([finding]).splitlines()
    assert max(map(len, narrow)) <= 40
    assert all(line.startswith(" " * 19) for line in narrow[1:])
    monkeypatch.delenv("COLUMNS")
    assert len(lines([finding]).splitlines()) == 2
