"""The wheel: built, installed beside the dependencies alone, and used from an empty folder, where
nothing of the repository can be imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from kit.importing import tree

ROOT = Path(__file__).parents[2]
SMALL = (
    "batch=4",
    "data.lanes=4",
    "model.width=0.0625",
    "data.workers=0",
    "method.hidden=16",
    "method.dim=8",
)
pytest.importorskip("setuptools", minversion="77", reason="the wheel is built with it")


def run(*command: object, cwd: Path) -> str:
    # the warnings of pip are not ours
    without = ("PYTHONPATH", "PYTHONWARNINGS", "RANK")
    environment = {k: v for k, v in os.environ.items() if k not in without}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel(folder: Path) -> Path:
    """Built from a copy, since building leaves files in the source."""
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("scaletrain", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)

    options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder)
    return next(folder.glob("*.whl"))


def install(file: Path, folder: Path) -> Path:
    """The programs of an environment that shares the dependencies with this one."""
    venv.create(folder, symlinks=True)
    programs = folder / "bin"
    options = ("--no-deps", "--no-index", "--no-compile", file)
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "install")
    run(*pip, *options, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # the .pth files of a folder that is added like this are not read: no editable install
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return programs


def test_wheel_trains_by_the_name_of_a_recipe_and_writes_shards(tmp_path: Path) -> None:
    programs = install(wheel(tmp_path), tmp_path / "environment")
    empty = tmp_path / "empty"
    empty.mkdir()
    script = (
        "from scaletrain.cli import main; from scaletrain.config import recipe;"
        "print(main.__file__, *recipe.shipped().values(), sep='\\n')"
    )
    files = run(programs / "python", "-c", script, cwd=empty).splitlines()
    assert all(Path(file).is_relative_to(tmp_path / "environment") for file in files)
    assert len(files) == 1 + len(list((ROOT / "configs").rglob("*.yaml")))

    scaletrain = programs / "scaletrain"
    options = (*SMALL, "--data", "synthetic", "--steps", 2)
    said = run(scaletrain, "train", "byol_r18_cifar10", *options, cwd=empty)
    assert "changes of the recipe byol_r18_cifar10" in said
    assert "step 2/2" in said
    assert (empty / "runs" / "byol_r18_cifar10" / "config.yaml").is_file()

    said = run(scaletrain, "shards", "folder", tree(tmp_path / "src", {"a": 2}), "data", cwd=empty)
    assert "2 images in 1 class, 1 shard" in said
    assert (empty / "data" / "train-000000.tar").is_file()
