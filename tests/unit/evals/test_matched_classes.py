"""What labels mean in an evaluation: one numbering for both sets, by name, by number, or
refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.evals import run_folder, shards

from scaletrain.data.errors import DataError
from scaletrain.evals import run as evals
from scaletrain.evals.classes import Classes, LabelledSet, match, read_names
from scaletrain.evals.errors import EvalError
from scaletrain.report import cards


def part(
    place: Path, labels: list[int], names: Any = None, same_numbers: bool = False
) -> LabelledSet:
    place.mkdir(exist_ok=True)
    if names is not None:
        (place / "classes.json").write_text(names if isinstance(names, str) else json.dumps(names))
    read = None if same_numbers else read_names(str(place))
    return LabelledSet(str(place), str(place), np.array(labels, np.int64), place.name, read)


def matched(
    root: Path,
    train: list[int],
    test: list[int],
    ours: Any = None,
    theirs: Any = None,
    **options: Any,
) -> Classes:
    sets = (
        part(root / "train", train, ours, **options),
        part(root / "test", test, theirs, **options),
    )
    return match(*sets, **options)


def test_sparse_labels_are_numbered_densely_by_first_appearance(tmp_path: Path) -> None:
    found = matched(tmp_path, [70, 3, 70, 10**15], [10**15, 3])
    assert (found.train.tolist(), found.test.tolist(), found.count) == ([0, 1, 0, 2], [2, 1], 3)
    assert found.matched == "by number"
    again = matched(tmp_path, [1, 2, 1, 0], [0, 2])
    assert (again.train.tolist(), again.test.tolist()) == (
        found.train.tolist(),
        found.test.tolist(),
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "test", "expected", "how"),
    [
        (["cat", "dog", "emu"], ["cat", "dog", "emu"], [0, 1, 2], [0, 1, 2], "by name"),
        (
            ["cat", "dog", "emu"],
            ["emu", "dog", "cat"],
            [0, 1, 2],
            [2, 1, 0],
            "by name: the test set numbers them differently",
        ),
        (
            ["cat", "dog", "emu"],
            ["emu", "cat"],
            [0, 1, 1],
            [2, 0, 0],
            "by name: the test set numbers them differently",
        ),
        (
            ["a", "a", "b"],
            ["a", "a", "b"],
            [0, 1, 2],
            [0, 1, 2],
            "by name",
        ),  # ImageNet has two cranes
    ],
)
def test_names_decide(
    tmp_path: Path, ours: Any, theirs: Any, test: list[int], expected: list[int], how: str
) -> None:
    found = matched(tmp_path, [0, 1, 2], test, ours, theirs)
    assert (found.test.tolist(), found.matched) == (expected, how)
    assert found.sha256 is not None


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        (
            ["cat", "dog"],
            ["cat", "fox"],
            r"test has classes that .*train/classes\.json does not name: 'fox'; .*--same-numbers",
        ),
        (
            ["cat", "dog"],
            None,
            r"train has a classes\.json and .*test has none, so it is unknown .*--same-numbers",
        ),
        (None, ["cat", "dog"], r"test has a classes\.json and .*train has none"),
        (
            ["cat"],
            ["cat", "dog"],
            r"train: label 1 has no name in .*train/classes\.json, which lists 1",
        ),
        (["cat", "dog"], ["cat"], r"test: label 1 has no name in .*test/classes\.json"),
        (["a", "b", "b"], ["b", "a"], r"train/classes\.json names a class twice"),
        ("[1, 2", ["cat", "dog"], r"train/classes\.json is not a list of the classes' names"),
        (["cat", "dog"], {"0": "cat"}, r"test/classes\.json is not a list of the classes' names"),
        (["cat", 7], ["cat", "dog"], r"train/classes\.json is not a list"),
        ("[" * 100_000, None, r"train/classes\.json is not a list"),
    ],
)
def test_what_cannot_be_known_is_refused_unless_the_user_knows_it(
    tmp_path: Path, ours: Any, theirs: Any, text: str
) -> None:
    with pytest.raises(EvalError, match=text) as error:
        matched(tmp_path, [0, 1], [0, 1], ours, theirs)
    assert "\n" not in str(error.value)
    found = matched(tmp_path, [0, 1], [1, 0], ours, theirs, same_numbers=True)
    assert (found.test.tolist(), found.matched) == ([1, 0], "by number, as --same-numbers says")


def test_names_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "classes.json").mkdir()
    with pytest.raises(DataError, match=r"train/classes\.json cannot be read"):
        matched(tmp_path, [0, 1], [0, 1])


def test_the_same_shards_number_their_classes_alike(tmp_path: Path) -> None:
    train, test = part(tmp_path / "a", [0, 1], ["cat", "dog"]), part(tmp_path / "b", [0, 1])
    assert (
        match(train, LabelledSet(test.path, test.source, test.labels, train.sha256)).matched
        == "by number"
    )


def test_classes_that_the_training_set_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        EvalError, match=r"test has classes of which .*train has no sample: '1', '5'; give"
    ):
        matched(tmp_path, [0, 2, 4], [1, 2, 5, 1])
    with pytest.raises(EvalError, match=r"no sample: 'dog'; give"):
        matched(tmp_path, [0, 2], [0, 1], ["cat", "dog", "emu"], ["cat", "dog"])
    with pytest.raises(EvalError, match=r"no sample: '10', '11', '12', '13', '14' and 5 more"):
        match(part(tmp_path / "x", [0]), part(tmp_path / "y", list(range(10, 20))))


def test_samples_without_a_label_are_counted(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"train: 2 of 4 samples have no label.*--labels FILE"):
        matched(tmp_path, [0, -1, 1, -1], [0, 1])
    with pytest.raises(EvalError, match=r"test: 3 of 4 samples have no label"):
        matched(tmp_path, [0, 1], [-1, 1, -1, -1])


def test_the_result_says_how_classes_were_matched(tmp_path: Path) -> None:
    """The same images under two numberings score alike, and what they were matched by is a part of
    the result.
    """
    labels = [i % 6 for i in range(24)]
    train = shards(tmp_path / "train", labels)
    test = shards(tmp_path / "test", labels, seed=1)
    turned = shards(tmp_path / "turned", [5 - n for n in labels], colours=labels)
    run = run_folder(tmp_path, train)

    def score(place: Path, **options: Any) -> dict[str, Any]:
        return evals.run(
            run, ["knn"], test=place, overrides=["features.workers=0"], encoder="pixels", **options
        )[0]

    bare = score(test)
    for place, names in ((train, "abcdef"), (test, "abcdef"), (turned, "fedcba")):
        (place / "classes.json").write_text(json.dumps(list(names)))
    named, renumbered, stated = score(test), score(turned), score(turned, same_numbers=True)
    assert bare["metrics"] == named["metrics"] == renumbered["metrics"] != stated["metrics"]
    assert [r["data"]["classes"] for r in (bare, named, renumbered, stated)] == [
        {"count": 6, "matched": how}
        for how in (
            "by number",
            "by name",
            "by name: the test set numbers them differently",
            "by number, as --same-numbers says",
        )
    ]
    assert len({r["file"] for r in (bare, named, renumbered, stated)}) == 4
    assert "classes: 6, matched by name: the test set numbers them differently" in cards.report(
        [renumbered]
    )
