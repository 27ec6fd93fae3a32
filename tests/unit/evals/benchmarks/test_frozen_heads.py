"""Benchmarks on stored features: what they choose, on which images, and what they declare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kit.heads import CLASSES, Context, blobs, measured, rows
from torch.profiler import profile

from scaletrain.evals import benchmark
from scaletrain.evals.errors import EvalError
from scaletrain.evals.features import Features
from scaletrain.evals.heads.classifier import finite
from scaletrain.evals.held_out import held_out
from scaletrain.evals.intervals import interval
from scaletrain.evals.predictions import Scored

NAMES = ("knn", "logistic", "svm", "fewshot")
# Few, so that the tests are quick.
SETTINGS: dict[str, dict[str, Any]] = {
    "knn": {"ks": (5, 20)},
    "logistic": {"strengths": 9},
    "svm": {"costs": (0.01, 1.0, 100.0)},
    "fewshot": {"shots": (1, 5), "draws": 3},
}


def numbers(metrics: dict[str, float], suffix: str = "") -> list[float]:
    return [value for name, value in metrics.items() if name.endswith(suffix)]


@pytest.mark.parametrize("name", NAMES)
def test_separable_classes_are_all_right(name: str) -> None:
    context = Context(blobs(200, 0.1, 0), blobs(100, 0.1, 1))
    settings = {"shots": (20,), "draws": 2} if name == "fewshot" else SETTINGS[name]
    metrics, score = measured(name, context, **settings)
    assert set(metrics.values()) == {100.0}
    assert not any(key.endswith("_top5") for key in metrics)  # four classes
    assert score.protocol


@pytest.mark.parametrize("name", NAMES)
def test_what_is_used_is_what_was_declared(name: str) -> None:
    module = benchmark.load(name)
    context = Context(blobs(200, 1.0, 0), blobs(100, 1.0, 1))
    measured(name, context, **SETTINGS[name])
    declared = module.needs(module.Config(**SETTINGS[name]), None)
    assert set(declared.splits) == set(context.asked)
    assert len(context.asked) == len(set(context.asked))
    assert not declared.augmented
    assert not declared.network


@pytest.mark.parametrize("name", NAMES)
def test_poisoned_test_labels_change_the_score_and_nothing_else(name: str) -> None:
    train, test = blobs(200, 1.5, 0), blobs(100, 1.5, 1)
    clean, score = measured(name, Context(train, test), **SETTINGS[name])
    poisoned = Features(test.x, (test.labels + 1) % CLASSES, test.index)
    other, other_score = measured(name, Context(train, poisoned), **SETTINGS[name])
    if name != "fewshot":  # what it found are means of the score
        assert score.found == other_score.found
    assert score.protocol == other_score.protocol
    assert max(numbers(other, "_per_class")) < min(numbers(clean, "_per_class"))


@pytest.mark.parametrize("name", NAMES)
def test_the_main_metric_is_that_of_the_data_set(name: str) -> None:
    train, test = blobs(200, 1.5, 0), blobs(100, 1.5, 1)
    plain, by_class = (
        measured(name, Context(train, test, metric=metric), **SETTINGS[name])[1].main
        for metric in ("top1", "per_class")
    )
    assert by_class == f"{plain}_per_class"


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_training_images_does_not_matter(name: str) -> None:
    train, test = blobs(200, 1.5, 0), blobs(100, 1.5, 1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    first, second = Context(train, test), Context(train, test)
    for split in ("train", "val", "trainval"):
        part = second.splits[split]
        second.splits[split] = rows(part, order[order < len(part.labels)])
    assert measured(name, first, **SETTINGS[name])[0] == measured(name, second, **SETTINGS[name])[0]


def test_logistic_chooses_on_validation_images_and_trains_on_all() -> None:
    train, test = blobs(300, 2.0, 0), blobs(200, 2.0, 1)
    metrics, score = measured("logistic", Context(train, test), strengths=9)
    held = score.found["held_out_top1"]
    assert len(set(held.values())) > 1
    assert held[str(score.found["chosen_strength"])] == max(held.values())

    # wrong validation labels change the choice to one that is best for them
    poisoned = Context(train, test)
    val = poisoned.splits["val"]
    poisoned.splits["val"] = Features(val.x, (val.labels + 1) % CLASSES, val.index)
    other, other_score = measured("logistic", poisoned, strengths=9)
    assert other_score.found["chosen_strength"] != score.found["chosen_strength"]
    assert other["logistic"] <= metrics["logistic"]

    # without validation images in the refit it is another classifier
    fewer = Context(train, test)
    fewer.splits["trainval"] = rows(train, torch.arange(40))
    assert measured("logistic", fewer, strengths=9)[0] != metrics
    assert len(held_out(300)) == score.found["held_out_images"]


def test_svm_chooses_a_cost_for_each_class_by_average_precision() -> None:
    context = Context(blobs(300, 2.0, 0), blobs(200, 2.0, 1), metric="map11")
    metrics, score = measured("svm", context, costs=(0.001, 1.0, 100.0))
    assert score.main == "svm_classes_map11"
    assert isinstance(score.predictions["svm_classes"], Scored)
    assert len(score.found["chosen_cost"]) == CLASSES
    assert {"svm", "svm_per_class", "svm_classes_map", "svm_classes_map11"} == set(metrics)

    _, by_accuracy = measured("svm", context, costs=(0.001, 1.0), choose_by="accuracy")
    assert isinstance(by_accuracy.found["chosen_cost"], float)


def test_few_shots_are_means_over_draws() -> None:
    context = Context(blobs(300, 2.0, 0), blobs(200, 2.0, 1))
    metrics, score = measured("fewshot", context, shots=(2,), draws=4)
    draws = score.found["fewshot_mean_2_by_draw"]
    assert len(set(draws)) > 1
    assert metrics["fewshot_mean_2"] == pytest.approx(sum(draws) / 4)
    low, high = interval(score.predictions["fewshot_mean_2"], "top1")
    assert low < metrics["fewshot_mean_2"] < high


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_that_has_diverged_is_refused(name: str) -> None:
    train, test = blobs(200, 1.0, 0), blobs(100, 1.0, 1)
    train.x[: 200 if name == "fewshot" else 1, 3] = float("nan")  # of which few are drawn
    with pytest.raises(EvalError, match="diverged"):
        measured(name, Context(train, test), **SETTINGS[name])


def test_diverged_features_are_found_without_a_copy() -> None:
    x = torch.zeros(100_000, 8)
    x[-1, 3] = torch.inf
    with profile(profile_memory=True) as seen, pytest.raises(EvalError, match="diverged"):
        finite(x)
    events = seen.events()
    assert events
    assert max(event.cpu_memory_usage for event in events) < x.nbytes / 4


def test_too_few_images_for_the_folds_are_refused() -> None:
    train = rows(blobs(200, 1.0, 0), torch.arange(12))
    with pytest.raises(EvalError, match=r"svm\.folds"):
        measured("svm", Context(train, blobs(9, 1.0, 1)), folds=50)


@pytest.mark.parametrize("name", ["logistic", "svm"])
def test_a_minimisation_that_does_not_end_is_said(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    context = Context(blobs(200, 2.0, 0), blobs(100, 2.0, 1))
    _, score = measured(name, context, **SETTINGS[name], iterations=1)
    assert score.found["not_converged"]
    assert f"{name}.iterations" in capsys.readouterr().err
