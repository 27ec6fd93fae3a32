"""`launchers/demo.py` in a copy of the tree, over a few made-up images: killed in mid-training,
gone on with, run again.
"""

from __future__ import annotations

import fcntl
import gzip
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scaletrain.train import records

ROOT = Path(__file__).parents[2]
CHANGES = (
    *(
        "batch=32",
        "epochs=2",
        "data.lanes=8",
        "data.workers=0",
        "data.views.0.size=16",
        "model.name=resnet10",
        "model.width=0.0625",
    ),
    *("checkpoint.every_steps=5", "monitor.every=1", "monitor.images_every=0"),
)
STEPS = 40  # two epochs of 640 images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Fashion-MNIST's four files: ten classes that differ in where a bright band lies."""
    folder = tmp_path / "images"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for prefix, count in (("train", 640), ("t10k", 80)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = draw.integers(0, 100, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[2 * label + 4 : 2 * label + 8] += 120
        for array, kind in ((pixels, "images-idx3"), (labels, "labels-idx1")):
            head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(
                gzip.compress(head + array.tobytes())
            )
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The demonstration keeps everything below its own tree."""
    for name in ("configs", "launchers", "shards"):
        shutil.copytree(
            ROOT / name, tmp_path / "clone" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path / "clone"


def start(clone: Path, *arguments: object) -> subprocess.Popen[str]:
    """As a user would, from another folder."""
    command = [sys.executable, str(clone / "launchers" / "demo.py"), *map(str, arguments)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        "HOME": str(clone.parent),
    }
    return subprocess.Popen(
        command,
        cwd=clone.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def refused(process: subprocess.Popen[str]) -> str:
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err


def metrics(clone: Path) -> list[records.StepRecord]:
    return records.read(clone / "demo" / "run").steps


def table(text: str) -> dict[str, tuple[float, ...]]:
    """Per cent of kNN and of the probe, by row."""
    rows = re.findall(
        r"^ *(raw pixels|untrained encoder|trained encoder)"
        r" +(\d+\.\d) \[[^]]+\] +(\d+\.\d) \[[^]]+\] *$",
        text,
        re.MULTILINE,
    )
    return {name: (float(knn), float(linear)) for name, knn, linear in rows}


def test_killed_in_training_gone_on_with_and_run_again(images: Path, clone: Path) -> None:
    process = start(clone, images, *CHANGES)
    deadline = time.monotonic() + 240
    while len(metrics(clone)) < 12:
        assert process.poll() is None, "".join(process.communicate())
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert "sound" in process.communicate()[0]
    before = metrics(clone)
    assert len(before) < STEPS
    assert not (clone / "demo" / "run" / "evals").exists()

    second = finish(start(clone, images, *CHANGES))
    resumed = re.search(r"^resumed from step (\d+)", second, re.MULTILINE)
    assert resumed, second
    assert 10 <= int(resumed[1]) <= len(before)
    assert "skipped: the shards are written" in second
    assert "skipped: these shards were found sound before" in second
    assert metrics(clone)[: int(resumed[1])] == before[: int(resumed[1])], "it began anew"
    assert [record.step for record in metrics(clone)] == list(range(STEPS))
    found = table(second)
    assert list(found) == ["raw pixels", "untrained encoder", "trained encoder"]
    assert all(value > 15 for row in found.values() for value in row), "chance is 10 %"
    for place in (
        "demo/run",
        "demo/shards/train",
        "demo/run/tensorboard",
        "tensorboard --logdir",
        "shards/folder.py",
    ):
        assert place in second
    assert any((clone / "demo" / "run" / "tensorboard").iterdir())

    third = finish(start(clone, images, *CHANGES))
    assert (
        third.count("skipped: ") == 10
    )  # images, shards, verification, training and two results of three encoders
    assert table(third) == found
    assert len(metrics(clone)) == STEPS

    other = start(clone, images, *CHANGES, "optim.lr=0.7")
    out, err = other.communicate(timeout=120)
    assert other.returncode == 2
    assert "optim.lr: 0.3 -> 0.7" in err
    assert out.count("skipped: ") == 3


def test_one_clear_error(images: Path, clone: Path) -> None:
    (images / "t10k-labels-idx1-ubyte.gz").unlink()
    assert f"{images} has no t10k-labels-idx1-ubyte.gz; give the folder that holds" in refused(
        start(clone, images)
    )
    assert "one folder of images, not 2" in refused(start(clone, images, images))
    with (clone / "demo" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"another demonstration is at work in {clone / 'demo'}" in refused(
            start(clone, images)
        )
    assert [path.name for path in (clone / "demo").iterdir()] == [".lock"]
