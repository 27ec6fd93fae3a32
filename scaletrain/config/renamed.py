"""Configuration keys that had another name in 0.1.0's development, for run folders that still have
it. Recipes and overrides use the present names only. To be deleted at 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a run saves its configuration as: the only file in which earlier names are read.
SAVED = "config.yaml"

# Earlier dotted key -> present one, in the same section or in one inside of it. `*` stands for the
# number of a view.
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
    "data.masks": "data.foreground.masks",
    "data.good_crops": "data.foreground.good_crops",
    "data.good_cover": "data.foreground.good_cover",
    "data.mask_study": "data.foreground.study",
    "data.mask_share": "data.foreground.study_share",
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

    result: dict[str, Any] = {}
    for key, value in raw.items():
        now = RENAMED.get(f"{above}{key}", f"{above}{key}")
        *sections, name = now.removeprefix(above).split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        values = VALUES.get(f"{above}{key}")
        place[name] = values.get(value, value) if values else translated(value, f"{now}.")

    return result


def present_name(loc: tuple[int | str, ...]) -> str | None:
    """The dotted name that a key has now; None for one that was not renamed."""
    key = ".".join("*" if isinstance(part, int) else str(part) for part in loc)
    found = RENAMED.get(key)
    if found is None:
        return None
    numbers = (str(part) for part in loc if isinstance(part, int))
    return ".".join(next(numbers) if part == "*" else part for part in found.split("."))
