"""Recipes: bases, overrides and nearest names. The methods and the engine are toys."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from kit.toy_components import TOY, Write
from pydantic import ValidationError

from scaletrain.config import load
from scaletrain.config import schema as config
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config

pytestmark = pytest.mark.usefixtures("toys")


def test_defaults_are_frozen_tuples(recipe: Path) -> None:
    loaded = load.load(recipe)
    assert loaded.data.views == (config.View(count=2),)
    assert (loaded.method.name, loaded.engine.name) == ("toyalpha", "toyengine")
    assert loaded.method.sizes == (10, 20)  # type: ignore[attr-defined]
    for owner, field in (
        (loaded, "seed"),
        (loaded.data, "path"),
        (loaded.method, "tau"),
        (loaded.data.views[0], "size"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(owner, field, 1)
    assert (
        pickle.loads(pickle.dumps(loaded)) == loaded == copy.deepcopy(loaded)
    )  # loader workers receive it


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=0.45", "optim.lr", 0.45),
        ("optim.lr=1e-6", "optim.lr", 1e-6),  # YAML 1.1 would read a word
        ("optim.lr=.5", "optim.lr", 0.5),
        ("batch=1e3", "batch", 1000),
        ("seed=0o14", "seed", 12),
        ("data.path=on", "data.path", str(Path("on").absolute())),  # YAML 1.1 would read true
        ("data.path=s3://a/b?c=d", "data.path", "s3://a/b?c=d"),
        ("data.path='0123'", "data.path", str(Path("0123").absolute())),
        ("data.path=a/./b/", "data.path", str(Path("a/b").absolute())),
        ("data.path=~/x", "data.path", str(Path.home() / "x")),
        ("optim.betas=[0.8, 0.9]", "optim.betas", [0.8, 0.9]),
        ("method.sizes=[1,2,3]", "method.sizes", [1, 2, 3]),
        ("method.head.hidden=8", "method.head.hidden", 8),
        ("engine.amp=true", "engine.amp", True),
        ("data.views.0.size=96", "data.views.0.size", 96),
    ],
)
def test_override_changes_one_key(recipe: Path, override: str, key: str, value: Any) -> None:
    before, after = load.load(recipe), load.load(recipe, [override])
    assert [(k, new) for k, _, new in load.diff(before, after)] == [(key, value)]


def test_later_override_wins_and_all_apply(recipe: Path) -> None:
    loaded = load.load(recipe, iter(["seed=1", "optim.lr=2", "seed=3", "optim.momentum=0.5"]))
    assert (loaded.seed, loaded.optim.lr, loaded.optim.momentum) == (3, 2.0, 0.5)


def test_list_override_names_the_items(write: Write) -> None:
    path = write(TOY + "data: {views: [{size: 32}, {size: 16, count: 4}]}")
    loaded = load.load(path, ["data.views.1.count=2"])
    assert [(v.size, v.count) for v in loaded.data.views] == [(32, 1), (16, 2)]
    with pytest.raises(ConfigError, match=r"'views' is a list; its items are 0, 1, not '2'"):
        load.load(path, ["data.views.2.count=2"])


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optm.lr=1", "unknown key 'optm'; did you mean 'optim'?"),
        (
            "lr_reference_batch=1",
            "unknown key 'lr_reference_batch'; did you mean 'optim.lr_reference_batch'?",
        ),
        ("optim.momentm=1", "unknown key 'optim.momentm'; did you mean 'optim.momentum'?"),
        (
            "data.views=[{size: 32}, {cout: 2}]",
            "unknown key 'data.views.1.cout'; did you mean 'data.views.1.count'?",
        ),
        ("method.taw=1", "unknown key 'method.taw'; did you mean 'method.tau'?"),
        (
            "method.head.hiden=1",
            "unknown key 'method.head.hiden'; did you mean 'method.head.hidden'?",
        ),
        ("engine.ampp=true", "unknown key 'engine.ampp'; did you mean 'engine.amp'?"),
        ("zzzzz=1", "unknown key 'zzzzz'"),
        ("method.name=toyalfa", "unknown method 'toyalfa' (did you mean 'toyalpha'?); available: "),
        ("engine=toyengin", "unknown engine 'toyengin' (did you mean 'toyengine'?); available: "),
        ("method=3", "needs a `name`; available: "),
        ("optim.name=larz", "'lars', 'sgd' or 'adamw' (got 'larz'); did you mean 'lars'?"),
        ("optim.lr=0", "optim.lr: Input should be greater than 0 (got 0)"),
        ("optim.lr=.inf", "finite number"),
        ("optim.lr=.nan", "optim.lr"),
        ("optim.lr=[1", "'optim.lr=[1': not valid YAML"),
        ("optim.lr=!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("optim.lr.x=3", "optim.lr: Input should be a valid number"),
        ("optim=3", "optim: Input should be a valid dictionary"),
        ("seed=-1", "seed: Input should be greater than or equal to 0 (got -1)"),
        ("batch=256.5", "batch: Input should be a valid integer"),
        ("batch=on", "batch: Input should be a valid integer"),
        ("data.views=[]", "data: views is empty"),
        ("data.views=[{scale: [0.5, 0.1]}]", "scale is a range (low, high) with 0 < low <= high"),
        ("data.views=[{scale: [0.5, 17]}]", "at most 16, got 17"),
        ("base=other.yaml", "unknown key 'base'"),
        ("seed", "an override has the form key.subkey=value"),
        ("=1", "an override has the form"),
        ("a..b=1", "an override has the form"),
    ],
)
def test_bad_override_is_refused_with_the_fix(recipe: Path, override: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load.load(recipe, [override])
    assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("- a", "a recipe is a mapping of keys, not a list"),
        ("seed: 1\nseed: 2", "duplicate key"),
        ("a: [", "not valid YAML"),
        ("seed: 1\n---\nseed: 2", "single document"),
        ("1: 2", "Keys should be strings"),
        ("base: nothere.yaml", "nothere.yaml: no such recipe"),
        ("base: recipe.yaml", "`base:` leads back to itself"),
        ("base: .", "this is a folder, not a file"),
    ],
)
def test_bad_file_is_named(write: Write, body: str, text: str) -> None:
    path = write(body)
    with pytest.raises(ConfigError) as error:
        load.load(path)
    assert text in str(error.value)
    assert str(path.parent) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_recipe_suggests_a_neighbour(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such recipe; did you mean 'recipe.yaml'\?"):
        load.load(recipe.with_name("recip.yaml"))
    with pytest.raises(ConfigError, match="no such recipe"):
        load.load(recipe.parent / "nowhere" / "recipe.yaml")


def test_error_in_file_is_not_blamed_on_the_command_line(write: Write) -> None:
    with pytest.raises(
        ConfigError, match=r"recipe\.yaml: unknown key 'sed'; did you mean 'seed'\?"
    ):
        load.load(write(TOY + "sed: 1"), ["seed=3"])
    with pytest.raises(ConfigError, match=r"^command line: "):
        load.load(write(TOY), ["sed=3"])


def test_bases_merge_deeply_through_folders(write: Write, tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    write(
        TOY + "seed: 1\noptim: {lr: 0.1, momentum: 0.8}\ndata: {views: [{size: 32}, {size: 16}]}",
        "common/root.yaml",
    )
    write("base: root.yaml\nseed: 2\noptim: {lr: 0.2}\nmethod: {tau: 0.5}", "common/middle.yaml")
    loaded = load.load(
        write(
            "base: common/middle.yaml\ndata: {views: [{size: 64}], lanes: 8}\nengine: {amp: true}"
        )
    )
    assert (loaded.seed, loaded.optim.lr, loaded.optim.momentum) == (2, 0.2, 0.8)
    assert [view.size for view in loaded.data.views] == [64]  # a list replaces a list
    assert loaded.method.model_dump() == {
        "name": "toyalpha",
        "tau": 0.5,
        "head": {"hidden": 64},
        "sizes": (10, 20),
    }
    assert loaded.engine.model_dump() == {"name": "toyengine", "amp": True}


def test_long_cycle_of_bases_is_refused(write: Write) -> None:
    write("base: b.yaml", "a.yaml")
    write("base: c.yaml", "b.yaml")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load.load(write("base: a.yaml", "c.yaml"))


@pytest.mark.parametrize("change", [["method.name=toybeta"], ["method=toybeta"]])
def test_new_name_replaces_the_leaf(write: Write, change: list[str]) -> None:
    path = write("engine: toyengine\nmethod: {name: toyalpha, tau: 0.1, head: {hidden: 3}}")
    loaded = load.load(path, change)
    assert loaded.method.model_dump() == {
        "name": "toybeta",
        "tau": 0.99,
        "head": {"layers": 64},
        "sizes": (10, 20),
    }
    both = load.load(
        path, ["method.tau=0.7", *change, "method.head.layers=2"]
    )  # no order loses a change
    assert both.method.model_dump() == {
        "name": "toybeta",
        "tau": 0.7,
        "head": {"layers": 2},
        "sizes": (10, 20),
    }


def test_same_name_keeps_the_leaf(write: Write) -> None:
    path = write("engine: toyengine\nmethod: {name: toyalpha, tau: 0.1}")
    assert load.load(path, ["method=toyalpha"]) == load.load(path)


def test_synthetic_shorthand_keeps_the_views(write: Write) -> None:
    loaded = load.load(
        write(TOY + "data: {path: /x, lanes: 4, views: [{size: 32}]}"), ["data=synthetic"]
    )
    assert (loaded.data.path, loaded.data.lanes, loaded.data.views[0].size) == ("synthetic", 4, 32)
    child = load.load(write("base: recipe.yaml\ndata: synthetic", "child.yaml"))
    assert child == loaded
    grandchild = load.load(write("base: child.yaml\ndata: {lanes: 2}", "grandchild.yaml"))
    assert (grandchild.data.path, grandchild.data.lanes) == ("synthetic", 2)
    assert load.load(write(TOY + "data: synthetic", "plain.yaml")).data.path == "synthetic"


def test_section_without_name_means_the_default_leaf(
    monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    fields = Config.model_fields
    monkeypatch.setattr(fields["method"], "default", {"name": "toyalpha"})
    monkeypatch.setattr(fields["engine"], "default", {"name": "toyengine"})
    loaded = load.load(write("method: {tau: 0.5}\nengine: {amp: true}"))
    assert loaded == load.load(
        write("method: {name: toyalpha, tau: 0.5}\nengine: {name: toyengine, amp: true}")
    )
