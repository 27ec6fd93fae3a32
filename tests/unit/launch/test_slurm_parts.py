"""What the SLURM launcher computes without a cluster."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from kit.data import write_shards

from scaletrain.config.recipe import ConfigError
from scaletrain.data.errors import DataError
from scaletrain.data.reading import groups, subset
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.subset_shards import SubsetShards
from scaletrain.launch.slurm import queue, task
from scaletrain.launch.slurm.launch import Launch
from scaletrain.launch.slurm.submit import Resources
from scaletrain.report import grid

PLACES = {"path": "train", "subset": "some.json", "groups": "some.safetensors"}


def test_torchrun_variables_of_the_last_task_of_an_uneven_job() -> None:
    slurm = {
        "SLURM_JOB_ID": "41", "SLURM_PROCID": "9", "SLURM_NTASKS": "10", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "3", "SLURM_STEP_TASKS_PER_NODE": "4,2(x3)",
        "SLURM_LAUNCH_NODE_IPADDR": "10.1.0.7", "SLURM_CPUS_PER_TASK": "6",
    }  # fmt: skip
    first = task.environment(slurm, "/shared/launch")
    assert (first["RANK"], first["WORLD_SIZE"]) == ("9", "10")
    assert (first["LOCAL_RANK"], first["LOCAL_WORLD_SIZE"]) == ("1", "2")
    assert (first["MASTER_ADDR"], first["OMP_NUM_THREADS"]) == ("10.1.0.7", "6")
    again = task.environment(slurm | {"SLURM_RESTART_COUNT": "1"}, "/shared/launch")
    changed = {key for key in first if first[key] != again[key]}
    assert changed == {"MASTER_PORT", "SCALETRAIN_ERROR_FILE", "SCALETRAIN_STOPPED_FILE"}


def test_ports_stay_in_their_range_and_spread() -> None:
    ports = {task.port(str(job), restart) for job in range(1000) for restart in range(2)}
    assert ports <= set(range(10_000, 32_000))
    assert len(ports) > 1850  # 2,000 throws into 22,000 fields leave about 1,913 different ones


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("(null)", 0),
        ("gpu:8", 8),
        ("gpu:a100:8(S:0-1)", 8),
        ("gpu:a100:4,gpu:h100:2,nvme:3", 6),
        ("nvme:2", 0),
        ("mygpu:3", 0),
    ],
)
def test_gpus_of_a_node(text: str, gpus: int) -> None:
    assert queue._gpus(text) == gpus


def test_what_ranks_would_refuse_of_a_subset_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the nodes are given the absolute places of its files."""
    shards = Shards(write_shards(tmp_path / "train", (20, 20)))
    subset.save(tmp_path / "some.json", shards, np.arange(24), "by hand")
    (tmp_path / "recipe.yaml").write_text("batch: 16\nepochs: 12\ndata: {lanes: 4}\n")
    monkeypatch.chdir(tmp_path)
    overrides = ("data.path=train", "data.subset=some.json", "data.groups=some.safetensors")
    made = Launch(tmp_path / "recipe.yaml", overrides, tmp_path / "run", [()])
    with pytest.raises(DataError, match=r"some\.safetensors cannot be read"):
        made.check(Resources())
    used = SubsetShards(shards, np.arange(24))
    groups.save(tmp_path / "some.safetensors", used, np.arange(24), "by hand")
    made.check(Resources())
    assert {f'data.{key}="{tmp_path}/{name}"' for key, name in PLACES.items()} <= {*made.overrides}
    made = Launch(tmp_path / "recipe.yaml", (*overrides, "batch=32"), tmp_path / "run", [()])
    with pytest.raises(DataError, match="the data set has 24 samples, fewer than batch=32"):
        made.check(Resources())


def test_grid_values_are_yaml() -> None:
    axes = ["optim.lr=0.1,2e-1", "data.views.0.scale=[0.2, 1],[0.08, 1]", "method=byol,swav"]
    got = grid.combinations(axes, seeds=2)
    assert len(got) == 16
    assert got[0] == ("optim.lr=0.1", "data.views.0.scale=[0.2, 1]", "method=byol", "seed=0")
    assert got[-1] == ("optim.lr=0.2", "data.views.0.scale=[0.08, 1]", "method=swav", "seed=1")
    assert grid.combinations([], 1) == [()]
    folders = {grid.folder(Path("runs"), element) for element in got}
    assert len(folders) == 16
    assert all(folder.parent == Path("runs") for folder in folders)


@pytest.mark.parametrize("axis", ["optim.lr", "optim.lr=", "=1", "optim.lr=[1"])
def test_grid_axis_that_cannot_be_read(axis: str) -> None:
    with pytest.raises(ConfigError, match="write KEY=VALUE,VALUE"):
        grid.combinations([axis], 1)


def test_grid_names_a_key_once() -> None:
    with pytest.raises(ConfigError, match="names seed twice"):
        grid.combinations(["seed=1,2"], 3)


def test_grid_files_are_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid.save(tmp_path, grid.combinations(["seed=1,2"], 1))
    grid.table(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert before.keys() == {"grid.json", "grid.csv"}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for write in (
            lambda: grid.save(tmp_path, grid.combinations(["seed=3"], 1)),
            lambda: grid.table(tmp_path),
        ):
            with pytest.raises(OSError, match="No space left"):
                write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    grid.save(tmp_path, grid.combinations(["seed=2,3"], 1))
    assert json.loads((tmp_path / "grid.json").read_text()) == [["seed=1"], ["seed=2"], ["seed=3"]]


@pytest.mark.parametrize("text", ["", "[", "{}", '["seed=1"]', "[[1]]", "[" * 100_000])
def test_damaged_grid_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text(text)
    for use in (lambda: grid.table(tmp_path), lambda: grid.save(tmp_path, [("seed=1",)])):
        with pytest.raises(ConfigError, match=r"grid\.json is not a list of a grid's runs"):
            use()
    with pytest.raises(ConfigError, match="contains no grid"):
        grid.table(tmp_path / "nowhere")


def test_folder_that_only_this_machine_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(queue, "_here", lambda node: node == "here")
    for kind, problem in (
        ("nfs4", None),
        ("lustre", None),
        ("ext4", None),
        ("tmpfs", "on this machine only"),
    ):
        monkeypatch.setattr(queue, "filesystem", lambda path, kind=kind: kind)
        assert queue.check_shared(Path("/shared/run"), ["here"]) is None
        if problem:
            with pytest.raises(queue.SlurmError, match=problem):
                queue.check_shared(Path("/shared/run"), ["here", "n7"])
        else:
            warned = queue.check_shared(Path("/shared/run"), ["here", "n7"])
            assert (warned is not None) == (kind == "ext4")
    assert queue.check_shared(Path("/tmp"), ["here"]) is None
