"""Bad input ends in one clear error with exit code 2, no traceback, and nothing lost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from scaletrain.checkpoint import files, reader
from scaletrain.cli import main as cli
from scaletrain.config.schema import ModelConfig
from scaletrain.nn import resnet
from scaletrain.train import records

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
RECIPE = """
batch: 8
steps: 4
data: {lanes: 4, window: 2, workers: 0, views: [{size: 16, count: 2, blur: 0.0}]}
model: {name: resnet10, width: 0.0625, stem: cifar}
method: {name: byol, hidden: 16, dim: 8}
optim: {lr: 0.1, warmup_epochs: 0}
checkpoint: {every_steps: 2, keep_last: 5}
monitor: {every: 1, images_every: 0}
"""


def images(folder: Path, count: int = 16) -> Path:
    draw = np.random.default_rng(0)
    for i in range(count):
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(
            str(folder / f"class{i % 2}" / f"{i}.png"),
            draw.integers(0, 256, (18, 18, 3), dtype=np.uint8),
        )
    return folder


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    done = script("shards/folder.py", images(folder / "images"), folder / "train", "--per-shard", 8)
    assert done.returncode == 0, done.stderr
    return folder / "train"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def train(recipe: Path, run: Path, *overrides: object) -> Any:
    arguments = ["train", str(recipe), *map(str, overrides), "--run", str(run)]
    return CliRunner(
        env={"RANK": None, "SCALETRAIN_ERROR_FILE": None, "SCALETRAIN_DEBUG": None}
    ).invoke(cli.app, arguments)


def refused(result: Any, *texts: str) -> None:
    code = result.exit_code if hasattr(result, "exit_code") else result.returncode
    assert code == 2, result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    for text in texts:
        assert text in result.stderr.replace("\n", " ")


def test_data_folder(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(train(recipe, tmp_path / "run"), "data.path is empty")
    refused(
        train(recipe, tmp_path / "run", f"data.path={tmp_path / 'nowhere'}"),
        str(tmp_path / "nowhere"),
    )
    refused(
        train(recipe, tmp_path / "run", f"data.path={tmp_path / 'empty'}"), str(tmp_path / "empty")
    )


def test_class_folder_without_images(tmp_path: Path) -> None:
    source = images(tmp_path / "images")
    (source / "hollow").mkdir()
    refused(script("shards/folder.py", source, tmp_path / "out"), "hollow")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["truncated", "altered"])
def test_shard_damaged_after_indexing(
    fault: str, shards: Path, recipe: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "train"
    copy.mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    victim = sorted(copy.glob("*.tar"))[1]
    content = bytearray(victim.read_bytes())
    if fault == "truncated":
        del content[len(content) // 2 :]
    else:
        at = content.index(b"IDAT") + 40
        content[at] ^= 1
    victim.write_bytes(content)
    refused(train(recipe, tmp_path / "run", f"data.path={copy}"), victim.name)


def test_batch_that_does_not_divide(shards: Path, recipe: Path, tmp_path: Path) -> None:
    data = f"data.path={shards}"
    refused(train(recipe, tmp_path / "run", data, "data.lanes=3"), "3", "8", "lanes")
    refused(train(recipe, tmp_path / "run", data, "batch=64"), "64", "16")
    ranks = script(
        "launchers/local.py",
        "--procs",
        2,
        recipe,
        data,
        "batch=9",
        "data.lanes=3",
        "--run",
        tmp_path / "run2",
    )
    refused(ranks, "9", "2")


def test_misspelt_key(recipe: Path, tmp_path: Path) -> None:
    refused(
        train(recipe, tmp_path / "run", "optim.weight_decai=0"),
        "optim.weight_decai",
        "did you mean 'optim.weight_decay'",
    )
    assert not (tmp_path / "run").exists()


def test_run_folder(shards: Path, recipe: Path, tmp_path: Path) -> None:
    data = f"data.path={shards}"
    (tmp_path / "file").write_text("")
    refused(train(recipe, tmp_path / "file" / "run", data), "cannot write the run folder")
    assert train(recipe, tmp_path / "run", data).exit_code == 0
    refused(
        train(recipe, tmp_path / "run", data, "optim.lr=0.2"), "optim.lr: 0.1 -> 0.2", "--change"
    )
    assert train(recipe, tmp_path / "run", data, "steps=6").exit_code == 2
    changed = train(recipe, tmp_path / "run", data, "steps=6", "--change")
    assert changed.exit_code == 0
    saved = reader.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.step == 6
    assert [r.step for r in records.read(tmp_path / "run").steps] == [0, 1, 2, 3, 4, 5]


def test_checkpoint_of_another_model(shards: Path, recipe: Path, tmp_path: Path) -> None:
    data = f"data.path={shards}"
    assert train(recipe, tmp_path / "run", data).exit_code == 0
    other = train(recipe, tmp_path / "run", data, "model.width=0.125", "--change")
    refused(other, "belongs to another model", "backbone")
    refused(
        train(recipe, tmp_path / "run", data, "method=simclr", "--change"),
        "belongs to another model",
    )


def test_a_flipped_bit_is_refused_by_name_and_the_step_before_is_used(
    shards: Path, recipe: Path, tmp_path: Path
) -> None:
    data = f"data.path={shards}"
    assert train(recipe, tmp_path / "run", data).exit_code == 0
    newest = next((tmp_path / "run" / "checkpoints" / "step-00000004").glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    again = script("launchers/local.py", "--procs", 1, recipe, data, "--run", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert newest.name in again.stderr
    assert "resumed from step 2" in again.stdout + again.stderr


def test_init_takes_a_backbone_and_refuses_another(
    shards: Path, recipe: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    fitting = resnet.ResNet(ModelConfig(name="resnet10", width=0.0625, stem="cifar"))
    fitting.bn1.running_mean.fill_(0.25)
    foreign = fitting.state_dict() | {
        "fc.weight": torch.zeros(10, fitting.features),
        "fc.bias": torch.zeros(10),
    }
    files.export(foreign, tmp_path / "fits.safetensors", {})
    files.export(
        resnet.ResNet(ModelConfig(name="resnet10")).state_dict(), tmp_path / "wide.safetensors", {}
    )
    arguments = (f"data.path={shards}", "steps=1", "optim.lr=1e-12", "checkpoint.every_steps=1")
    refused(
        train(recipe, tmp_path / "a", *arguments, "--init", tmp_path / "wide.safetensors"),
        "wide.safetensors",
        "conv1.weight",
    )
    assert (
        train(recipe, tmp_path / "b", *arguments, "--init", tmp_path / "fits.safetensors").exit_code
        == 0
    )
    saved = reader.latest(tmp_path / "b" / "checkpoints")
    assert saved is not None
    for prefix in ("backbone", "target_backbone"):
        weight = saved.read(f"method.{prefix}.conv1.weight").view_as(fitting.conv1.weight)
        torch.testing.assert_close(
            weight, nn.Parameter(fitting.conv1.weight.detach()).data, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize(
    ("prefix", "dropped", "note"),
    [
        ("module.", (), "its names begin with 'module.'"),
        ("module.encoder_q.", (), "its names begin with 'module.encoder_q.'"),
        (
            "",
            ("num_batches_tracked",),
            "12 counters num_batches_tracked are not in it and start at zero",
        ),
    ],
)
def test_init_takes_the_files_of_others_and_says_what_it_passed_over(
    prefix: str, dropped: tuple[str, ...], note: str, shards: Path, recipe: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    network = resnet.ResNet(ModelConfig(name="resnet10", width=0.0625, stem="cifar"))
    tensors = {
        prefix + name: value
        for name, value in network.state_dict().items()
        if not name.endswith(dropped or "none")
    }
    tensors |= {f"{prefix}fc.weight": torch.zeros(10, network.features), "queue": torch.zeros(3)}
    files.export(tensors, tmp_path / "file.safetensors", {})
    arguments = (
        f"data.path={shards}",
        "steps=1",
        "optim.lr=1e-12",
        "--init",
        tmp_path / "file.safetensors",
    )
    if (
        not prefix
    ):  # a queue among the backbone's own names cannot be told from a part of another network
        refused(
            train(recipe, tmp_path / "run", *arguments),
            "queue is (3,) in the file and absent in the model",
        )
        del tensors["queue"]
        files.export(tensors, tmp_path / "file.safetensors", {})
    begun = train(recipe, tmp_path / "run", *arguments)
    assert begun.exit_code == 0, begun.stderr
    assert note in begun.stdout
    assert (
        f"not of the backbone and were left out: {prefix}fc.weight{', queue' if prefix else ''}"
        in begun.stdout
    )
    saved = reader.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    weight = saved.read("method.target_backbone.conv1.weight").view_as(network.conv1.weight)
    torch.testing.assert_close(weight, network.conv1.weight.detach(), rtol=0, atol=1e-6)


def test_init_refuses_a_file_of_several_networks_that_fit(
    shards: Path, recipe: Path, tmp_path: Path
) -> None:
    network = resnet.ResNet(ModelConfig(name="resnet10", width=0.0625, stem="cifar")).state_dict()
    both = {f"module.{which}.{name}": value for which in "ab" for name, value in network.items()}
    files.export(both, tmp_path / "two.safetensors", {})
    result = train(
        recipe,
        tmp_path / "run",
        f"data.path={shards}",
        "steps=1",
        "--init",
        tmp_path / "two.safetensors",
    )
    refused(result, "several networks that fit this model, behind 'module.a.', 'module.b.'")


@pytest.mark.parametrize("threads", ["4,2", "abc", "0", "-1", "1e3"])
def test_odd_numbers_of_threads_are_no_error(
    threads: str, shards: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    begun = train(recipe, tmp_path / "run", f"data.path={shards}", "steps=1")
    torch.set_num_threads(1)
    assert begun.exit_code == 0, begun.stderr
    assert (f"warning: OMP_NUM_THREADS={threads} is not a number of threads" in begun.stderr) == (
        threads != "4,2"
    )


def test_disk_full_while_saving_keeps_the_last_good_checkpoint(
    shards: Path, recipe: Path, tmp_path: Path
) -> None:
    """The file size limit makes writing fail as a full disk does, from the second checkpoint on."""
    run = tmp_path / "run"
    assert train(recipe, run, f"data.path={shards}", "steps=2").exit_code == 0
    size = max(p.stat().st_size for p in (run / "checkpoints").rglob("*.safetensors"))

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    command = [
        sys.executable,
        "-m",
        "scaletrain",
        "train",
        str(recipe),
        f"data.path={shards}",
        "--run",
        str(run),
        "--change",
    ]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=False, preexec_fn=limit
    )
    refused(done, "step-00000004", "step 2")
    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    assert saved.step == 2
