"""The README and docs/: every shell command, example, link and generated page.

Blocks of `bash` are run in order in a fresh folder with a few made-up photographs, those of
`console` are compared with the options that the commands have.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from kit.evals import run_folder, shards
from safetensors import safe_open

from scaletrain.config import load
from scaletrain.config.schema import components
from scaletrain.evals import run as evals
from scaletrain.train import records, status
from scaletrain.train.loop import train

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES if "_build" not in page.parts}
ALL = "\n".join(TEXTS.values())
RUN = "runs/first"
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# files that a guide tells to make
EXAMPLES = {"scaletrain/methods/pair.py", "configs/pair_r18_cifar10.yaml"}


def blocks(language: str, text: str = ALL) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


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


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    kinds = {name for name, _ in FENCE.findall(ALL)}
    assert kinds == {"bash", "console", "python", "yaml", "text", "", "{toctree}"}


def test_the_readme_is_short_and_quickly_started() -> None:
    readme = TEXTS[ROOT / "README.md"]
    assert len(readme.splitlines()) < 200
    assert "make demo\nmake test\n" in blocks("console", readme)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)", ALL)) <= set(targets)


def test_quoted_figures_are_those_that_were_measured() -> None:
    table = (ROOT / "benchmarks" / "DATA.md").read_text().splitlines()
    quoted = [line for line in ALL.splitlines() if line.startswith("| tar to")]
    assert len(quoted) == 4
    assert set(quoted) <= set(table)


def test_the_matrix_has_every_method() -> None:
    matrix = TEXTS[DOCS / "explain" / "exactness.md"].partition("| method | ddp |")[2]
    rows = re.findall(r"^\| ([a-z0-9_]+) \|", matrix, re.MULTILINE)
    assert tuple(rows) == components("methods")


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
    assert "64 samples, 64 labelled" in text
    # what differs from the recipe
    assert re.search(r"model\.width +1\.0 +0\.25", text)
    assert {path.name for path in (workplace / RUN / "checkpoints").glob("step-*")} == {
        "step-00000002",
        "step-00000003",
    }
    results = sorted(
        path.name.rpartition("-")[0] for path in (workplace / RUN / "evals").glob("*.json")
    )
    assert results == [
        "knn@data-step-2",
        "knn@data-step-2",
        "linear@data-step-2",
    ]  # knn with all labels, and with a subset of them
    with safe_open(workplace / "encoder.safetensors", "pt") as file:
        assert file.metadata()["step"] == "2"
        assert "layer4.1.conv2.weight" in file.keys()  # noqa: SIM118


# --- commands that are not run --------------------------------------------------------------------


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


def options_of(words: list[str]) -> set[str]:
    """The options that docs/reference/cli.md lists for a command."""
    page = TEXTS[DOCS / "reference" / "cli.md"]
    sections = dict(re.findall(r"^## (.+)\n([^\0]*?)(?=^## |\Z)", page, re.MULTILINE))
    if words[0] == "python":
        group, _, script = words[1].removesuffix(".py").partition("/")
        group = group.replace("launchers", "launch")
        names = [f"python {words[1]}", f"scaletrain {group} {script.replace('_', '-')}"]
    else:
        names = [" ".join(words[:3]), " ".join(words[:2])]
    name = next(name for name in names if name in sections)
    known = set(re.findall(r"--[a-z][a-z-]*", sections[name]))
    # what the local launcher does not know it passes on
    started = "eval" if "eval" in words else "train"
    return known | (options_of(["scaletrain", started]) if "local" in name else set())


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[:3]))
def test_options_of_commands_that_are_not_run_exist(words: list[str]) -> None:
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used <= options_of(words), f"{used - options_of(words)} of {' '.join(words)}"


# --- generated pages ------------------------------------------------------------------------------


def test_generated_pages_are_fresh(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(DOCS / "generate.py"), str(tmp_path)],
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    for path in tmp_path.iterdir():
        fresh = (DOCS / "reference" / path.name).read_text() == path.read_text()
        assert fresh, f"{path.name} is out of date: run `python docs/generate.py`"
    assert {path.name for path in tmp_path.iterdir()} == {"cli.md", "config.md", "methods.md"}


def test_the_figure_shows_one_line() -> None:
    tree = ElementTree.parse(DOCS / "figures" / "parity.svg")
    curves = [
        np.array([point.split(",") for point in line.attrib["points"].split()], float)
        for line in tree.iter("{http://www.w3.org/2000/svg}polyline")
    ]
    assert len(curves) == 4
    for curve in curves:
        assert len(curve) > 50
        np.testing.assert_allclose(curve, curves[0], atol=0.2)


# --- examples -------------------------------------------------------------------------------------


def example(page: str, language: str) -> str:
    (found,) = blocks(language, TEXTS[(DOCS / "guides" / page).resolve()])
    return found


def plugged(
    package: str, name: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make a plugin of a package from its source, for the time of a test."""
    (folder / f"{name}.py").write_text(source)
    module = importlib.import_module(package)
    monkeypatch.setattr(module, "__path__", [*module.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, f"{package}.{name}", raising=False)
    importlib.invalidate_caches()


def test_the_method_of_the_guide_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = example("adding-a-method.md", "python")
    plugged("scaletrain.methods", "pair", source, tmp_path, monkeypatch)
    (tmp_path / "base").symlink_to(ROOT / "configs" / "base")
    recipe = tmp_path / "pair_r18_cifar10.yaml"
    recipe.write_text(example("adding-a-method.md", "yaml"))
    small = ["batch=8", "data.lanes=4", "data.workers=0", "data.synthetic_samples=16"]
    small += ["model.width=0.0625", "method.hidden=8", "steps=2", "optim.warmup_epochs=0"]
    train(load.load(recipe, ["data.path=synthetic", *small]), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").is_file()


def test_the_evaluation_of_the_guide_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = example("adding-an-evaluation.md", "python")
    plugged("scaletrain.evals.benchmarks", "nearest_center", source, tmp_path, monkeypatch)
    train = shards(tmp_path / "data" / "train", [i % 6 for i in range(36)])
    shards(tmp_path / "data" / "test", [i % 6 for i in range(12)], seed=1)
    (result,) = evals.run(
        run_folder(tmp_path, train), ["nearest_center"], overrides=["features.workers=0"]
    )
    assert result["metrics"]["nearest_center"] > 50
    assert result["protocol"]["distance"] == "euclidean"
    low, high = result["intervals"]["nearest_center"]
    assert low < result["metrics"]["nearest_center"] <= high


def test_the_records_of_the_reference_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / RUN
    run.mkdir(parents=True)
    begun = example("../reference/metrics.md", "text")
    (run / records.FILE).write_text(f'{begun}{{"step": 1200, "train/loss": 0.5}}\n')
    exec(example("../reference/metrics.md", "python"), {})
    assert capsys.readouterr().out == "1200 0.5 1\n"

    (run / status.FILE).write_text(blocks("text", TEXTS[DOCS / "reference/run-folder.md"])[1])
    written = status.read(run)
    assert written is not None
    assert written.total == 312_800


# --- links ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MyST name them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_everything_named_is_there(page: Path) -> None:
    text = FENCE.sub("", TEXTS[page])
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if link.startswith("https://arxiv.org/"):
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"
    roots = "configs|shards|launchers|benchmarks|docs|tests|scaletrain"
    for path in re.findall(rf"(?<![\w./])(?:{roots})/[\w/-]+\.(?:yaml|py|md)\b", TEXTS[page]):
        assert (ROOT / path).is_file() or path in EXAMPLES or "NAME" in path, path


def test_every_page_is_in_the_contents() -> None:
    listed = {f"{name}.md" for body in blocks("{toctree}") for name in body.split()}
    pages = {str(page.relative_to(DOCS)) for page in TEXTS if page.is_relative_to(DOCS)}
    assert pages - {"index.md"} <= listed
