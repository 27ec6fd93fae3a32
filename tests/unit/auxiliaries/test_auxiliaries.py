"""Auxiliaries and labelled samples in recipes: how they are written, refused, shown, and carried
through a run.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from kit.data import write_shards

from scaletrain.checkpoint import reader
from scaletrain.config import load
from scaletrain.config import schema as config
from scaletrain.config.recipe import ConfigError
from scaletrain.core import Kind
from scaletrain.data.reading import subset
from scaletrain.data.reading.reader import Shards
from scaletrain.report import catalogue
from scaletrain.train import records
from scaletrain.train.loop import train


def built(**raw: Any) -> config.Config:
    return load.build({"method": "byol", **raw})


def test_a_word_and_a_mapping_mean_the_same_and_are_saved_whole(tmp_path: Path) -> None:
    short, long = (
        built(auxiliaries=["rotation"]),
        built(auxiliaries=[{"name": "rotation", "weight": 0.2}]),
    )
    assert short == long
    (tmp_path / "run.yaml").write_text(load.dump(short))
    assert load.load(tmp_path / "run.yaml") == short
    changed = load.load(tmp_path / "run.yaml", ["auxiliaries.0.weight=0.5"])
    assert load.diff(short, changed) == [("auxiliaries.0.weight", 0.2, 0.5)]
    assert load.load(tmp_path / "run.yaml", ["auxiliaries=[]"]) == built()
    assert load.load(tmp_path / "run.yaml", ["auxiliaries=[suncet]"]) == built(
        auxiliaries=["suncet"]
    )


@pytest.mark.parametrize(
    ("auxiliaries", "text"),
    [
        (["rotatoin"], r"unknown auxiliary 'rotatoin' \(did you mean 'rotation'\?\); available: "),
        (
            [{"name": "rotation", "wieght": 1}],
            r"unknown key 'auxiliaries\.0\.wieght'; did you mean 'auxiliaries\.0\.weight'",
        ),
        ([{"weight": 1}], "needs a `name`; available: rotation, suncet"),
        (["rotation", "rotation"], "auxiliaries: each at most once, got rotation, rotation"),
    ],
)
def test_a_wrong_one_is_refused(auxiliaries: list[Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        built(auxiliaries=auxiliaries)


def test_the_schema_has_them() -> None:
    schema = load.schema()
    assert {"auxiliaries.rotation", "auxiliaries.suncet"} <= set(schema["$defs"])
    assert schema["properties"]["auxiliaries"]["items"]["anyOf"][-1] == {
        "enum": ["rotation", "suncet"]
    }


def test_a_run_with_both_trains_stops_and_goes_on(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", (30, 18))
    shards = Shards(folder)
    subset.save(tmp_path / "few.json", shards, subset.per_class(shards.labels(), 2, 0), "two")
    raw = {
        "batch": 12,
        "epochs": 2,
        "threads": 1,
        "data": {
            "path": str(folder),
            "lanes": 4,
            "window": 2,
            "workers": 0,
            "views": [{"size": 16, "count": 2}],
            "support": {"labels": str(tmp_path / "few.json"), "classes": 3, "epochs": 1},
        },
        "model": {"name": "resnet10", "width": 0.0625, "stem": "cifar"},
        "method": {"name": "simclr", "dim": 8},
        "auxiliaries": [{"name": "rotation", "hidden": 8}, "suncet"],
        "optim": {"warmup_epochs": 0},
        "monitor": {"every": 1},
        "checkpoint": {"every_steps": 3, "keep_last": 5},
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(load.build(raw), whole)
    train(load.build(raw), parts)
    for path in sorted((parts / "checkpoints").glob("step-*"))[
        1:
    ]:  # as if it had been stopped after step 3
        shutil.rmtree(path)
    saved = reader.latest(parts / "checkpoints")
    assert saved is not None
    assert saved.step == 3
    train(load.build(raw), parts)

    def losses(run: Path) -> list[dict[str, float]]:
        lines = [record.scalars for record in records.read(run).steps]
        return [{k: v for k, v in line.items() if k.startswith("train/")} for line in lines]

    assert len(losses(whole)) == 8
    assert losses(parts) == losses(whole)
    assert {
        "train/loss_all",
        "train/loss_rotation",
        "train/loss_suncet",
        "train/rotation_accuracy",
    } <= losses(whole)[3].keys()
    assert "train/loss_suncet" not in losses(whole)[4]


def test_labels_that_do_not_fit_are_refused_before_training(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", (24,))
    raw = {
        "batch": 12,
        "threads": 1,
        "data": {"path": str(folder), "lanes": 4, "workers": 0, "views": [{"size": 16}]},
        "model": {"name": "resnet10", "width": 0.0625, "stem": "cifar"},
        "method": {"name": "supervised", "classes": 5},
        "optim": {"warmup_epochs": 0},
    }
    with pytest.raises(
        ConfigError,
        match=r"method\.classes=5, but the labels are of 7 classes with numbers up to 6: set it to "
        r"7",
    ):
        train(load.build(raw), tmp_path / "run")
    mixture = [
        {"path": str(folder), "weight": 1.0},
        {"path": str(write_shards(tmp_path / "more", (24,))), "weight": 1.0},
    ]
    mixed = {**raw, "data": {**raw["data"], "path": "", "mixture": mixture}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="48 of 48 samples have no label"):
        train(load.build(mixed), tmp_path / "run")


# --- the catalogue --------------------------------------------------------------------------------


def test_the_catalogue_reads_recipes_and_docstrings(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("published: 1.5 % (paper), 2 % (code)\nmethod: byol\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nauxiliaries: [rotation]\n")
    (tmp_path / "c.yaml").write_text("method: {name: byol}\n")
    methods = {entry.name: entry for entry in catalogue.entries("methods", tmp_path)}
    assert methods["byol"].paper.startswith("BYOL: Bootstrap Your Own Latent")
    assert methods["byol"].recipes == {"a": "1.5 % (paper), 2 % (code)", "c": ""}
    assert methods["swav"].recipes == {}
    rotation, _ = catalogue.entries("auxiliaries", tmp_path)
    assert (rotation.name, rotation.recipes) == ("rotation", {"b": ""})


def test_every_method_names_its_paper_and_kind(tmp_path: Path) -> None:
    for entry in catalogue.entries("methods", tmp_path):
        model = importlib.import_module(f"scaletrain.methods.{entry.name}").Model
        assert entry.kind == model.kind, f'{entry.name}: write `kind = "..."` in its class'
        assert entry.kind in get_args(Kind)
        assert entry.paper


def test_a_method_and_an_auxiliary_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    """Rotation is both: a recipe that adds it to a method is not one of the method."""
    (tmp_path / "alone.yaml").write_text("method: rotation\n")
    (tmp_path / "added.yaml").write_text("method: byol\nauxiliaries: [rotation]\n")
    (method,), (auxiliary,) = (
        [entry for entry in catalogue.entries(package, tmp_path) if entry.name == "rotation"]
        for package in ("methods", "auxiliaries")
    )
    assert (method.kind, list(method.recipes)) == ("pretext", ["alone"])
    assert (auxiliary.kind, list(auxiliary.recipes)) == ("", ["added"])
    both = load.build({"method": "rotation", "auxiliaries": [{"name": "rotation", "hidden": 7}]})
    assert (both.method.name, both.auxiliaries[0].model_dump()["hidden"]) == ("rotation", 7)
    with pytest.raises(ConfigError, match=r"unknown key 'method\.hidden'"):
        load.build({"method": {"name": "rotation", "hidden": 7}})
