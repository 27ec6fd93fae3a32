"""`scaletrain compare`: what results and records tell of several runs, and what they do not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kit.evals import backbone, run_folder, save, settings, shards
from kit.recorded_runs import EVERY, PER_EPOCH, make, read, result, write
from typer.testing import CliRunner

from scaletrain.cli.main import app
from scaletrain.config import load
from scaletrain.config.recipe import ConfigError
from scaletrain.core import Batch, Clock, StepResult
from scaletrain.evals import run as evals
from scaletrain.report.compare import compare
from scaletrain.train import progress
from scaletrain.train.monitor import Monitor
from scaletrain.train.resume import Start


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
    assert [p["hours"] for p in found["points"][str(slow)]] == pytest.approx(
        [5 / 3600, 10 / 3600, 20 / 3600]
    )
    assert [p["hours"] for p in found["points"][str(fast)]] == pytest.approx(
        [12 / 3600, 18 / 3600, 24 / 3600]
    )
    assert found["described"]["linear.epochs"] == "5"
    assert found["left_out"] == 0


def test_images_are_those_that_were_drawn_under_a_changed_batch(slow: Path, fast: Path) -> None:
    for step, samples, epochs in ((150, 9_000, 3.125), (201, 14_400, 5.0)):
        result(slow, step, 76.0, trained={"samples": samples, "epochs": epochs})
    points = {
        p["step"]: (p["images"], p["epochs"]) for p in compare([slow, fast])["points"][str(slow)]
    }
    assert points == {
        50: (1800, 1.25),
        100: (3600, 2.5),
        150: (9_000, 3.125),
        200: (7200, 5.0),
        201: (14_400, 5.0),
    }


def test_time_to_the_others_final_accuracy(slow: Path, fast: Path) -> None:
    one, other = compare([slow, fast])["reached"]
    assert (one["run"], one["other"], one["score"], one["point"]) == (
        str(slow),
        str(fast),
        80.0,
        None,
    )
    assert (other["run"], other["score"], other["point"]["step"]) == (
        str(fast),
        75.0,
        40,
    )  # 74 at step 30 is not enough
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
    """Killed at step 64, resumed from 59, again at 129 and from 126, which is recorded alone: every
    start takes an hour.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    (slow / "metrics.jsonl").unlink()
    images = Batch((torch.zeros(1, 1, 3, 2, 2),), torch.zeros(1), torch.zeros(1), torch.zeros(2, 3))
    for start, stop in ((0, 64), (59, 129), (126, 200)):
        recipe = load.load(slow / "config.yaml")
        watch = Monitor(
            slow,
            recipe,
            total_steps=200,
            steps_per_epoch=PER_EPOCH,
            start=Start(start, start, recipe.batch * start),
        )
        for step in range(start, stop):
            clock.now += 3600 if step == start else 0.25
            watch.step(
                Clock(step, 200, step // PER_EPOCH, PER_EPOCH),
                StepResult(1.0, {}, torch.ones(())),
                {},
                images,
                0.0,
            )
        watch.close()
    assert [r["step"] for r in read(slow) if "speed/seconds_per_step" not in r] == [0, 126]
    assert seconds(slow, fast) == pytest.approx([12.5, 25, 50])


def test_results_of_one_protocol_stand_together_whatever_came_out(tmp_path: Path) -> None:
    """Real results of two encoders; then another length of the probe, another bank, another test
    set.
    """
    train = shards(tmp_path / "data" / "train", [i % 6 for i in range(72)])
    shards(tmp_path / "data" / "test", [i % 6 for i in range(24)], seed=1)
    runs = []
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        runs.append(run_folder(tmp_path / str(seed), train))
        save(runs[-1], 9, backbone(settings(train), seed))
    quick = (
        "features.batch=32",
        "features.workers=0",
        "linear.augment=false",
        "linear.batch=16",
        "linear.rates=[9,3,1e-3]",
    )
    probes = [
        evals.run(run, ["linear", "knn"], overrides=(*quick, "linear.epochs=3"))[0] for run in runs
    ]
    assert probes[0]["found"] != probes[1]["found"]
    assert set(probes[0]["found"]) == {
        "chosen_rate",
        "chosen_at_edge",
        "held_out_top1",
        "held_out_images",
        "held_out",
    }
    assert not set(probes[0]["found"]) & set(probes[0]["protocol"])
    before = [compare(runs, metric) for metric in ("linear", "knn_20")]
    assert (
        before[0]["protocol"] == probes[0]["protocol"]["digest"] == probes[1]["protocol"]["digest"]
    )
    evals.run(runs[1], ["linear"], overrides=(*quick, "linear.epochs=4"))
    bank = shards(tmp_path / "bank", [i % 6 for i in range(36)])
    for sets in ((bank, tmp_path / "data" / "test"), (train, bank)):
        evals.run(runs[1], ["knn"], train=sets[0], test=sets[1], overrides=quick[:2])
    after = [compare(runs, metric) for metric in ("linear", "knn_20")]
    assert [found.pop("left_out") for found in after] == [1, 2]
    assert [found.pop("left_out") for found in before] == [0, 0]
    assert after == before


def test_other_results_are_not_mixed_in(slow: Path, fast: Path) -> None:
    result(slow, 200, 99.0, encoder="untrained")
    result(slow, 200, 98.0, labels="c" * 64)
    result(slow, 200, 97.0, test="d" * 64)
    result(slow, 200, 0.0, metrics={"knn_20": 9.0, "knn_20_per_class": 9.0}, benchmark="knn")
    found = compare([slow, fast])
    assert (found["metric"], [p["score"] for p in found["points"][str(slow)]]) == (
        "linear",
        [60, 70, 75],
    )
    assert found["left_out"] == 2
    with pytest.raises(ConfigError, match=r"fast/evals has no results of 'knn_20'; it has linear"):
        compare([slow, fast], "knn_20")
    with pytest.raises(ConfigError, match=r"no results of 'liner'; did you mean 'linear'"):
        compare([slow, fast], "liner")


def test_of_several_protocols_none_is_chosen_in_silence(slow: Path, fast: Path) -> None:
    for run, score in ((slow, 30.0), (fast, 40.0)):
        result(run, 200, score, linear={"epochs": 100})
        result(run, 200, score / 10, labels="c" * 64)
    with pytest.raises(
        ConfigError,
        match=r"all runs have results of 'linear' of 2 protocols; choose one by --protocol: ",
    ) as error:
        compare([slow, fast])
    listed = dict(re.findall(r"(\w{12}) \((.*?)\)(?=, \w{12} |$)", str(error.value)))
    assert sorted(listed.values()) == [
        "linear.epochs=100, labels=None",
        "linear.epochs=5, labels=None",
        "linear.epochs=5, labels=few.json (cccccc)",
    ]
    for digest, described in listed.items():
        found = compare([slow, fast], protocol=digest[:8])
        assert (found["protocol"], found["left_out"]) == (
            digest,
            8 - sum(map(len, found["points"].values())) + 2,
        )
        scores = [p["score"] for p in found["points"][str(fast)]]
        assert scores == {
            "linear.epochs=100, labels=None": [40],
            "linear.epochs=5, labels=None": [71, 74, 80],
        }.get(described, [4])
    with pytest.raises(
        ConfigError,
        match=r"--protocol xyz matches none, or more than one, of the protocols with "
        r"results of 'linear' for all runs;",
    ):
        compare([slow, fast], protocol="xyz")


def test_without_a_common_protocol_it_says_what_differs(slow: Path, tmp_path: Path) -> None:
    other = make(tmp_path, "other", {}, batch=4, steps=20)
    result(other, 20, 50.0, linear={"epochs": 100})
    with pytest.raises(
        ConfigError,
        match=r"not evaluated alike: no protocol has results of 'linear' of all; there are "
        r".*epochs=5.*100",
    ):
        compare([slow, other], "linear")
    result(other, 20, 50.0, labels="c" * 64)
    result(slow, 200, 40.0, labels="c" * 64)
    with pytest.raises(
        ConfigError, match=r"of 'linear' of label subsets only; choose one by --protocol: \w{12}"
    ):
        compare([slow, other])
    for run in (slow, other):
        result(run, 200, 0.0, metrics={"zeta": 9.0, "zeta_per_class": 9.0}, benchmark="zeta")
    assert compare([slow, other])["metric"] == "zeta"  # the first that needs no choice


def test_files_in_another_form_are_passed_over(
    slow: Path, fast: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = compare([slow, fast])
    old = {
        "encoder": "trained",
        "step": 200,
        "metrics": {"linear": 99.0, "linear_per_class": 99.0},
        "protocol": {},
        "data": {},
    }
    for name, text in (("linear-step-200.json", json.dumps(old)), ("broken.json", '{"step": 1')):
        (fast / "evals" / name).write_text(text)
        assert compare([slow, fast]) == before
        assert (
            f"skipped: {fast / 'evals' / name} is not a result of this version"
            in capsys.readouterr().err
        )


def test_what_the_records_do_not_tell_is_open(slow: Path, fast: Path) -> None:
    """A step long after the last record; records of an earlier version, before others or alone;
    none.
    """
    for path in (slow / "evals").glob("linear@data-step-200-*"):
        path.unlink()
    result(slow, 205, 75.0)
    assert seconds(slow, fast)[-1] is None
    records = read(slow)
    old_records = [
        {k: v for k, v in r.items() if k not in ("steps_per_epoch", "speed/seconds_per_step")}
        for r in records
    ]
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


def test_what_cannot_be_compared_is_refused(slow: Path, fast: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no benchmark has results of all"):
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
    "line", ["{}", "7", "", '{"step": 3, "epo', '{"step": 1, "steps_per_epoch": 0}']
)
def test_a_damaged_record_is_named(slow: Path, fast: Path, line: str) -> None:
    """In the middle; what is cut short at the end is no damage."""
    first, rest = (slow / "metrics.jsonl").read_text().split("\n", 1)
    (slow / "metrics.jsonl").write_text(f"{first}\n{line}\n{rest}")
    with pytest.raises(ConfigError, match=r"slow/metrics\.jsonl, line 2, is not a record of a run"):
        compare([slow, fast])


def test_the_command(slow: Path, fast: Path) -> None:
    run = CliRunner().invoke(app, ["compare", str(slow), str(fast), "--json", "--metric", "linear"])
    assert json.loads(run.stdout) == compare([slow, fast])
    again = CliRunner().invoke(
        app,
        [
            "compare",
            str(slow),
            str(fast),
            "--json",
            "--protocol",
            json.loads(run.stdout)["protocol"],
        ],
    )
    assert again.stdout == run.stdout
    refused = CliRunner().invoke(app, ["compare", str(slow), str(slow)])
    assert (refused.exit_code, refused.stderr) == (2, "error: a run is named twice\n")


@pytest.mark.parametrize("columns", [None, "40", "80"])
def test_tables_are_readable_at_any_width_and_in_a_pipe(
    slow: Path, fast: Path, columns: str | None
) -> None:
    """The runner is a pipe. No row is longer than its width, and no cell is cut or broken."""
    result(slow, 200, 99.0, linear={"epochs": 100})
    shown = CliRunner().invoke(app, ["compare", str(slow), str(fast)], env={"COLUMNS": columns})
    lines = shown.stdout.splitlines()
    assert lines[0] == "linear in per cent"
    assert lines[1].startswith("protocol ")
    head = ["step", "epochs", "images", "hours", "score", "95 % interval"]
    rows = [
        ["50", "1.2", "1,800", "0.00", "60.00", "58.00-62.00"],
        ["100", "2.5", "3,600", "0.00", "70.00", "68.00-72.00"],
        ["200", "5.0", "7,200", "0.01", "75.00", "73.00-77.00"],
    ]
    at = lines.index(str(slow)) + 1
    if columns == "40":  # a block for each checkpoint
        blocks = [[[row[0]], *zip(head[1:], row[1:], strict=True)] for row in rows]
        expected = [" ".join(line) for block in blocks for line in block]
    else:
        expected = [" ".join(row) for row in (head, *rows)]
    assert [" ".join(line.split()) for line in lines[at : at + len(expected)]] == expected
    assert lines[lines.index(f"{slow} to the final 80.00 [78.00, 82.00] of {fast}") + 1] == "never"
    start = lines.index(f"{fast} to the final 75.00 [73.00, 77.00] of {slow}")
    assert [line.split() for line in lines[start + 2 : start + 5]] == [
        ["epochs", "1.0"],
        ["images", "2,880", "0.40"],
        ["hours", "0.01", "1.20"],
    ]
    assert (
        lines[-1]
        == "note: results that are left out, as they are of another protocol or other data: 1"
    )
    longest = max(
        len(line)
        for line in lines
        if str(slow.parent) not in line and line[:4] not in ("prot", "note")
    )
    assert longest <= int(columns or 60)
