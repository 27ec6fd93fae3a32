"""`scaletrain leaderboard`: places that test samples can tell apart, and ties where they cannot."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.evals import write_result
from kit.recorded_runs import make
from scipy import stats
from typer.testing import CliRunner

from scaletrain.cli.main import app
from scaletrain.config.recipe import ConfigError
from scaletrain.evals.predictions import Prediction, Ranked
from scaletrain.report import leaderboard
from scaletrain.report.leaderboard import Board, boards

SAMPLES = 1000


def predictions(wrong: float, seed: int = 0) -> dict[str, Prediction]:
    """Of samples that are harder and harder: the last ones are wrong, but for a few by chance."""
    labels = torch.arange(SAMPLES) % 5
    noise = 0.1 * torch.randn(SAMPLES, generator=torch.Generator().manual_seed(seed))
    right = torch.arange(SAMPLES) / SAMPLES + noise < 1 - wrong
    predicted = torch.where(right, labels, (labels + 1) % 5)
    return {"linear": Ranked(torch.arange(SAMPLES), labels, 1 - right.long(), predicted, 5)}


def run(root: Path, name: str, wrong: float, seed: int = 0, step: int = 20, batch: int = 0) -> Path:
    """A run with a result; another batch size is another recipe."""
    folder = make(root, name, {}, batch=batch or 10 * len(list(root.iterdir())) + 10, steps=20)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", f"seed: {seed}"))
    write_result(folder, step, predictions=predictions(wrong, seed + len(name)))
    return folder


def places(board: Board) -> dict[str, str]:
    return {Path(entry.encoder).name: entry.place for entry in board.entries}


def test_what_cannot_be_told_apart_is_tied(tmp_path: Path) -> None:
    """b lies between a and c, which differ, and cannot be told from either."""
    wrong = {"a": 0.2, "bb": 0.22, "ccc": 0.245, "dddd": 0.4}
    (board,) = boards([run(tmp_path, name, share) for name, share in reversed(wrong.items())])
    assert [Path(entry.encoder).name for entry in board.entries] == list(wrong)
    assert places(board) == {"a": "1-2", "bb": "1-3", "ccc": "2-3", "dddd": "4"}
    assert board.resolvable is not None
    assert 0.6 <= board.resolvable < 4
    best = board.entries[0]
    assert (best.low, best.high) == pytest.approx(
        [
            100 * x
            for x in stats.binomtest(round(10 * best.score), SAMPLES).proportion_ci(method="wilson")
        ]
    )


def test_seeds_of_a_recipe_are_one_entry_with_students_interval(tmp_path: Path) -> None:
    first = [run(tmp_path, f"a{seed}", 0.2 + seed / 100, seed, batch=8) for seed in range(3)]
    second = [run(tmp_path, f"b{seed}", 0.4, seed, batch=16) for seed in range(3)]
    copy = run(tmp_path, "copy", 0.1, 0, batch=16)
    early = run(tmp_path, "early", 0.5, 7, step=10, batch=16)
    (board,) = boards([*first, *second, early])
    assert [(entry.runs, entry.place) for entry in board.entries] == [(3, "1"), (3, "2"), (1, "3")]
    mean = board.entries[0]
    assert mean.encoder == f"{first[0]} and 2 other seeds"
    values = [boards([one])[0].entries[0].score for one in first]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (mean.low, mean.score, mean.high) == pytest.approx(
        (expected[0], np.mean(values), expected[1])
    )
    # one seed twice is no further training
    (again,) = boards([*second, copy])
    assert sorted(entry.runs for entry in again.entries) == [1, 1, 2]


def test_a_variance_between_seeds_hides_a_difference_of_the_samples(tmp_path: Path) -> None:
    """The two best single runs differ; as seeds of two recipes that spread widely they do not."""
    wide = [run(tmp_path, f"a{n}", wrong, n, batch=8) for n, wrong in enumerate((0.1, 0.3, 0.5))]
    narrow = run(tmp_path, "b", 0.36, batch=16)
    (board,) = boards([*wide, narrow])
    assert places(board) == {"a0 and 2 other seeds": "1-2", "b": "1-2"}
    (single,) = boards([wide[0], narrow])
    assert places(single) == {"a0": "1", "b": "2"}


def test_protocols_and_datasets_have_boards_of_their_own(tmp_path: Path) -> None:
    a, b = (run(tmp_path, name, 0.2) for name in "ab")
    write_result(a, 20, {"knn_20": 50.0, "knn_20_top5": 80.0}, benchmark="knn", dataset="pets")
    write_result(b, 20, {"linear": 60.0}, labels="c" * 64)
    write_result(b, 40, predictions=predictions(0.1))
    write_result(b, 99, {"linear": 99.0}, encoder="untrained")
    actual = boards([a, b])
    assert sorted((board.benchmark, board.dataset, len(board.entries)) for board in actual) == [
        ("knn", "pets", 1),
        ("linear", "data", 1),
        ("linear", "data", 2),
    ]
    whole = next(board for board in actual if len(board.entries) == 2)
    # the newest, not the best
    assert {Path(e.encoder).name: e.step for e in whole.entries} == {"b": 40, "a": 20}
    (top5,) = boards([a, b], "knn_20_top5")
    assert (top5.metric, [entry.score for entry in top5.entries]) == ("knn_20_top5", [80.0])


def test_a_folder_has_results_of_several_encoders(tmp_path: Path) -> None:
    for name, wrong in (("resnet18", 0.5), ("resnet50", 0.3)):
        write_result(tmp_path, 0, predictions=predictions(wrong), name=name)
    write_result(tmp_path, 0, predictions=predictions(0.8), name="resnet50", encoder="untrained")
    (board,) = boards([tmp_path / "evals"])
    assert places(board) == {"resnet50": "1", "resnet18": "2", "resnet50, untrained": "3"}


def test_results_without_predictions_are_tied_and_named(tmp_path: Path) -> None:
    a, b = run(tmp_path, "a", 0.2), run(tmp_path, "b", 0.6)
    (file,) = (a / "evals").glob("*.npz")
    file.write_bytes(file.read_bytes()[:-1])
    (board,) = boards([a, b])
    assert (places(board), board.resolvable) == ({"a": "1-2", "b": "1-2"}, None)
    assert "checksum" in board.missing[0]
    assert any("no paired test" in line for line in leaderboard.show([board]))


@pytest.mark.parametrize("columns", [None, "40"])
def test_the_command_prints_ties_and_writes_them(tmp_path: Path, columns: str | None) -> None:
    folders = [run(tmp_path, name, wrong) for name, wrong in (("a", 0.2), ("bb", 0.2), ("c", 0.6))]
    out = tmp_path / "board.csv"
    arguments = ["leaderboard", *map(str, folders), "--csv", str(out)]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": columns})
    assert shown.exit_code == 0, shown.output
    words = shown.stdout.split()
    assert words.count("1-2") == 2
    assert words.count("3") >= 1
    assert "Places that overlap are ties" in " ".join(words)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["best_place"], row["worst_place"]) for row in rows] == [
        ("1", "2"),
        ("1", "2"),
        ("3", "3"),
    ]
    assert rows[2]["encoder"] == str(folders[2])
    assert float(rows[2]["low"]) < float(rows[2]["score"]) < float(rows[2]["high"])


def test_what_has_no_results_is_refused(tmp_path: Path) -> None:
    a = run(tmp_path, "a", 0.2)
    for folders, reason in (
        ([tmp_path / "none"], "no such folder"),
        ([a, tmp_path / "a"], "named twice"),
        (
            [make(tmp_path, "bare", {}, batch=8, steps=20)],
            "no results of an encoder; `scaletrain eval` makes them",
        ),
    ):
        with pytest.raises(ConfigError, match=reason):
            boards(folders)
    with pytest.raises(ConfigError, match="no result has a metric 'linaer'"):
        boards([a], "linaer")
