"""The paired tests of `scaletrain compare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kit.evals import write_result
from kit.recorded_runs import make
from scipy import stats

from scaletrain.evals.predictions import Prediction, Ranked
from scaletrain.report.compare import compare, show


def predictions(first: int, last: int) -> dict[str, Prediction]:
    """Of 100 samples, of which those from `first` to `last` are right."""
    labels, index = torch.arange(100) % 2, torch.arange(100)
    right = (index >= first) & (index < last)
    predicted = torch.where(right, labels, 1 - labels)
    return {"linear": Ranked(index, labels, 1 - right.long(), predicted, 2)}


def test_the_last_checkpoints_are_compared_sample_by_sample(tmp_path: Path) -> None:
    """Two have 70 %, of other samples; the third is right for 20 more than the first."""
    runs = [make(tmp_path, name, {}, batch=4, steps=20) for name in "abc"]
    for run, right in zip(runs, ((0, 70), (30, 100), (0, 90)), strict=True):
        write_result(run, 10, predictions=predictions(0, 50))
        write_result(run, 20, predictions=predictions(*right))
    actual = compare(runs)
    point = actual["points"][str(runs[0])][-1]
    assert point["low"] < point["score"] == 70.0 < point["high"]
    expected = [stats.binomtest(*counts).pvalue for counts in ((30, 60), (0, 20), (10, 40))]
    assert [pair["p"] for pair in actual["paired"]] == pytest.approx(expected)
    assert [pair["difference"] for pair in actual["paired"]] == pytest.approx([0, -20, -20])
    assert [(pair["step"], pair["differ"]) for pair in actual["paired"]] == [
        (20, False),
        (20, True),
        (20, True),
    ]
    lines = show(actual)
    final = f"{point['score']:.2f} [{point['low']:.2f}, {point['high']:.2f}]"
    assert f"{runs[1]} to the final {final} of {runs[0]}" in lines
    at = lines.index(f"{runs[0]}, step 20, and {runs[1]}, step 20")
    texts = [" ".join(line.split()) for line in lines[at + 1 : at + 7]]
    assert texts[0] == "difference +0.00"
    assert texts[2:4] == ["p 1 (McNemar, exact)", "test samples 100"]
    assert texts[4] == f"they resolve {actual['paired'][0]['resolvable']:.2f}"
    assert texts[5] == "so it is a tie"


def test_results_of_an_earlier_version_have_no_paired_test(tmp_path: Path) -> None:
    slow, fast = (make(tmp_path, name, {20: 70.0}, batch=4, steps=20) for name in "ab")
    for run in (slow, fast):
        for path in (run / "evals").glob("*.json"):
            content = json.loads(path.read_text())
            for key in ("main", "dataset", "intervals", "predictions", "name"):
                del content[key]
            path.write_text(json.dumps(content | {"format": 1}))
    actual = compare([slow, fast])
    assert actual["metric"] == "linear"
    assert "without predictions; evaluate again" in actual["paired"][0]["missing"]
    assert any("without predictions" in line for line in show(actual, 80))
    assert {point["low"] for point in actual["points"][str(slow)]} == {None}
