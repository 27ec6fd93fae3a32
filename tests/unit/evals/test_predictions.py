"""Predictions in a file: all comes back, and what is damaged or inconsistent is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaletrain.evals.errors import EvalError
from scaletrain.evals.predictions import (
    Prediction,
    Ranked,
    Scored,
    named_metrics,
    pack,
    unpack,
)


def ranked(samples: int = 40, classes: int = 7, seed: int = 0) -> Ranked:
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    rank = torch.randint(classes + 1, (samples,), generator=random)
    predicted = torch.where(rank == 0, labels, (labels + 1) % classes)
    return Ranked(3 * torch.arange(samples), labels, rank, predicted, classes)


def scored(samples: int = 40, classes: int = 3) -> Scored:
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(-1, 2, (samples, classes), generator=random).to(torch.int8)
    scores = torch.randn(samples, classes, generator=random)
    return Scored(3 * torch.arange(samples), labels, scores)


def save(path: Path, predictions: dict[str, Prediction], **changes: Any) -> Path:
    np.savez_compressed(path, **(pack(predictions) | changes))
    return path


def test_all_comes_back_in_its_order(tmp_path: Path) -> None:
    few = ranked(5, 3)
    wide = replace(ranked(), classes=40_000, rank=ranked().rank * 5_000)
    wide = replace(wide, rank=wide.rank.clamp(max=39_999))
    all_of_them = {"knn_20": ranked(), "knn_10": ranked(seed=1), "svm": scored(), "few": few}
    all_of_them["wide"] = wide
    actual = unpack(save(tmp_path / "p.npz", all_of_them))
    assert list(actual) == list(all_of_them)
    for name, prediction in all_of_them.items():
        assert type(actual[name]) is type(prediction)
        for key, value in vars(prediction).items():
            got = getattr(actual[name], key)
            assert got.dtype == value.dtype if torch.is_tensor(value) else got == value
            assert torch.equal(torch.as_tensor(got), torch.as_tensor(value))


def test_metrics_have_the_names_of_results() -> None:
    named = {name: value for name, _, _, value in named_metrics({"k": ranked(), "s": scored()})}
    assert list(named) == ["k", "k_top5", "k_per_class", "s_map", "s_map11"]
    assert named["k"] == ranked().metrics()["top1"]
    assert 0 < named["s_map"] < 100


def test_a_file_of_imagenet_is_small_and_the_same_each_time(tmp_path: Path) -> None:
    one = {"knn_20": ranked(50_000, 1000)}
    first, second = save(tmp_path / "a.npz", one), save(tmp_path / "b.npz", one)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 250_000
    both = save(tmp_path / "c.npz", one | {"knn_10": ranked(50_000, 1000, seed=1)})
    assert {"index", "labels"} == {key for key in np.load(both).files if "." not in key} - {
        "format"
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": torch.full((40,), 8)}, "rank are not all in 0 .. 7"),
        ({"labels": torch.full((40,), -1)}, "labels are not all in 0 .. 6"),
        ({"predicted": torch.zeros(39, dtype=torch.int64)}, r"predicted are \[39\], not \[40\]"),
        ({"index": torch.zeros(40, dtype=torch.int64)}, "sample numbers do not ascend"),
        ({"rank": torch.zeros(40, dtype=torch.int64)}, "rank 0 has another predicted class"),
    ],
)
def test_what_is_inconsistent_is_not_written(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(EvalError, match=f"'knn_20' of a benchmark is inconsistent: .*{reason}"):
        pack({"knn_20": replace(ranked(), **changes)})


def test_scores_that_are_inconsistent_are_not_written() -> None:
    for part, reason in (
        (replace(scored(), scores=scored().scores[:, :2]), "labels are"),
        (replace(scored(), scores=scored().scores.double()), "float32"),
        (replace(scored(), labels=-scored().labels.abs()), "no sample shows a class"),
        (replace(scored(), index=torch.arange(0)), "no samples"),
    ):
        with pytest.raises(EvalError, match=reason):
            pack({"svm": part})


@pytest.mark.parametrize(
    "changes",
    [
        {"format": np.array([2])},
        {"k.rank": np.zeros(40, np.float32)},
        {"k.rank": np.array([{}] * 40)},
        {"k.rank": np.zeros((40, 1), np.int16)},
        {"labels": np.full(40, 9, np.int16)},
        {"k.classes": np.array([2, 3])},
        {"other.rank": np.zeros(3, np.int16)},
    ],
)
def test_a_foreign_file_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = save(tmp_path / "p.npz", {"k": ranked()}, **changes)
    with pytest.raises(EvalError, match=r"p\.npz is not a file of predictions .* evaluate again"):
        unpack(path)


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    raw = save(tmp_path / "p.npz", {"k": ranked()}).read_bytes()
    damaged = [b"", b"text", raw[: len(raw) // 2]]
    damaged += [raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :] for at in range(30, 900, 60)]
    whole, refused = unpack(tmp_path / "p.npz"), 0
    for content in damaged:
        (tmp_path / "p.npz").write_bytes(content)
        try:
            actual = unpack(tmp_path / "p.npz")
        except EvalError as error:
            refused += "p.npz is not a file of predictions" in str(error)
        else:
            # a byte of the archive that nothing depends on, such as a time
            assert actual.keys() == whole.keys()
            assert torch.equal(vars(actual["k"])["rank"], vars(whole["k"])["rank"])
    assert refused > len(damaged) // 2
    with pytest.raises(EvalError, match="not a regular file"):
        unpack(tmp_path)
