"""Runs the commands `scaletrain shards`, and reads back what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from kit.data import encode, picture
from scaletrain.cli.main import app
from scaletrain.data.reading.reader import Shards

ROOT = Path(__file__).parents[2]


def call(name: str, *arguments: object) -> Any:
    """Call a command of `scaletrain shards` in this process; errors are kept as exceptions."""
    return CliRunner().invoke(app, ["--debug", "shards", name, *map(str, arguments)])


def run(name: str, *arguments: object, fails: str = "") -> str:
    """What a command of `scaletrain shards` prints; with `fails`, expect one clear line with it."""
    result = call(name, *arguments)
    if fails:
        assert isinstance(result.exception, ValueError | OSError), result.output
        assert "\n" not in str(result.exception)
        assert fails in str(result.exception)
        return str(result.exception)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def tree(root: Path, classes: dict[str, int], suffix: str = ".png") -> Path:
    number = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"im.{i}{suffix}").write_bytes(encode(picture(number), suffix.lower()))
            number += 1
    return root


def contents(folder: Path) -> dict[bytes, int]:
    shards = Shards(folder)
    return {s.image: s.label for s in map(shards.read, range(len(shards)))}


def keys(folder: Path) -> list[str]:
    """Of all samples, in order."""
    shards = Shards(folder)
    return [shards.name(i).partition("/")[2] for i in range(len(shards))]


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
