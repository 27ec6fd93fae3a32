"""The README's shell commands, run in order in a fresh folder with a few made-up photographs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RUN = "runs/first"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def photographs(folder: Path) -> None:
    """Two classes that differ in brightness, 64 to train and 16 to test on, in several sizes."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 8)):
        for level, name in ((60, "dark"), (180, "bright")):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                shape = (40 + number % 5, 50 - number % 3, 3)
                image = np.clip(draw.normal(level, 30, shape), 0, 255).astype(np.uint8)
                assert cv2.imwrite(str(place / f"{number}.jpg"), image)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """What a clone's root has that the commands use, and `scaletrain` and `python` of this
    interpreter first on the PATH.
    """
    for name in ("configs", "launchers", "shards"):
        (tmp_path / name).symlink_to(ROOT / name)
    photographs(tmp_path / "photos")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, command in (("python", ""), ("scaletrain", " -m scaletrain")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{command} "$@"\n')
        (commands / name).chmod(0o755)
    return tmp_path


def test_quoted_figures_are_those_that_were_measured() -> None:
    table = (ROOT / "benchmarks" / "DATA.md").read_text().splitlines()
    quoted = [line for line in README.splitlines() if line.startswith("| tar to")]
    assert len(quoted) == 4
    assert set(quoted) <= set(table)


def test_commands(workplace: Path) -> None:
    environment = os.environ | {
        "PATH": f"{workplace / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    output = []
    for block in blocks("bash"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=workplace,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        output.append(done.stdout)
    text = "\n".join(output)
    assert "64 images in 2 classes" in text
    assert "sound" in text
    assert "changes of the recipe" in text
    assert {path.name for path in (workplace / RUN / "checkpoints").glob("step-*")} == {
        "step-00000002",
        "step-00000003",
    }
    results = sorted(path.name.rpartition("-")[0] for path in (workplace / RUN / "evals").iterdir())
    assert results == [
        "knn-step-2",
        "knn-step-2",
        "linear-step-2",
    ]  # knn with all labels, and with a subset of them
    with safe_open(workplace / "encoder.safetensors", "pt") as file:
        assert file.metadata()["step"] == "2"
        assert "layer4.1.conv2.weight" in file.keys()  # noqa: SIM118


def test_the_quickstart_is_two_targets() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert blocks("console")[0].splitlines() == ["make demo", "make test"]
    assert set(re.findall(r"`make ([a-z-]+)", README)) <= set(targets)


def commands() -> list[list[str]]:
    """Every command of ours in the blocks that are not run, as words: script or subcommand
    first.
    """
    text = "\n".join(blocks("console")).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        words = shlex.split(line.partition(" -m -- ")[2] or line)
        if words and words[0] in ("python", "scaletrain"):
            found.append(words)
    return found


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[:3]))
def test_options_of_commands_that_are_not_run_exist(words: list[str]) -> None:
    if words[0] == "python":
        command = [sys.executable, str(ROOT / words[1])]
    else:
        deeper = 3 if words[1] == "show" else 2
        command = [sys.executable, "-m", "scaletrain", *words[1:deeper]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [*command, "--help"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    known = set(re.findall(r"--[a-z][a-z-]*", done.stdout))
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used <= known, f"{used - known} of {' '.join(words)}"


def test_everything_named_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 20
    for link in links:
        assert link.startswith("https://arxiv.org/") or (ROOT / link).exists(), link
    for heading in re.findall(r"\]\(#([^)]+)\)", README):
        assert re.search(
            rf"^## {heading.replace('-', ' ')}$", README, re.MULTILINE | re.IGNORECASE
        ), heading
    for path in re.findall(r"(?:configs|shards|launchers)/\w+\.(?:yaml|py)", README):
        assert (ROOT / path).is_file(), path
