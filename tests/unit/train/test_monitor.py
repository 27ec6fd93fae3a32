"""What a run writes about itself, across a resume, and the formulas of the collapse signals."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor

import scaletrain.train.progress
from scaletrain import dist
from scaletrain.config import load, schema
from scaletrain.core import Batch, Clock, StepResult
from scaletrain.train import monitor
from scaletrain.train.resume import Start

TOTAL, PER_EPOCH = 20, 5


class Unread:
    """Stands for a tensor on a device: reading it is counted."""

    reads = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        Unread.reads += 1
        return self.value


def settings(every: int = 4, images_every: int = 10) -> Any:
    """As much of a Config as the monitor uses, without a method to import."""
    return SimpleNamespace(
        batch=32, monitor=schema.MonitorConfig(every=every, images_every=images_every)
    )


@pytest.fixture(autouse=True)
def plain_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "dump", lambda _: "seed: 7\n")


def batch() -> Batch:
    pixel_range = torch.tensor([[-2.0, -1.0, 0.0], [2.0, 3.0, 5.0]])
    views = (torch.full((2, 10, 3, 16, 16), 1.0), torch.full((4, 10, 3, 8, 8), 1.0))
    return Batch(views, torch.arange(10), torch.arange(10), pixel_range)


def result(step: int, embedding: Tensor | None = None, skipped: bool = False) -> StepResult:
    part: Any = Unread(step + 0.5)
    norm: Any = Unread(2.0)
    trust: Any = {"min": Unread(0.1), "median": Unread(0.2), "max": Unread(0.3)}
    return StepResult(float(step), {"invariance": part}, norm, trust, embedding, skipped, ema=0.99)


def play(run: Path, start: int, stop: int, *, skip: int = -1, **kwargs: int) -> None:
    watch = monitor.Monitor(
        run,
        settings(**kwargs),
        total_steps=TOTAL,
        steps_per_epoch=PER_EPOCH,
        start=Start(start, start, 32 * start),
    )
    for step in range(start, stop):
        clock = Clock(step, TOTAL, step // PER_EPOCH, PER_EPOCH)
        outcome = result(step, torch.eye(8), skipped=step == skip)
        watch.step(clock, outcome, {"all": 0.1 * step, "bias": 0.5}, batch(), 0.0)
    watch.close()
    watch.close()


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def board(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_scalars_go_to_both_places_under_stable_names(tmp_path: Path) -> None:
    play(tmp_path, 0, TOTAL, skip=6)
    records, events = lines(tmp_path), board(tmp_path)
    assert [record["step"] for record in records] == [0, 4, 8, 12, 16, 19]  # and the last step
    assert [record["epoch"] for record in records] == [0, 0, 1, 2, 3, 3]
    expected = {
        "train/loss": 8.0,
        "train/invariance": 8.5,
        "lr/all": 0.8,
        "lr/bias": 0.5,
        "ema": 0.99,
        "grad_norm": 2.0,
    }
    expected |= {"trust/min": 0.1, "trust/median": 0.2, "trust/max": 0.3, "steps/skipped": 1.0}
    expected |= {"embedding/effective_rank": 8.0, "embedding/std": math.sqrt(1 / 8 - 1 / 64)}
    speeds = {
        f"speed/{name}" for name in ("images_per_second", "data_wait_share", "seconds_per_step")
    }
    measured = {*speeds, "memory/rss_peak_mb", "embedding/std_ratio"}
    assert {key: records[2][key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert (records[2]["epochs"], records[2]["samples"]) == (9 / 5, 9 * 32)
    assert (
        set(records[2]) - {"step", "epoch", "epochs", "samples", "steps_per_epoch", "time"}
        == set(expected) | measured
    )
    assert {record["steps_per_epoch"] for record in records} == {PER_EPOCH}
    assert set(events.Tags()["scalars"]) == set(expected) | measured
    for name in set(expected) | measured:
        points = [(e.step, e.value) for e in events.Scalars(name)]
        assert points == [
            (r["step"], pytest.approx(r[name], rel=1e-6)) for r in records if name in r
        ]
    assert ["speed/seconds_per_step" in r for r in records] == [
        False,
        True,
        True,
        True,
        True,
        True,
    ]  # not of the first step
    assert [record["steps/skipped"] for record in records] == [0, 0, 1, 0, 0, 0]


def test_resume_leaves_one_gapless_curve(tmp_path: Path) -> None:
    play(tmp_path / "whole", 0, TOTAL)
    play(tmp_path / "cut", 0, 15)  # killed at 15, the last checkpoint was taken at 7
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')  # what a kill in mid-write leaves
    play(tmp_path / "cut", 7, TOTAL)

    def curve(run: Path) -> list[tuple[Any, ...]]:
        return [(r["step"], r["train/loss"], r["lr/all"]) for r in lines(run)]

    def drawn(run: Path) -> list[tuple[int, float]]:
        return [(e.step, e.value) for e in board(run).Scalars("train/loss")]

    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert drawn(tmp_path / "cut") == drawn(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob("*.part"))


def test_start_from_zero_clears_an_abandoned_curve(tmp_path: Path) -> None:
    play(tmp_path, 0, 9)
    play(tmp_path, 0, 5)
    assert [record["step"] for record in lines(tmp_path)] == [0, 4]
    assert [e.step for e in board(tmp_path).Scalars("train/loss")] == [0, 4]


def test_tensors_are_read_only_on_recorded_steps(tmp_path: Path) -> None:
    watch = monitor.Monitor(
        tmp_path,
        settings(),
        total_steps=TOTAL,
        steps_per_epoch=PER_EPOCH,
        start=Start(1, 1, 32 * 1),
    )
    Unread.reads = 0
    for step in (1, 2, 3):
        watch.step(Clock(step, TOTAL, 0, PER_EPOCH), result(step), {}, batch(), 0.0)
    assert Unread.reads == 0
    watch.step(Clock(4, TOTAL, 0, PER_EPOCH), result(4), {}, batch(), 0.0)
    assert Unread.reads == 5
    watch.close()


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "rank", lambda: 1)
    play(tmp_path / "run", 0, TOTAL)
    assert not (tmp_path / "run").exists()


def test_non_finite_numbers_stay_valid_json(tmp_path: Path) -> None:
    watch = monitor.Monitor(
        tmp_path,
        settings(),
        total_steps=TOTAL,
        steps_per_epoch=PER_EPOCH,
        start=Start(0, 0, 32 * 0),
    )
    bad = StepResult(
        math.inf, {}, torch.tensor(math.nan), embedding=torch.full((4, 2), math.nan), skipped=True
    )
    watch.step(Clock(0, TOTAL, 0, PER_EPOCH), bad, {}, batch(), 0.0)
    watch.close()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (record["train/loss"], record["grad_norm"], record["embedding/std"]) == (
        None,
        None,
        None,
    )
    assert record["steps/skipped"] == 1


def test_pictures_and_configuration_reach_tensorboard(tmp_path: Path) -> None:
    play(tmp_path, 0, TOTAL)
    events = board(tmp_path)
    tags: Any = events.Tags()
    assert sorted(tags["images"]) == ["views/16px", "views/8px"]
    assert [image.step for image in events.Images("views/16px")] == [0, 10]
    small = events.Images("views/8px")[0]
    assert (small.width, small.height) == (
        4 * 10 + 2,
        8 * 10 + 2,
    )  # a column per view, a row for each of 8 samples
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert b"seed: 7" in text


def test_no_pictures_when_not_asked(tmp_path: Path) -> None:
    play(tmp_path, 0, 5, images_every=0)
    tags: Any = board(tmp_path).Tags()
    assert tags["images"] == []


def test_grid_undoes_the_normalisation() -> None:
    torch.manual_seed(0)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    pixels = torch.randint(0, 256, (2, 3, 3, 4, 4))
    normal = (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    shown = monitor.grid(normal, torch.stack([-mean / std, (1 - mean) / std]))
    assert shown.dtype == torch.uint8
    assert shown.shape == (3, 3 * 6 + 2, 2 * 6 + 2)
    for view in range(2):
        for sample in range(3):
            tile = shown[:, 2 + sample * 6 : 6 + sample * 6, 2 + view * 6 : 6 + view * 6]
            torch.testing.assert_close(tile, pixels[view, sample].byte())


def slow_collapse(rows: list[list[float]]) -> tuple[float, float]:
    """Standard deviation and effective rank by their definitions, the latter through the Gram
    matrix's eigenvalues.
    """
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
    count, width = len(unit), len(unit[0])
    deviations = []
    for channel in range(width):
        column = [row[channel] for row in unit]
        middle = sum(column) / count
        deviations.append(math.sqrt(sum((x - middle) ** 2 for x in column) / count))
    matrix = torch.tensor(unit, dtype=torch.float64)
    sigma = torch.linalg.eigvalsh(matrix.T @ matrix).clamp_min(0).sqrt().tolist()
    shares = [s / sum(sigma) for s in sigma]
    return sum(deviations) / width, math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def test_collapse_signals_follow_their_definitions() -> None:
    torch.manual_seed(1)
    x = torch.randn(12, 5) * torch.tensor([3.0, 1.0, 1.0, 0.2, 0.1])
    std, rank = slow_collapse(x.tolist())
    signals = monitor.collapse(x)
    assert signals == pytest.approx(
        {"std": std, "std_ratio": std * math.sqrt(5), "effective_rank": rank}, rel=1e-5
    )


def test_collapse_signals_at_the_extremes() -> None:
    torch.manual_seed(2)
    healthy = monitor.collapse(torch.randn(1000, 16))
    assert healthy["std_ratio"] == pytest.approx(1, abs=0.02)
    assert 15 < healthy["effective_rank"] <= 16
    for dead in (torch.ones(8, 4), torch.zeros(8, 4), torch.ones(1, 4)):
        signals = monitor.collapse(dead.bfloat16())
        assert signals["std"] == pytest.approx(0, abs=1e-6)
        assert signals["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert math.isnan(monitor.collapse(torch.full((4, 2), math.inf))["effective_rank"])


def test_pace_measures_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 110.0, 112.0, 114.0, 116.0])  # begin, a slow first step, then 2 s a step
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    pace = scaletrain.train.progress.Pace(batch=64)
    pace.add(waited=9.0, skipped=False)
    assert pace.seconds_per_step == 10
    first = {"speed/images_per_second": 6.4, "speed/data_wait_share": 0.9, "steps/skipped": 0.0}
    assert pace.read() == pytest.approx(first)
    for skipped in (True, False, True):
        pace.add(waited=0.5, skipped=skipped)
    assert pace.seconds_per_step == 2
    later = {"speed/images_per_second": 32.0, "speed/data_wait_share": 0.25, "steps/skipped": 2.0}
    assert pace.read() == pytest.approx(later | {"speed/seconds_per_step": 2.0})


def test_pace_leaves_the_first_step_out_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 110.0, 112.0, 115.0, 125.0, 127.0])  # begin, steps of 10, 2, 3, 10 and 2 s
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    pace = scaletrain.train.progress.Pace(batch=64)
    for steps, seconds in ((3, 2.5), (2, 6.0)):
        for _ in range(steps):
            pace.add(waited=0.0, skipped=False)
        assert pace.read()["speed/seconds_per_step"] == seconds


def test_plain_console_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaletrain.train.progress.Pace, "seconds_per_step", 4000.0)
    fixed = {"speed/images_per_second": 812.3, "speed/data_wait_share": 0.03}
    monkeypatch.setattr(scaletrain.train.progress.Pace, "read", lambda self: fixed)
    watch = monitor.Monitor(
        tmp_path,
        settings(),
        total_steps=TOTAL,
        steps_per_epoch=PER_EPOCH,
        start=Start(12, 12, 32 * 12),
    )
    watch.step(Clock(12, TOTAL, 2, PER_EPOCH), result(12), {"all": 0.12345}, batch(), 0.0)
    watch.note("checkpoint [step 12] saved")
    watch.close()
    assert capsys.readouterr().out.splitlines() == [
        "epoch 3/4 step 13/20 loss 12 lr 0.123 img/s 812 data 3% left 07:46:40",
        "checkpoint [step 12] saved",
    ]


def test_terminal_shows_a_live_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the output for a terminal
    monkeypatch.setenv("COLUMNS", "160")
    play(tmp_path, 0, TOTAL)
    shown = capsys.readouterr().out
    assert "step 20/20" in shown
    assert "\x1b[" in shown
    assert shown.removesuffix("\x1b[?25h").endswith("\n")  # the prompt starts on its own line


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*:UserWarning")
def test_profile_traces_steps_five_to_ten(tmp_path: Path) -> None:
    def work(steps: int, step: Callable[[], None]) -> None:
        for number in range(steps):
            with torch.profiler.record_function(f"training_step_{number}"):
                torch.ones(4).sum()
            step()

    with monitor.profile(tmp_path, False) as prof:
        work(12, prof.step)
    assert not (tmp_path / "profile").exists()
    with monitor.profile(tmp_path, True) as prof:
        work(12, prof.step)
    trace = json.loads((tmp_path / "profile" / "rank0.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert {f"training_step_{n}" for n in range(5, 11)} <= names
    assert not names & {"training_step_4", "training_step_11"}
