"""Configurations that are saved, compared and described: exact reload, differences, the JSON schema
and earlier names of keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kit.toy_components import Write

from scaletrain.config import load
from scaletrain.config import schema as config
from scaletrain.config.recipe import ConfigError

pytestmark = pytest.mark.usefixtures("toys")


AWKWARD = [
    "on",
    "null",
    "1e-6",
    "0123",
    "a: b # c",
    "it's",
    "ünï",
    "2024-01-01",
    "",
    " lead",
    "~",
    "yes\tno",
    "x" * 300,
]


@pytest.mark.parametrize("path", AWKWARD)
def test_dump_reloads_equal(write: Write, path: str) -> None:
    raw = {
        "batch": 96,
        "data": {
            "path": path,
            "views": [{"size": 32, "scale": [1 / 3, 1]}, {"size": 16, "count": 6}],
        },
        "method": {"name": "toybeta", "tau": 0.1 + 0.2, "sizes": []},
        "engine": "toyengine",
        "optim": {"lr": 1e-300, "weight_decay": 1.5e-6},
    }
    built = load.build(raw)
    again = load.load(write(load.dump(built), "saved.yaml"))
    assert again == built
    assert load.diff(built, again) == []
    assert load.dump(again) == load.dump(built)
    assert type(again.method) is type(built.method)


def test_diff_reports_both_sides(recipe: Path) -> None:
    before = load.load(recipe)
    after = load.load(
        recipe, ["data.views=[{size: 224, count: 2}, {size: 96}]", "method=toybeta", "optim.lr=0.5"]
    )
    changes = {key: (old, new) for key, old, new in load.diff(before, after)}
    assert changes["optim.lr"] == (0.3, 0.5)
    assert changes["data.views.1.size"] == (None, 96)
    assert changes["method.name"] == ("toyalpha", "toybeta")
    assert changes["method.head.hidden"] == (64, None)
    assert "data.views.0.size" not in changes
    assert load.diff(before, before) == []


def _accepts(rule: dict[str, Any], value: Any, definitions: dict[str, Any]) -> bool:
    """A small reading of JSON schema: enough to accept good recipes and refuse misspelt ones."""
    if "$ref" in rule:
        return _accepts(definitions[rule["$ref"].removeprefix("#/$defs/")], value, definitions)
    if "anyOf" in rule:
        return any(_accepts(option, value, definitions) for option in rule["anyOf"])
    if "enum" in rule or "const" in rule:
        return bool(value in rule.get("enum", [rule.get("const")]))
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
        "null": type(None),
    }
    if not isinstance(value, kinds[rule["type"]]):
        return False
    if isinstance(value, dict):
        known = rule["properties"]
        return set(value) <= set(known) and all(
            _accepts(known[key], item, definitions) for key, item in value.items()
        )
    if isinstance(value, list) and "prefixItems" in rule:
        return len(value) == len(rule["prefixItems"])
    return not isinstance(value, list) or all(
        _accepts(rule["items"], item, definitions) for item in value
    )


def test_schema_knows_every_leaf_and_shorthand(recipe: Path) -> None:
    schema = load.schema()

    def ok(raw: Any) -> bool:
        return _accepts(schema, raw, schema["$defs"])

    assert ok(load.load(recipe).model_dump(mode="json"))
    assert ok(
        {
            "base": "x.yaml",
            "data": "synthetic",
            "method": "toybeta",
            "engine": {"name": "toyengine", "amp": True},
        }
    )
    assert ok({"method": {"name": "toyalpha", "head": {"hidden": 3}}})
    assert ok(
        {"method": {"name": "toybeta", "head": {"layers": 3}}}
    )  # two models named Head stay apart
    assert not ok({"method": {"name": "toybeta", "head": {"hidden": 3}}})
    assert not ok({"method": {"name": "toyalpha", "taw": 3}})
    assert not ok({"method": "toygamma"})
    assert not ok({"sed": 3})
    assert not ok({"data": {"views": [{"cout": 3}]}})


def test_leaves_are_the_files(tmp_path: Path) -> None:
    (tmp_path / "scaletrain.methods" / "toygamma.py").write_text("")
    (tmp_path / "scaletrain.methods" / "base.py").write_text("")
    known = config.components("methods")
    assert {"toyalpha", "toybeta", "toygamma"} <= set(known)
    assert "base" not in known
    assert list(known) == sorted(known)


EARLIER = """
engine: {name: ddp, accumulate: 2, cache: false, clip: 0.5, recompute: [1]}
model: {norm_group: 8}
batch: 64
method: byol
optim: {trust: 0.01, rule: sqrt, lr_batch: 128, final: 0.1}
data:
  views: [{size: 16, count: 2, area: [0.1, 0.9]}]
  masks: true
  good_crops: 0.5
  good_cover: 0.3
  mask_study: points
  mask_share: 0.7
"""


def test_a_saved_configuration_may_have_the_names_that_keys_had_earlier(write: Write) -> None:
    config = load.load(write(EARLIER, "config.yaml"))
    engine: Any = config.engine
    assert (engine.grad_accum_steps, engine.gradient_cache) == (2, False)
    assert (engine.max_grad_norm, engine.activation_checkpointing) == (0.5, (1,))
    assert (config.optim.trust_coefficient, config.optim.lr_scaling) == (0.01, "sqrt")
    assert (config.optim.lr_reference_batch, config.optim.min_lr_ratio) == (128, 0.1)
    assert config.data.views[0].scale == (0.1, 0.9)
    assert config.data.foreground.model_dump() == {
        "masks": True,
        "good_crops": 0.5,
        "good_cover": 0.3,
        "study": "points",
        "study_share": 0.7,
    }
    assert load.load(write(load.dump(config))) == config


@pytest.mark.parametrize(
    ("override", "now"),
    [
        ("engine.accumulate=2", "engine.grad_accum_steps"),
        ("optim.rule=sqrt", "optim.lr_scaling"),
        ("data.views=[{size: 16, count: 2, area: [0.1, 0.9]}]", "data.views.0.scale"),
        ("data.masks=true", "data.foreground.masks"),
        ("data.mask_share=0.2", "data.foreground.study_share"),
    ],
)
def test_an_earlier_name_is_refused_with_the_present_one(
    override: str, now: str, recipe: Path, write: Write
) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '.*'; it was renamed to '{now}'"):
        load.load(recipe, ["engine=ddp", override])
    with pytest.raises(ConfigError, match=r"it was renamed to 'optim\.lr_scaling'"):
        load.load(write("optim: {rule: sqrt}", "config.yml"))
