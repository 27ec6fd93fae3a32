"""The commands: what they pass on, and how failures end."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from scaletrain import exit_codes
from scaletrain.checkpoint import files
from scaletrain.checkpoint import writer as checkpoint
from scaletrain.cli import main as cli
from scaletrain.config import load
from scaletrain.config import schema as config
from scaletrain.core import Batch, Piece
from scaletrain.data.errors import DataError, LoaderError
from scaletrain.evals import run as evals
from scaletrain.nn import resnet
from scaletrain.report import cards

ROOT = Path(__file__).parents[2]
RECIPE = (
    "method: byol\nbatch: 32\nmodel: {name: resnet18, width: 0.25, stem: cifar}\ndata: "
    "{views: [{size: 32, count: 2}]}\n"
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "toy.yaml").write_text(RECIPE)
    return tmp_path / "toy.yaml"


def call(*arguments: object, **environment: str) -> Any:
    clean = {
        "RANK": None,
        "SCALETRAIN_ERROR_FILE": None,
        "SCALETRAIN_DEBUG": None,
        "COLUMNS": "200",
    }
    return CliRunner(env={**clean, **environment}).invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Puts a function in the place of scaletrain.train.loop.train."""

    def replace(function: Callable[..., None]) -> None:
        monkeypatch.setitem(sys.modules, "scaletrain.train.loop", SimpleNamespace(train=function))  # type: ignore[arg-type]

    return replace


def test_help_does_not_wait_for_torch() -> None:
    script = (
        "import sys\nfrom scaletrain.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: print('\\nheavy', sorted({'torch', 'numpy', 'pydantic'} & "
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
    for command in ("train", "eval", "export", "show"):
        assert f"  {command} " in done.stdout


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
        "--profile",
        "--change",
    )
    assert result.exit_code == 0, result.output
    expected = load.load(recipe, ["optim.lr=0.5", "data.lanes=4"])
    assert seen == [
        (
            expected,
            Path("out"),
            {"init": Path("x.st"), "trace": True, "change": True, "umask": None},
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
    plain = {"init": None, "trace": False, "change": False, "umask": None}
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
    )
    assert call("eval", "run", "knn", "linear", *options).stdout == "first line\nlast line: knn\n"
    overrides = ["knn.k=[1]", "linear.epochs=2"]
    passed = {
        "train": "a",
        "test": "b",
        "overrides": overrides,
        "encoder": "pixels",
        "labels": Path("c"),
        "same_numbers": True,
    }
    assert seen == [(Path("run"), ["knn", "linear"], passed)]


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
        tensors["method.projector.weight"] = torch.zeros(3)
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


def raising(error: BaseException) -> Callable[..., None]:
    def train(*_: Any, **__: Any) -> None:
        raise error

    return train


def split_unevenly(*_: Any, **__: Any) -> None:
    Batch((torch.zeros(1, 3, 3, 8, 8),), torch.zeros(3), torch.zeros(3), torch.zeros(2, 3)).split(2)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (raising(DataError("a.tar at byte 512: truncated")), "a.tar at byte 512: truncated"),
        (
            raising(PermissionError(13, "Permission denied", "/run")),
            "[Errno 13] Permission denied: '/run'",
        ),
        (
            split_unevenly,
            "3 samples per rank do not split into 2 equal micro-batches",
        ),  # a plain ValueError of our own code
    ],
)
def test_expected_failures_are_one_line(
    recipe: Path, training: Any, fault: Callable[..., None], text: str
) -> None:
    training(fault)
    result = call("train", recipe)
    assert (result.exit_code, result.stderr) == (2, f"error: {text}\n")
    for shown in (call("--debug", "train", recipe), call("train", recipe, SCALETRAIN_DEBUG="1")):
        assert isinstance(
            shown.exception, ValueError | OSError
        )  # it gets through, with its traceback


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ECONNRESET, "Connection reset by peer"), 75),
        (OSError(errno.ENOSPC, "No space left on device", "metrics"), 75),
        (OSError(errno.ESTALE, "Stale file handle"), 75),
        (TimeoutError("no answer"), 75),
        (MemoryError("4 GiB"), 75),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 75),
        (LoaderError("worker 1 was killed"), 75),
        (files.CheckpointError("step 3 was not saved", 75), 75),
        (files.CheckpointError("step 3 is damaged"), 2),
        (OSError(errno.EACCES, "Permission denied"), 2),
        (OSError(errno.ENOENT, "No such file or directory"), 2),
    ],
)
def test_exit_codes(recipe: Path, training: Any, error: Exception, code: int) -> None:
    training(raising(error))
    result = call("train", recipe)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_what_failed_passingly_underneath_may_be_tried_again() -> None:
    error = DataError("shard 7 cannot be read")
    assert exit_codes.of(error) == 2
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    assert exit_codes.of(error) == 75


@pytest.mark.parametrize(
    "error",
    [TypeError("defect"), ValueError("of another library"), RuntimeError("defect"), KeyError("x")],
)
def test_defects_keep_their_traceback(recipe: Path, training: Any, error: Exception) -> None:
    training(raising(error))
    result = call("train", recipe)
    assert (result.exit_code, result.exception) == (1, error)


def test_bad_recipe_and_bad_usage(recipe: Path) -> None:
    result = call("train", recipe, "optim.lrr=1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        result.stderr == "error: command line: unknown key 'optim.lrr'; did you mean 'optim.lr'?\n"
    )
    for arguments in (("train",), ("train", recipe, "--rum", "x"), ("trian",), ("eval", "run"), ()):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "Usage: " in result.output
        assert "Traceback" not in result.output


def test_interrupt_is_quiet(recipe: Path, training: Any) -> None:
    training(raising(KeyboardInterrupt()))
    result = call("train", recipe)
    assert (result.exit_code, result.stderr) == (130, "")


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("bad shard"), 2), (RuntimeError("defect"), 1)]
)
def test_first_rank_speaks_for_all(
    recipe: Path, training: Any, tmp_path: Path, error: Exception, code: int
) -> None:
    place = str(tmp_path / "first-failure")
    training(raising(error))
    first = call("train", recipe, RANK="1", SCALETRAIN_ERROR_FILE=place)
    assert first.exit_code == code
    assert first.stderr == "error: bad shard\n" if code == 2 else first.exception is error
    training(raising(RuntimeError("connection closed by peer")))
    later = call("train", recipe, RANK="2", SCALETRAIN_ERROR_FILE=place)
    assert (later.exit_code, later.output) == (code, "")
    usage = call("train", recipe, "--rum", RANK="3", SCALETRAIN_ERROR_FILE=place)
    assert (usage.exit_code, usage.output) == (code, "")


def test_module_runs_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scaletrain", "show", "config", str(tmp_path / "no.yaml")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'no.yaml'}: no such recipe\n"
