"""The table of a grid: results of one protocol in a column, and readable on any console."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.evals import write_result

from scaletrain.evals import results
from scaletrain.launch.slurm.launch import show
from scaletrain.report import grid


def test_table_takes_the_last_step_and_the_newest_evaluation(tmp_path: Path) -> None:
    elements = grid.combinations(["optim.lr=0.1,0.2"], 1)
    grid.save(tmp_path, elements)
    done = grid.folder(tmp_path, elements[0])
    done.mkdir()
    (done / "metrics.jsonl").write_text(
        '{"step": 4, "train/loss": 3.0}\n{"step": 8, "train/loss": 2.123456789}\n{"step": 9, "tr'
    )
    for step, score, encoder in (
        (100, 50.0, "trained"),
        (20, 40.0, "trained"),
        (0, 90.0, "untrained"),
    ):
        write_result(done, step, {"knn_20": score}, benchmark="knn", encoder=encoder)
    first, second = grid.table(
        tmp_path, {done: "completed", grid.folder(tmp_path, elements[1]): "pending"}
    )
    assert first == {
        "optim.lr": "0.1",
        "state": "completed",
        "step": 8,
        "loss": 2.1235,
        "knn_20": 50.0,
        "knn_20_low": 48.0,
        "knn_20_high": 52.0,
        "knn_step": 100,
    }
    assert second == {
        "optim.lr": "0.2",
        "state": "pending",
        "step": "",
        "loss": "",
        "knn_20": "",
        "knn_20_low": "",
        "knn_20_high": "",
        "knn_step": "",
    }
    assert (tmp_path / "grid.csv").read_text().splitlines()[1] == (
        "0.1,completed,8,2.1235,50.0,48.0,52.0,100"
    )


def test_no_column_of_a_table_holds_two_protocols(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A label subset, also of a later step, and another test set have columns of their own; an old
    file is passed over.
    """
    elements = grid.combinations(["optim.lr=0.1,0.2"], 1)
    grid.save(tmp_path, elements)
    one, two = (grid.folder(tmp_path, element) for element in elements)
    for run, score in ((one, 70.0), (two, 71.0)):
        write_result(run, 8, {"linear": score})
    few = results.parse(write_result(one, 16, {"linear": 30.0}, labels="c" * 64))[0].protocol
    (one / "evals" / "linear-step-16.json").write_text(
        '{"encoder": "trained", "step": 16, "metrics": {"linear": 99.0}}'
    )
    rows = grid.table(tmp_path)
    assert [(row["linear"], row["linear_step"], row[f"linear {few}"]) for row in rows] == [
        (70.0, 8, 30.0),
        (71.0, 8, ""),
    ]
    assert "linear-step-16.json is not a result of this version" in capsys.readouterr().err
    other = results.parse(write_result(two, 16, {"linear": 80.0}, test="d" * 64))[0].protocol
    first, second = grid.table(tmp_path)
    assert "linear" not in first
    (plain,) = (
        name
        for name in first
        if name.startswith("linear ") and few not in name and other not in name
    )
    assert [
        (row[plain], row[f"linear {few}"], row[f"linear {other}"]) for row in (first, second)
    ] == [
        (70.0, 30.0, ""),
        (71.0, "", 80.0),
    ]


@pytest.mark.parametrize("width", [None, "40", "80"])
def test_the_shown_table_is_readable_at_any_width_and_in_a_pipe(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: str | None,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if width:
        monkeypatch.setenv("COLUMNS", width)
    elements = grid.combinations(["optim.lr=0.1,0.2"], 2)
    grid.save(tmp_path, elements)
    for number, element in enumerate(elements):
        scores = {
            f"knn_{k}{part}": k + number / 4
            for k in (10, 20, 100, 200)
            for part in ("", "_top5", "_per_class")
        }
        write_result(grid.folder(tmp_path, element), 8, scores, benchmark="knn")
    show(tmp_path)
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.split()[-1] == str(tmp_path / "grid.csv")
    names = ["optim.lr", "seed", "knn_10", "knn_20", "knn_100", "knn_200", "knn_step"]
    values = [
        [lr, seed, *(f"{s:.2f} [{max(0, s - 2):.2f}, {min(100, s + 2):.2f}]" for s in scores), "8"]
        for n, (lr, seed) in enumerate((("0.1", "0"), ("0.1", "1"), ("0.2", "0"), ("0.2", "1")))
        for scores in [[k + n / 4 for k in (10, 20, 100, 200)]]
    ]
    found = [" ".join(line.split()) for line in lines]
    if width:  # a block for each run
        blocks = [
            [value[0], *(f"{a} {b}" for a, b in zip(names[1:], value[1:], strict=True))]
            for value in values
        ]
        assert found[: len(names) * len(values)] == [line for block in blocks for line in block]
        assert max(map(len, lines[: len(names) * len(values)])) <= 40
    else:
        assert found[: len(values) + 1] == [" ".join(row) for row in (names, *values)]
