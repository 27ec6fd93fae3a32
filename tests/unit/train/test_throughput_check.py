"""The throughput check: parts that tile a step, and the table of a run on synthetic data."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import ranks
from kit.data import write_shards
from typer.testing import CliRunner

from scaletrain.cli import main as cli_main
from scaletrain.config import load
from scaletrain.runtime import timing
from scaletrain.runtime.timing import BACKWARD, COPY, FORWARD, UPDATE, WAIT, span
from scaletrain.train import monitor, throughput_check
from scaletrain.train.throughput_check import PARTS, REST, Timer, measuring

ROOT = Path(__file__).parents[3]
RECIPE = """
method: {name: byol, hidden: 16, dim: 8}
batch: 16
model: {name: resnet10, width: 0.0625, stem: cifar}
data: {lanes: 4, workers: 1, views: [{size: 16, count: 2}]}
"""


class Clockwork:
    """A clock that only moves when told, in seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_parts_tile_the_step_and_nested_ones_are_taken_out() -> None:
    clock = Clockwork()
    timer = Timer(clock, lambda b, a: b - a, skip=1)

    def one(wait: float) -> None:
        with span(WAIT):
            clock.now += wait
            with span(COPY):
                clock.now += 2
            clock.now += 4
        clock.now += 8
        for _ in range(2):  # micro-batches
            with span(FORWARD):
                clock.now += 16
        timer.step()

    with timing.listening(timer.span):
        one(1000)  # warm-up
        one(1)
        clock.now += 0.5  # between the steps: part of the next
        one(3)
    one(99)  # nobody listens
    assert timer.read()[:2] == [
        {REST: 8, WAIT: 5, COPY: 2, FORWARD: 32},
        {REST: 8.5, WAIT: 7, COPY: 2, FORWARD: 32},
    ]


def test_a_part_that_raises_is_closed() -> None:
    clock = Clockwork()
    timer = Timer(clock, lambda b, a: b - a)
    with contextlib.suppress(KeyError), timer.span(WAIT):
        clock.now += 1
        raise KeyError
    clock.now += 2
    timer.step()
    assert timer.read() == [{WAIT: 1, REST: 2}]


def test_long_runs_keep_the_last_steps() -> None:
    clock = Clockwork()
    timer = Timer(clock, lambda b, a: b - a)
    for number in range(throughput_check.KEPT + 5):
        clock.now += number
        timer.step()
    assert [s[REST] for s in timer.read()] == list(range(5, throughput_check.KEPT + 5))


def test_summary_leaves_out_odd_steps_and_adds_up() -> None:
    steps = [{FORWARD: 0.010, REST: 0.001 * i} for i in range(8)]
    steps[3] = {FORWARD: 0.010, REST: 9.0}  # a checkpoint
    found = throughput_check.summary(steps)
    assert found["median"] == pytest.approx(14.5)  # of rests 0 1 2 4 5 6 7 9000
    assert found["parts"][FORWARD] == pytest.approx(10)
    assert found["parts"][REST] == pytest.approx((2 + 4 + 5 + 6) / 4)
    assert found["p95"] == pytest.approx(17)
    assert set(found["parts"]) == set(PARTS)


def test_report_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers worked out by hand: 2 nodes of 1 rank, 32 samples per step, 100 ms of which a tenth
    is waiting.
    """
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    zero = dict.fromkeys(PARTS, 0.0)
    ranks = [
        {
            "median": 100.0,
            "p95": 120.0,
            "parts": {**zero, WAIT: 5.0, FORWARD: 95.0},
            "memory": {"memory/rss_peak_mb": 7.0},
        },
        {
            "median": 100.0,
            "p95": 130.0,
            "parts": {**zero, WAIT: 15.0, FORWARD: 85.0},
            "memory": {"memory/rss_peak_mb": 9.0},
        },
    ]
    cfg = load.build(
        {
            "batch": 32,
            "data": {"path": "synthetic", "views": [{"count": 2}, {"size": 96, "count": 6}]},
        }
    )
    found = throughput_check.report(cfg, ranks, 40)
    assert found["images_per_second"] == pytest.approx(320)
    assert found["views_per_second"] == pytest.approx(320 * 8)
    assert found["loader_images_per_second"] == pytest.approx(
        {"process": 16 / 0.090, "node": 16 / 0.090}
    )
    assert (found["step_ms"], found["memory"]) == (
        {"median": 100.0, "p95": 130.0},
        {"rss_peak_mb": 9.0},
    )
    assert (found["parts_ms"][WAIT], found["parts_ms_slowest"][WAIT]) == (10.0, 15.0)


def test_marks_cost_nothing_when_nobody_listens(tmp_path: Path) -> None:
    assert span(FORWARD) is span(BACKWARD)
    cfg = load.build({"data": {"path": "elsewhere"}})
    with measuring(cfg, tmp_path, 5, torch.device("cpu")) as watch:
        watch.step()
        assert isinstance(watch, monitor.NullObserver)
        assert span(FORWARD) is span(UPDATE)
    assert not list(tmp_path.iterdir())


def train(tmp_path: Path, *arguments: str) -> str:
    (tmp_path / "toy.yaml").write_text(RECIPE)
    words = [str(tmp_path / "toy.yaml"), *arguments, "--run", str(tmp_path / "run")]
    alone = {"RANK": None, "SCALETRAIN_ERROR_FILE": None, "COLUMNS": "100"}
    result = CliRunner(env=alone).invoke(cli_main.app, ["train", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("procs", [1, 2])
def test_the_command(tmp_path: Path, procs: int) -> None:
    if procs == 1:
        shown = train(tmp_path, "--data", "synthetic", "--steps", "26")
        for word in ("images/s", "views/s", *PARTS, "memory: ", "loader: "):
            assert word in shown
    else:
        (tmp_path / "toy.yaml").write_text(RECIPE)
        settings = ("data.path=synthetic", "steps=26", "optim.warmup_epochs=0")
        ranks.train(procs, tmp_path / "toy.yaml", tmp_path / "run", *settings)
    found: dict[str, Any] = json.loads((tmp_path / "run" / throughput_check.FILE).read_text())
    assert (found["processes"], found["processes_per_node"], found["steps_measured"]) == (
        procs,
        procs,
        16,
    )
    parts = found["parts_ms"]
    assert all(parts[name] > 0 for name in PARTS)
    assert parts[FORWARD] > parts[COPY]
    assert sum(parts.values()) == pytest.approx(found["step_ms"]["median"], rel=0.5)
    assert found["images_per_second"] == pytest.approx(16_000 / found["step_ms"]["median"])
    assert found["loader_images_per_second"]["node"] == pytest.approx(
        procs * found["loader_images_per_second"]["process"]
    )
    assert 50 < found["memory"]["rss_peak_mb"] < 20_000
    assert (tmp_path / "run" / "checkpoints" / "step-00000026").is_dir()  # as any run


def test_real_data_is_not_a_rehearsal(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", (16, 16))
    shown = train(tmp_path, "--data", str(shards), "--steps", "2", "optim.warmup_epochs=0")
    assert "step 2/2" in shown
    assert "throughput check" not in shown
    assert not (tmp_path / "run" / throughput_check.FILE).exists()
