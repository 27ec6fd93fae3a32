"""`scaletrain compare`: what cards and records tell of several runs, and what they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evals_kit import backbone, run_folder, save, settings, shards
from rich.console import Console
from typer.testing import CliRunner

from scaletrain import compare as module
from scaletrain import config, evals, progress
from scaletrain.cli import app
from scaletrain.compare import compare
from scaletrain.core import Batch, Clock, Result
from scaletrain.monitor import Monitor
from scaletrain.recipe import ConfigError
from scaletrain.resume import Start

PER_EPOCH, EVERY = 40, 7


def make(root: Path, name: str, scores: dict[int, float], *, batch: int, steps: int, seconds: float = 0.1) -> Path:
    """A run of `steps` steps, recorded as a Monitor does it, with a card of `linear` for each step in `scores`."""
    run = root / name
    (run / "evals").mkdir(parents=True)
    recipe = {"batch": batch, "data": {"lanes": 1}, "method": "byol", "monitor": {"every": EVERY}}
    (run / "config.yaml").write_text(config.dump(config.build(recipe)))
    records = [
        {"step": s, "epoch": s // PER_EPOCH, "steps_per_epoch": PER_EPOCH, "speed/images_per_second": 1.0, "train/loss": None}
        | ({"speed/seconds_per_step": seconds} if s else {})
        for s in range(0, steps, EVERY)
    ]
    write(run, records)
    for step, score in scores.items():
        (run / "evals" / f"linear-step-{step}.json").write_text(json.dumps(card(step, score)))
    return run


def card(step: int, score: float) -> dict[str, Any]:
    return {
        "benchmark": "linear",
        "encoder": "trained",
        "step": step,
        "metrics": {"linear": score, "linear_per_class": score, "linear_top5": 99.0},
        "protocol": {"epochs": 5},
        "data": {"train": {"path": "x", "sha256": "a"}, "test": {"path": "y", "sha256": "b"}},
    }


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write(run: Path, records: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def seconds(run: Path, other: Path) -> list[float | None]:
    return [p["hours"] and p["hours"] * 3600 for p in compare([run, other])["points"][str(run)]]


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    return make(tmp_path, "slow", {50: 60.0, 100: 70.0, 200: 75.0}, batch=36, steps=200)


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    return make(tmp_path, "fast", {20: 71.0, 30: 74.0, 40: 80.0}, batch=72, steps=40, seconds=0.6)


def test_points_count_epochs_images_and_hours(slow: Path, fast: Path) -> None:
    """The second run has one epoch only; both end a few steps after their last record."""
    found = compare([slow, fast])
    assert found["metric"] == "linear"
    assert [p["epochs"] for p in found["points"][str(slow)]] == [1.25, 2.5, 5]
    assert [p["epochs"] for p in found["points"][str(fast)]] == [0.5, 0.75, 1]
    assert [p["images"] for p in found["points"][str(fast)]] == [1440, 2160, 2880]
    assert [p["hours"] for p in found["points"][str(slow)]] == pytest.approx([5 / 3600, 10 / 3600, 20 / 3600])
    assert [p["hours"] for p in found["points"][str(fast)]] == pytest.approx([12 / 3600, 18 / 3600, 24 / 3600])
    assert found["alike"]


def test_time_to_the_others_final_accuracy(slow: Path, fast: Path) -> None:
    one, other = compare([slow, fast])["reached"]
    assert (one["run"], one["other"], one["accuracy"], one["point"]) == (str(slow), str(fast), 80.0, None)
    assert (other["run"], other["accuracy"], other["point"]["step"]) == (str(fast), 75.0, 40)  # 74 at step 30 is not enough
    assert other["images_share"] == pytest.approx(2880 / 7200)
    assert other["hours_share"] == pytest.approx(24 / 20)


def test_each_interval_counts_at_its_own_pace(slow: Path, fast: Path) -> None:
    """From step 99 on, half as fast."""
    records = read(slow)
    for record in records[15:]:
        assert record["step"] >= 99 + EVERY - 1
        record["speed/seconds_per_step"] = 0.2
    write(slow, records)
    with (slow / "metrics.jsonl").open("a") as file:
        file.write('{"step": 202, "epo')  # what a kill in mid-write leaves
    assert seconds(slow, fast) == pytest.approx([5, 9.9 + 0.2, 9.9 + 20.2])


def test_a_resume_adds_neither_its_start_up_nor_what_it_repeats(
    slow: Path, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 64, resumed from 59, again at 129 and from 126, which is recorded alone: every start takes an hour."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    (slow / "metrics.jsonl").unlink()
    images = Batch((torch.zeros(1, 1, 3, 2, 2),), torch.zeros(1), torch.zeros(1), torch.zeros(2, 3))
    for start, stop in ((0, 64), (59, 129), (126, 200)):
        recipe = config.load(slow / "config.yaml")
        watch = Monitor(
            slow, recipe, total_steps=200, steps_per_epoch=PER_EPOCH, start=Start(start, start, recipe.batch * start)
        )
        for step in range(start, stop):
            clock.now += 3600 if step == start else 0.25
            watch.step(Clock(step, 200, step // PER_EPOCH, PER_EPOCH), Result(1.0, {}, torch.ones(())), {}, images, 0.0)
        watch.close()
    assert [r["step"] for r in read(slow) if "speed/seconds_per_step" not in r] == [0, 126]
    assert seconds(slow, fast) == pytest.approx([12.5, 25, 50])


def test_cards_of_one_protocol_are_alike_whatever_came_out(tmp_path: Path) -> None:
    """Real cards of two encoders; then another length of the probe, another bank, another test set."""
    train = shards(tmp_path / "data" / "train", [i % 6 for i in range(72)])
    shards(tmp_path / "data" / "test", [i % 6 for i in range(24)], seed=1)
    runs = []
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        runs.append(run_folder(tmp_path / str(seed), train))
        save(runs[-1], 9, backbone(settings(train), seed))
    quick = ("features.batch=32", "features.workers=0", "linear.augment=false", "linear.batch=16", "linear.rates=[9,3,1e-3]")
    probes = [evals.run(run, ["linear", "knn"], overrides=(*quick, "linear.epochs=3"))[0] for run in runs]
    assert probes[0]["found"] != probes[1]["found"]
    assert set(probes[0]["found"]) == {"chosen_rate", "chosen_at_edge", "held_out_top1"}
    assert not set(probes[0]["found"]) & set(probes[0]["protocol"])
    assert compare(runs, "linear")["alike"]
    assert compare(runs, "knn_20")["alike"]
    evals.run(runs[1], ["linear"], overrides=(*quick, "linear.epochs=4"))
    assert not compare(runs, "linear")["alike"]
    bank = shards(tmp_path / "bank", [i % 6 for i in range(36)])
    for sets in ((bank, tmp_path / "data" / "test"), (train, bank)):
        evals.run(runs[1], ["knn"], train=sets[0], test=sets[1], overrides=quick[:2])
        assert not compare(runs, "knn_20")["alike"]


def test_other_cards_are_not_mixed_in(slow: Path, fast: Path) -> None:
    changes: tuple[dict[str, Any], ...] = (
        {"encoder": "untrained"},
        {"data": {**card(0, 0)["data"], "labels": {"path": "some.json"}}},
        {"metrics": {"knn_20": 9.0, "knn_20_per_class": 9.0}},
    )
    for number, change in enumerate(changes):
        (slow / "evals" / f"other-{number}.json").write_text(json.dumps(card(200, 99.0) | change))
    found = compare([slow, fast])
    assert (found["metric"], [p["accuracy"] for p in found["points"][str(slow)]]) == ("linear", [60, 70, 75])
    with pytest.raises(ConfigError, match=r"fast/evals has no cards of 'knn_20'; it has linear"):
        compare([slow, fast], "knn_20")
    with pytest.raises(ConfigError, match=r"no cards of 'liner'; did you mean 'linear'"):
        compare([slow, fast], "liner")


def test_what_the_records_do_not_tell_is_open(slow: Path, fast: Path) -> None:
    """A step long after the last record; records of an earlier version, before others or alone; none."""
    edit(slow / "evals" / "linear-step-200.json", lambda c: c.update(step=205))
    assert seconds(slow, fast)[-1] is None
    records = read(slow)
    old_records = [{k: v for k, v in r.items() if k not in ("steps_per_epoch", "speed/seconds_per_step")} for r in records]
    write(slow, [*old_records[:9], *records[9:]])
    assert seconds(slow, fast) == [None, None, None]
    write(slow, old_records)
    old = compare([slow, fast])
    (slow / "metrics.jsonl").unlink()
    assert compare([slow, fast]) == old
    assert {(p["epochs"], p["hours"]) for p in old["points"][str(slow)]} == {(None, None)}
    assert old["points"][str(slow)][0]["images"] == 1800
    assert old["reached"][1]["hours_share"] is None
    assert old["reached"][1]["images_share"] == pytest.approx(2880 / 7380)


def test_different_protocols_are_said(slow: Path, fast: Path) -> None:
    def shown() -> str:
        console = Console(width=160)
        with console.capture() as text:
            module.show(compare([slow, fast]), console)
        return text.get()

    assert "cards differ" not in shown()
    edit(fast / "evals" / "linear-step-20.json", lambda c: c.update(protocol={"epochs": 100}))
    assert "note: these cards differ in protocol or labelled data" in shown()


def test_what_cannot_be_compared_is_refused(slow: Path, fast: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no benchmark has cards of all"):
        compare([slow, make(tmp_path, "none", {}, batch=4, steps=20)])
    with pytest.raises(ConfigError, match="two or more"):
        compare([slow])
    with pytest.raises(ConfigError, match=r"no run folder .*/absent: there is no such folder"):
        compare([slow, tmp_path / "absent"])
    with pytest.raises(ConfigError, match=r"no run folder .*: it has no config\.yaml"):
        compare([slow, tmp_path])
    (tmp_path / "link").symlink_to(slow)
    for same in (slow, tmp_path / "link", tmp_path / "fast" / ".." / "slow"):
        with pytest.raises(ConfigError, match="named twice"):
            compare([slow, fast, same])


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda c: c.pop("protocol"), "protocol: Field required"),
        (lambda c: c["data"].pop("test"), r"data\.test: Field required"),
        (lambda c: c["data"]["train"].pop("sha256"), r"data\.train\.sha256: Field required"),
        (lambda c: c.pop("step"), "step: Field required"),
        (lambda c: c.update(step=None), "step: "),
        (lambda c: c["metrics"].update(linear=None), r"metrics\.linear: "),
        (lambda c: c["metrics"].update(linear=float("nan")), r"metrics\.linear: "),
    ],
)
def test_a_damaged_card_is_named(slow: Path, fast: Path, change: Callable[[dict[str, Any]], object], where: str) -> None:
    edit(fast / "evals" / "linear-step-30.json", change)
    with pytest.raises(ConfigError, match=rf"fast/evals/linear-step-30\.json is no card of `scaletrain eval`.*\({where}"):
        compare([slow, fast])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"step": 1'])
def test_a_file_that_is_no_card_is_named(slow: Path, fast: Path, content: str) -> None:
    (fast / "evals" / "broken.json").write_text(content)
    with pytest.raises(ConfigError, match=r"broken\.json is no card of `scaletrain eval`"):
        compare([slow, fast])


@pytest.mark.parametrize("line", ["{}", "7", "", '{"step": 3, "epo', '{"step": 1, "steps_per_epoch": 0}'])
def test_a_damaged_record_is_named(slow: Path, fast: Path, line: str) -> None:
    """In the middle; what is cut short at the end is no damage."""
    first, rest = (slow / "metrics.jsonl").read_text().split("\n", 1)
    (slow / "metrics.jsonl").write_text(f"{first}\n{line}\n{rest}")
    with pytest.raises(ConfigError, match=r"slow/metrics\.jsonl, line 2, is no record of a run"):
        compare([slow, fast])


def test_the_command(slow: Path, fast: Path) -> None:
    run = CliRunner().invoke(app, ["compare", str(slow), str(fast), "--json", "--metric", "linear"])
    assert json.loads(run.stdout) == compare([slow, fast])
    shown = CliRunner().invoke(app, ["compare", str(slow), str(fast)], env={"COLUMNS": "400"})
    assert "never" in shown.stdout
    assert "1.20" in shown.stdout
    refused = CliRunner().invoke(app, ["compare", str(slow), str(slow)])
    assert (refused.exit_code, refused.stderr) == (2, "error: a run is named twice\n")
