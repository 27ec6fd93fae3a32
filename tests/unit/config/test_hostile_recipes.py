"""YAML that is no recipe: each ends in one line that names it, at once and in little memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scaletrain.cli import main as cli
from scaletrain.config import load, recipe
from scaletrain.config.recipe import ConfigError
from scaletrain.report import grid

ROOT = Path(__file__).parents[3]
TENS = [f"&a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(9)]
LAUGHTER = f"data: {{views: [&a0 [1, 1], {', '.join(TENS)}]}}\n"  # two billion values
BOMBS = {
    "alias of a number": LAUGHTER + "batch: *a9",
    "alias of a list": LAUGHTER + "optim: {betas: *a9}",
    "alias below a method": LAUGHTER + "method: {name: byol, tau: *a9}",
    "merge keys": "a0: &a0 {k: 1, l: 2}\n"
    + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(30)),
    "in itself": "data: &a {views: [*a]}",
    "brackets": "batch: " + "[" * 20_000,
    "braces": "{a: " * 5_000,
    "dashes": "- " * 5_000,
    "number": "batch: " + "9" * 100_000,
    "hexadecimal number": "seed: 0x" + "f" * 20,
    "floating number": "epochs: 1" + "0" * 100_000 + ".0",
    "text": "data: {path: " + "y" * 100_000 + "}",
    "list": "optim: {betas: [" + "1," * 100_000 + "]}",
    "large file": "batch: 1\n#" + "y" * 20_000_000,
}
FAULTS = {
    "not a NUL\0": "unacceptable character",
    "seed: 1\nseed: 2": 'found duplicate key "seed"',
    "seed: !!python/object/apply:os.getcwd []": "could not determine a constructor for the tag",
    "seed: 2024-13-45": "month must be in 1..12",
    "seed: !!int x": "invalid literal",
    'base: "a\\0b"': "`base:` is the path of a recipe, not 'a\\x00b'",
    'base: "a\\nb"': "`base:` is the path of a recipe, not 'a\\nb'",
    "base: [a]": "`base:` is the path of a recipe, not ['a']",
    "base: /dev/zero": "/dev/zero: this is a device, not a file",
    "base: pipe": "pipe: this is a pipe, not a file",
    "base: socket": "socket: this is a socket, not a file",
    "base: /": "/: this is a folder, not a file",
    "base: loop": "loop",
    "base: " + "a" * 4_000: "File name too long",
    "optim: {lr: " + "y" * 3_000 + "}": "yyy... (3,002 characters)",
    "data: {views: [" + "{a: 1}," * 200 + "]}": "unknown key 'data.views.9.a'; and 190 more",
}


def refused(path: str, *overrides: str) -> str:
    """The one line with which `show config` ends."""
    done = CliRunner(
        env={"RANK": None, "SCALETRAIN_ERROR_FILE": None, "SCALETRAIN_DEBUG": None}
    ).invoke(cli.app, ["show", "config", path, *overrides])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < 2_500
    return done.stderr


BARE = """
import pathlib, re, sys, time
from scaletrain.config.load import load
from scaletrain.config.recipe import ConfigError
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        load(path)
    except ConfigError as error:
        print(time.process_time() - start, len(str(error)), str(error).startswith(path + ": "))
status = pathlib.Path("/proc/self/status").read_text()
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024)
"""


def test_bombs_end_at_once_and_in_little_memory(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.yaml" for number in range(len(BOMBS))]
    for path, text in zip(paths, BOMBS.values(), strict=True):
        path.write_text(text)
    command = [sys.executable, "-c", BARE, *map(str, paths)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True
    )
    *lines, memory = done.stdout.splitlines()
    assert len(lines) == len(BOMBS)
    for name, line in zip(BOMBS, lines, strict=True):
        seconds, length, named = line.split()
        assert float(seconds) < 5, name
        assert int(length) < 600, name
        assert named == "True", name
    assert float(memory) < 300


@pytest.mark.parametrize("text", FAULTS, ids=lambda text: ascii(text[:30]))
def test_faults_of_a_recipe_are_one_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # such a name has room for 107 bytes
        server.bind("socket")
    (tmp_path / "recipe.yaml").write_text(text)
    assert FAULTS[text] in refused(str(tmp_path / "recipe.yaml"))


def test_what_is_no_file_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "image").write_bytes(b"\xff\xd8\xff\xe0 no text")
    for path, text in {
        "/dev/zero": "a device",
        tmp_path / "pipe": "a pipe",
        tmp_path / "image": "not a UTF-8 text file",
    }.items():
        assert f"error: {path}: this is {text}" in refused(str(path))
    for number in range(recipe.BASES + 3):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml")
    assert f"more than {recipe.BASES} recipes" in refused(str(tmp_path / "0.yaml"))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("seed=" + "[" * 20_000, f"nested more than {recipe.DEPTH} levels deep"),
        ("seed=" + "9" * 100_000, "a value of 100,000 characters is too long"),
        ("seed=&a [*a]", "an alias lies within what it repeats"),
        ("a." * 500 + "b=1", "an override has the form"),
        ("y" * 100_000, "an override has the form"),
        ("data.views." + "7" * 5_000 + ".size=3", "is a list; its items are 0, not '777"),
    ],
    ids=lambda text: text[:12],
)
def test_overrides_and_grids_have_the_same_bounds(override: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("method: byol")
    assert text in refused(str(tmp_path / "recipe.yaml"), override)


def test_grids_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(LAUGHTER)
    (tmp_path / "word.yaml").write_text("- [seed=1]\n- word\n")
    for axis, text in {
        str(tmp_path / "grid.yaml"): r"grid.yaml: too large: more than 10,000 values",
        str(tmp_path / "word.yaml"): r"word.yaml: write a list of lists",
        str(tmp_path / "none.yaml"): r"none.yaml: No such file",
        "seed=" + "[" * 20_000: "nested more than",
    }.items():
        with pytest.raises(ConfigError, match=text) as error:
            grid.combinations([axis, "batch=1,2"], 1)
        assert len(str(error.value)) < 1_000
    with pytest.raises(ConfigError, match=r"a grid of 2,000,000,000 runs is more than 10,000"):
        grid.combinations(["batch=1,2"], 10**9)


def test_real_recipes_are_far_from_the_bounds() -> None:
    sizes = [path.stat().st_size for path in (ROOT / "configs").rglob("*.yaml")]
    assert len(sizes) > 50
    assert max(sizes) < recipe.BYTES / 100
    many = ", ".join(f"{{path: /data/part-{number}, weight: 1}}" for number in range(300))
    assert (
        len(
            load.load(
                ROOT / "configs" / "byol_r50_in1k.yaml", [f"data.mixture=[{many}]"]
            ).data.mixture
        )
        == 300
    )
