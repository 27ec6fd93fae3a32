"""Label maps: scores of the training set's classes as those of a test set with other classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scaletrain.evals.classes import LabelledSet
from scaletrain.evals.errors import EvalError
from scaletrain.evals.label_maps import ClassGroups, LabelMap, by_number, group

# the training set's classes in order of appearance: emu, cat, dog, ant
TRAIN = LabelledSet("train", "train", np.array([3, 1, 2, 0, 3]), "t", ["ant", "cat", "dog", "emu"])
TEST = LabelledSet("test", "test", np.array([0, 1, 2, 1, 0]), "q", ["bird", "pet", "rock"])
MAP = {"pet": ("cat", "dog"), "bird": ("emu",)}


def test_groups_have_the_best_score_of_their_classes() -> None:
    actual = group(TRAIN, TEST, MAP, restrict=True)
    assert actual.rows.tolist() == [0, 1, 3, 4]  # nothing is known of rocks
    assert actual.classes.test.tolist() == [1, 0, 0, 1]  # in the order of the map
    assert (actual.classes.count, actual.classes.train.tolist()) == (4, [0, 1, 2, 3, 0])
    scores = torch.tensor([[0.1, -3.0, -2.0, 9.0], [5.0, 7.0, 6.0, -1.0]])  # emu, cat, dog, ant
    assert actual.groups.best(scores).tolist() == [[-2.0, pytest.approx(0.1)], [7.0, 5.0]]


def test_other_classes_are_wrong_answers_unless_restricted() -> None:
    actual = group(TRAIN, TEST, MAP, restrict=False)
    scores = torch.tensor([[0.1, -3.0, -2.0, 9.0]])
    assert actual.groups.best(scores).argmax().item() == 2  # ant, which no test class means
    assert actual.groups.count == 3
    assert actual.classes.matched == "by name, 2 classes of the test set"


def test_without_a_map_the_names_are_the_same() -> None:
    test = LabelledSet("test", "test", np.array([1, 0]), "q", ["dog", "emu"])
    actual = group(TRAIN, test, None, restrict=True)
    assert actual.classes.test.tolist() == [1, 0]
    assert actual.groups.group.tolist() == [1, -1, 0, -1]
    assert "no other can be predicted" in actual.classes.matched


def test_a_score_that_is_not_finite_stays_in_its_group() -> None:
    best = ClassGroups(torch.tensor([0, 1, 1]), 2).best(torch.tensor([[0.0, float("nan"), 1.0]]))
    assert best[0].isnan().tolist() == [False, True]


def test_folders_that_are_numbers_of_classes() -> None:
    """As in ImageNet-V2, where they sort as texts: 0, 1, 10, 100."""
    test = LabelledSet("test", "test", np.array([0, 1, 2]), "q", ["0", "2", "3"])
    assert by_number(TRAIN, test) == ["ant", "dog", "emu"]
    for odd in ("4", "-1", "x", "²"):
        test = LabelledSet("test", "test", np.array([0]), "q", [odd])
        with pytest.raises(EvalError, match=r"test/classes\.json: '.*' is no number of the 4"):
            by_number(TRAIN, test)


@pytest.mark.parametrize(
    ("label_map", "text"),
    [
        ({"pets": ("cat",)}, r"classes that test/classes\.json does not name: 'pets'"),
        ({"pet": ("cow",)}, r"class 'cow' to 'pet', which train/classes\.json does not name"),
        ({"pet": ("cat",), "bird": ("cat",)}, r"class 'cat' to two classes, 'bird' is one"),
    ],
)
def test_maps_that_do_not_fit(label_map: LabelMap, text: str) -> None:
    with pytest.raises(EvalError, match=text):
        group(TRAIN, TEST, label_map, restrict=True)


def test_sets_that_do_not_fit_a_map() -> None:
    few = LabelledSet("train", "few.json", np.array([1, 2]), "t", TRAIN.names)
    with pytest.raises(EvalError, match=r"class 'emu' to 'bird', and few\.json has no sample"):
        group(few, TEST, MAP, restrict=True)
    stones = LabelledSet("test", "test", np.array([2, 2]), "q", TEST.names)
    with pytest.raises(EvalError, match="test has no sample of a class of the label map"):
        group(TRAIN, stones, MAP, restrict=True)
    bare = LabelledSet("test", "test", TEST.labels, "q")
    with pytest.raises(EvalError, match=r"test has no classes\.json"):
        group(TRAIN, bare, MAP, restrict=True)
