"""Configuration keys that had another name in 0.1.0's development, for run folders that still have
it. Recipes and overrides use the present names only. To be deleted at 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a run saves its configuration as: the only file in which earlier names are read.
SAVED = "config.yaml"

# Earlier dotted key -> present one. `*` stands for the number of a view.
RENAMED = {
    "engine.accumulate": "engine.grad_accum_steps",
    "engine.cache": "engine.gradient_cache",
    "engine.clip": "engine.max_grad_norm",
    "engine.recompute": "engine.activation_checkpointing",
    "optim.trust": "optim.trust_coefficient",
    "optim.rule": "optim.lr_scaling",
    "optim.lr_batch": "optim.lr_reference_batch",
    "optim.final": "optim.min_lr_ratio",
    "data.views.*.area": "data.views.*.scale",
    "model.sobel": "model.input",
}
# Earlier dotted key -> what became of its values, where these changed too.
VALUES: dict[str, dict[Any, Any]] = {"model.sobel": {False: "rgb", True: "sobel"}}


def translated(raw: Any, above: str = "") -> Any:
    """A saved configuration with the present names of its keys."""
    if isinstance(raw, list | tuple):
        return [translated(item, f"{above}*.") for item in raw]
    if not isinstance(raw, Mapping):
        return raw

    names = {key: str(RENAMED.get(f"{above}{key}", key)).rpartition(".")[2] for key in raw}
    return {
        names[key]: VALUES[f"{above}{key}"].get(value, value)
        if f"{above}{key}" in VALUES
        else translated(value, f"{above}{names[key]}.")
        for key, value in raw.items()
    }


def present_name(loc: tuple[int | str, ...]) -> str | None:
    """The dotted name that a key has now; None for one that was not renamed."""
    key = ".".join("*" if isinstance(part, int) else str(part) for part in loc)
    found = RENAMED.get(key)
    if found is None:
        return None
    return ".".join([*(str(part) for part in loc[:-1]), found.rpartition(".")[2]])
