"""`scaletrain compare`: what cards and records tell of several runs, and what they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from scaletrain import compare as module
from scaletrain import config
from scaletrain.cli import app
from scaletrain.compare import compare
from scaletrain.recipe import ConfigError


def make(root: Path, name: str, scores: dict[int, float], *, batch: int, steps: int, speed: float = 360.0, **card: Any) -> Path:
    """A run of 10 steps an epoch, recorded every 7 steps and at its end, with a card of each step in `scores`."""
    run = root / name
    (run / "evals").mkdir(parents=True)
    (run / "config.yaml").write_text(config.dump(config.build({"batch": batch, "data": {"lanes": 1}, "method": "byol"})))
    recorded = [s for s in range(steps) if s % 7 == 0 or s == steps - 1]
    lines = [json.dumps({"step": s, "epoch": s // 10, "speed/images_per_second": speed}) for s in recorded]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for step, score in scores.items():
        content = {
            "benchmark": "linear",
            "encoder": "trained",
            "step": step,
            "metrics": {"linear": score, "linear_per_class": score, "linear_top5": 99.0},
            "protocol": {"epochs": 5},
            "data": {"train": {"sha256": "a"}, "test": {"sha256": "b"}},
        } | card
        (run / "evals" / f"{content['benchmark']}-step-{step}-{len(card)}.json").write_text(json.dumps(content))
    return run


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    return make(tmp_path, "slow", {50: 60.0, 100: 70.0, 200: 75.0}, batch=36, steps=200)


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    return make(tmp_path, "fast", {50: 71.0, 100: 74.0, 150: 80.0}, batch=72, steps=150, speed=720.0)


def test_points_count_epochs_images_and_hours(slow: Path, fast: Path) -> None:
    found = compare([slow, fast])
    assert found["metric"] == "linear"
    assert [p["epochs"] for p in found["points"][str(slow)]] == [5, 10, 20]
    assert [p["images"] for p in found["points"][str(fast)]] == [3600, 7200, 10800]
    assert [p["hours"] for p in found["points"][str(slow)]] == pytest.approx([50 / 36000, 100 / 36000, 200 / 36000])
    assert [p["hours"] for p in found["points"][str(fast)]] == pytest.approx([50 / 36000, 100 / 36000, 150 / 36000])
    assert found["alike"]


def test_time_to_the_others_final_accuracy(slow: Path, fast: Path) -> None:
    one, other = compare([slow, fast])["reached"]
    assert (one["run"], one["other"], one["accuracy"], one["point"]) == (str(slow), str(fast), 80.0, None)
    assert (other["run"], other["accuracy"], other["point"]["step"]) == (str(fast), 75.0, 150)  # 74 at step 100 is not enough
    assert other["images_share"] == pytest.approx(10800 / 7200)
    assert other["hours_share"] == pytest.approx(150 / 200)


def test_a_pause_is_not_training(slow: Path, fast: Path) -> None:
    """What counts is the speed of each interval: the second half at half the speed takes twice as long."""
    records = [json.loads(line) for line in (slow / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record["speed/images_per_second"] = 360.0 if record["step"] < 99 else 180.0
    (slow / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 2')
    found = compare([slow, fast])["points"][str(slow)]
    assert [p["hours"] for p in found] == pytest.approx([50 / 36000, 101 / 36000, 301 / 36000], rel=0.02)


def test_other_cards_are_not_mixed_in(slow: Path, fast: Path, tmp_path: Path) -> None:
    make(tmp_path / "x", "y", {}, batch=1, steps=1)
    for number, change in enumerate(({"encoder": "untrained"}, {"data": {"labels": {}, "test": {}}}, {"benchmark": "knn"})):
        content = json.loads(next((slow / "evals").glob("linear-step-50*")).read_text()) | {"step": 200} | change
        if "benchmark" in change:
            content["metrics"] = {"knn_20": 9.0, "knn_20_per_class": 9.0}
        (slow / "evals" / f"other-{number}.json").write_text(json.dumps(content))
    found = compare([slow, fast])
    assert (found["metric"], found["points"][str(slow)][-1]["accuracy"]) == ("linear", 75.0)
    with pytest.raises(ConfigError, match=r"fast/evals has no cards of 'knn_20'; it has linear"):
        compare([slow, fast], "knn_20")
    with pytest.raises(ConfigError, match=r"no cards of 'liner'; did you mean 'linear'"):
        compare([slow, fast], "liner")


def test_a_run_without_records_is_counted_in_images(slow: Path, fast: Path) -> None:
    (slow / "metrics.jsonl").unlink()
    found = compare([slow, fast])
    assert next((p["epochs"], p["hours"], p["images"]) for p in found["points"][str(slow)]) == (None, None, 1800)
    assert found["reached"][1]["hours_share"] is None


def test_what_cannot_be_compared_is_said(slow: Path, fast: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no benchmark has cards of all"):
        compare([slow, make(tmp_path, "none", {}, batch=4, steps=20)])
    with pytest.raises(ConfigError, match="named twice"):
        compare([slow, slow])
    other = make(tmp_path, "other", {100: 70.0}, batch=4, steps=100, protocol={"epochs": 100})
    found = compare([slow, other])
    assert not found["alike"]
    console = Console(width=160)
    with console.capture() as shown:
        module.show(found, console)
    assert "these cards differ in protocol or test set" in shown.get()
    (fast / "evals" / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"broken\.json is no card of `scaletrain eval`"):
        compare([slow, fast])


def test_the_command(slow: Path, fast: Path) -> None:
    run = CliRunner().invoke(app, ["compare", str(slow), str(fast), "--json"])
    assert json.loads(run.stdout) == compare([slow, fast])
    shown = CliRunner().invoke(app, ["compare", str(slow), str(fast)], env={"COLUMNS": "400"})
    assert "never" in shown.stdout
    assert "0.75" in shown.stdout
    assert CliRunner().invoke(app, ["compare", str(slow), str(slow)]).exit_code == 2
