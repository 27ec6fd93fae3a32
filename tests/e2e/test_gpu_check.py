"""`make gpu-check` on a machine without a GPU, in its smallest settings, and the counter of kernel
launches on a simulated one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu import launches, prepare
from benchmarks.gpu.simulated import LaunchCounter, simulated

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "byol_r18_cifar10.yaml"


def gpu_check(tmp_path: Path, parts: str) -> subprocess.CompletedProcess[str]:
    settings = {"DEVICE": "cpu", "TINY": "1", "PARTS": parts, "BUDGET": "900"}
    folders = {name: str(tmp_path / name.lower()) for name in ("WORK", "OUT", "PREPARED")}
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu" / "gpu_check.sh")],
        env=os.environ | settings | folders | {"PYTHON": sys.executable},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_parts_run_without_a_gpu(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "parity ranks")
    logs = "\n".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"

    summary = (tmp_path / "out" / "summary.txt").read_text()
    for result in (
        "parity: 3 of 3 agree with float64 on the CPU",
        "ok   a step that is not finite leaves no trace",
        "data.augment=device: 0.00% of the pixels differ",
        "ok   a checkpoint of this device is restored on the CPU bit for bit",
        "ok   byol: two ranks on one device (gloo) and one process",
    ):
        assert result in summary
    assert done.stdout.splitlines()[-2] == "nothing"


def test_a_part_that_fails_is_named(tmp_path: Path) -> None:
    """Shards cannot be written into what is not a folder."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "cifar10").touch()
    (tmp_path / "work" / "imagenet_sample").touch()

    done = gpu_check(tmp_path, "shards")

    assert done.returncode == 1
    assert "FAIL shards cifar10: " in done.stdout.partition("=== failed or skipped")[2]


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "parity sped")
    assert done.returncode == 2
    assert "error: PARTS has ['sped']; there are tests, parity, " in done.stderr


def test_wheels_are_what_the_machine_lacks() -> None:
    usual = dict.fromkeys(prepare.USUAL)
    carried = prepare.missing(usual)
    assert {"pydantic", "pydantic-core", "ruamel-yaml"} <= set(carried)
    assert not set(usual) & set(carried)

    everything: dict[str, str | None] = {**usual, **carried}
    assert prepare.missing(everything) == {}
    assert "ruamel-yaml" in prepare.missing(everything | {"ruamel-yaml": "0.17"})


def test_launches_and_waits_are_counted() -> None:
    counter = LaunchCounter()
    with simulated() as device, counter:
        x = torch.ones(3, device=device)
        y = x.view(3, 1) + 1
        with counter.listen("reading"):
            assert y.sum().item() == 1.0
        y[x > 0].mul_(2)
        torch.tensor([1.0, 2.0]).to(device, non_blocking=True)

    assert [(wait.reason, wait.phase) for wait in counter.waits] == [
        ("reads a number", "reading"),
        ("mask as index", "rest"),
    ]
    calls = ("ones", "add", "sum", "gt", "index", "mul_", "_to_copy")
    assert counter.by_call == dict.fromkeys(calls, 1)


def test_a_step_waits_once() -> None:
    counter = launches.count(RECIPE, 16, ["model.width=0.0625"])
    assert [wait.site.partition(":")[0] for wait in counter.waits] == ["scaletrain/engines/base.py"]
    assert set(counter.by_phase) == {
        "host to device",
        "forward",
        "backward",
        "optimizer + EMA",
        "rest",
    }
    assert counter.by_call["batch_norm_stats"] == counter.by_call["batch_norm_elemt"] > 0
    assert {copy.blocking for copy in counter.copies if copy.direction == "to device"} == {False}
