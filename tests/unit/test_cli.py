"""The commands: their help, what they pass on, and how recipes are found."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.commands import call

from scaletrain.checkpoint import files
from scaletrain.checkpoint import writer as checkpoint
from scaletrain.cli import lazy
from scaletrain.cli import main as cli
from scaletrain.config import load
from scaletrain.config import schema as config
from scaletrain.core import Piece
from scaletrain.evals import run as evals
from scaletrain.nn import resnet
from scaletrain.report import cards

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("group", [None, "show", *lazy.GROUPS])
def test_help_imports_no_library_of_the_commands(group: str | None) -> None:
    words = [] if group is None else [group]
    script = (
        "import sys\nfrom scaletrain.cli.main import app\n"
        f"try: app([*{words}, '--help'])\n"
        "except SystemExit: print('\\nheavy', sorted({'torch', 'numpy', 'cv2', 'pydantic'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "heavy []"
    top = ("train", "eval", "export", "compare", "show", "doctor", "shards", "launch")
    for command in lazy.COMMANDS.get(group, ["memory"]) if group else top:
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in lazy.GROUPS for name in lazy.COMMANDS[group]]
)
def test_every_command_of_a_group_can_be_imported_and_is_what_the_group_says(
    group: str, name: str
) -> None:
    found = call(group, name, "--help")
    assert found.exit_code == 0, found.output
    assert f"scaletrain {group} {name} " in found.output.replace("root", "scaletrain", 1)
    said = " ".join(found.stdout.partition("\n\n")[2].split())
    assert said.startswith(lazy.COMMANDS[group][name].help)


SCRIPTS = {
    **{f"shards/{name.replace('-', '_')}.py": ("shards", name) for name in lazy.COMMANDS["shards"]},
    **{f"launchers/{name}.py": ("launch", name) for name in lazy.COMMANDS["launch"]},
}


@pytest.mark.parametrize("path", SCRIPTS)
def test_scripts_are_commands(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(cli, "main", lambda *words: seen.append(words))
    runpy.run_path(str(ROOT / path), run_name="__main__")
    assert seen == [SCRIPTS[path]]
    runpy.run_path(str(ROOT / path), run_name="imported")
    assert len(seen) == 1


def test_there_is_no_other_script() -> None:
    found = {
        f"{folder}/{p.name}"
        for folder in ("shards", "launchers")
        for p in (ROOT / folder).glob("*.py")
    }
    assert found == {*SCRIPTS, "launchers/demo.py"}


def test_groups_name_the_nearest_command_and_refuse_in_one_line(tmp_path: Path) -> None:
    result = call("shards", "foldr", "a", "b")
    assert result.exit_code == 2
    assert "Did you mean 'folder'?" in result.stderr
    result = call("shards", "folder", tmp_path / "none", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path}/none: no such folder of images\n"


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = call("show", "config", "byol_r18_cifar10")
    assert named.exit_code == 0, named.output
    path = ROOT / "configs" / "byol_r18_cifar10.yaml"
    assert named.stdout == call("show", "config", path).stdout

    (tmp_path / "mine.yaml").write_text("base: byol_r18_cifar10\nseed: 7")
    assert "seed: 7" in call("show", "config", "mine.yaml").stdout
    (tmp_path / "byol_r18_cifar10").write_text("base: byol_r18_cifar10.yaml\nseed: 8")
    assert "seed: 8" in call("show", "config", "byol_r18_cifar10").stdout

    unknown = call("show", "config", "byol_r50_in1")
    assert unknown.exit_code == 2
    assert unknown.stderr.startswith(
        "error: there is neither a file nor a recipe named 'byol_r50_in1'; the nearest are "
        "byol_r50_in1k, "
    )


def test_the_run_folder_has_the_name_of_the_recipe(training: Any) -> None:
    seen: list[Any] = []
    training(lambda config, run, **_: seen.append(run))
    assert call("train", "byol_r18_cifar10", "--data", "synthetic").exit_code == 0
    assert seen == [Path("runs/byol_r18_cifar10")]


def test_show_config_prints_what_loads_equal(recipe: Path, tmp_path: Path) -> None:
    result = call("show", "config", recipe, "optim.lr=1e-3", "data=synthetic")
    assert result.exit_code == 0
    (tmp_path / "again.yaml").write_text(result.stdout)
    assert load.load(tmp_path / "again.yaml") == load.load(
        recipe, ["optim.lr=1e-3", "data=synthetic"]
    )


def test_show_methods_lists_every_file() -> None:
    methods, _, auxiliaries = call("show", "methods").stdout.partition("\n\n")
    for kind, text in (("methods", methods), ("auxiliaries", auxiliaries.partition("\n")[2])):
        heads = [line for line in text.splitlines() if not line.startswith(" ")]
        assert [line.split()[0] for line in heads] == list(config.components(kind))
        assert all(len(line.split()) > 2 for line in heads)  # each with its first line
    assert "    byol_r50_in1k" in methods
    assert "74.3 % linear top-1 (paper)" in methods
    assert "57.3 % linear top-1" in auxiliaries


def test_show_schema_is_json_with_every_method() -> None:
    schema = json.loads(call("show", "schema").stdout)
    assert {f"method.{name}" for name in config.components("methods")} <= set(schema["$defs"])


def test_train_passes_on_and_shows_the_changes(recipe: Path, training: Any) -> None:
    seen: list[tuple[Any, ...]] = []
    training(lambda *args, **kwargs: seen.append((*args, kwargs)))
    result = call(
        "train",
        recipe,
        "optim.lr=0.5",
        "--run",
        "out",
        "data.lanes=4",
        "--init",
        "x.st",
        "--continue",
        "other",
        "--profile",
        "--change",
    )
    assert result.exit_code == 0, result.output
    expected = load.load(recipe, ["optim.lr=0.5", "data.lanes=4"])
    assert seen == [
        (
            expected,
            Path("out"),
            {
                "init": Path("x.st"),
                "continues": Path("other"),
                "trace": True,
                "change": True,
                "umask": None,
            },
        )
    ]
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["optim.lr", "0.3", "0.5"] in rows
    assert ["data.lanes", "64", "4"] in rows
    narrow = call("train", recipe, "optim.lr=0.5", COLUMNS="20").stdout.splitlines()
    assert narrow[-3:] == ["optim.lr", "  recipe    0.3", "  this run  0.5"]


def test_train_defaults(recipe: Path, training: Any) -> None:
    seen: list[tuple[Any, ...]] = []
    training(lambda *args, **kwargs: seen.append((*args, kwargs)))
    assert call("train", recipe).stdout == f"configuration: {recipe} as it is\n"
    plain = {"init": None, "continues": None, "trace": False, "change": False, "umask": None}
    assert seen == [(load.load(recipe), Path("runs/toy"), plain)]
    assert call("train", recipe, "optim.lr=0.5", RANK="1").stdout == ""


def test_eval_passes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        evals, "run", lambda *args, **kwargs: seen.append((*args, kwargs)) or [{"benchmark": "knn"}]
    )
    monkeypatch.setattr(
        cards, "report", lambda found: ["first line", f"last line: {found[0]['benchmark']}"]
    )
    settings = ("--set", "knn.k=[1]", "--set", "linear.epochs=2")
    options = (
        "--train",
        "a",
        "--test",
        "b",
        *settings,
        "--encoder",
        "pixels",
        "--labels",
        "c",
        "--same-numbers",
        "--results",
        "d",
        "--store",
        "e",
    )
    assert call("eval", "run", "knn", "linear", *options).stdout == "first line\nlast line: knn\n"
    overrides = ["knn.k=[1]", "linear.epochs=2"]
    passed = {
        "dataset": "",
        "data_root": None,
        "train": "a",
        "test": "b",
        "overrides": overrides,
        "encoder": "pixels",
        "labels": Path("c"),
        "same_numbers": True,
        "results": Path("d"),
        "store": Path("e"),
    }
    assert seen == [("run", ["knn", "linear"], passed)]


def test_export_takes_the_backbone_of_the_asked_step(recipe: Path, tmp_path: Path) -> None:
    settings = load.load(recipe)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(load.dump(settings))
    backbone = resnet.ResNet(settings.model)
    writer = checkpoint.Writer(run / "checkpoints", keep_last=5)
    for step in (3, 7):
        tensors = {
            f"method.backbone.{k}": v + step if v.is_floating_point() else v
            for k, v in backbone.state_dict().items()
        }
        tensors["method.projector.0.weight"] = torch.zeros(3, 2)
        tensors["method.prototypes"] = torch.zeros(2)
        writer.save(
            step, {k: Piece(v.flatten(), 0, tuple(v.shape)) for k, v in tensors.items()}, {}
        )
    writer.close()
    for arguments, step in (((), 7), (("--step", 3), 3)):
        result = call("export", run, tmp_path / "out.safetensors", *arguments)
        assert result.exit_code == 0, result.output
        assert f"backbone of step {step}" in result.stdout
        tensors, meta = files.load_file(tmp_path / "out.safetensors")
        assert tensors.keys() == backbone.state_dict().keys()
        torch.testing.assert_close(
            tensors["conv1.weight"], backbone.state_dict()["conv1.weight"] + step
        )
        assert (meta["step"], json.loads(meta["model"])["name"]) == (str(step), "resnet18")
    for bad in ((run, "--step", 5), (tmp_path / "nowhere",)):
        result = call("export", bad[0], tmp_path / "other.safetensors", *bad[1:])
        assert (result.exit_code, result.stderr[:7]) == (2, "error: ")
        assert not (tmp_path / "other.safetensors").exists()

    head = tmp_path / "head.safetensors"
    result = call("export", run, head, "--module", "projector")
    assert (result.exit_code, result.stdout) == (0, f"{head}: projector of step 7, 1 tensors\n")
    tensors, meta = files.load_file(head)
    assert [*tensors] == ["0.weight"]
    assert meta.keys() == {"format", "module", "method", "step", "seed"}
    assert meta["module"] == "projector"
    result = call("eval", head, "knn")
    assert (result.exit_code, result.stderr.partition(";")[0]) == (
        2,
        f"error: {head} holds the module 'projector' of a run and no encoder to evaluate",
    )
    result = call("export", run, tmp_path / "other.safetensors", "--module", "projecto")
    assert result.exit_code == 2
    assert "has no module 'projecto' (did you mean 'projector'?); it has: backbone, projector" in (
        result.stderr
    )


def test_module_runs_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scaletrain", "show", "config", str(tmp_path / "no.yaml")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'no.yaml'}: no such recipe\n"
