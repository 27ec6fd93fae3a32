"""References in a pipeline file.

`${NAME}` is an option and `${item}` the value of a `foreach`. Of an earlier stage, `${NAME.run}` is
the run folder and `${NAME.output}` the folder of results. Of a stage with `foreach`, these are of
the stage with the same number, and `${NAME.runs}` and `${NAME.outputs}` are the lists of all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from scaletrain.config.recipe import ConfigError, brief

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


def substitute(value: Any, resolve: Callable[[str], Any]) -> Any:
    """A value with every reference in it, at any depth, replaced by `resolve` of its text.

    A text that is one reference takes the type of what it refers to.
    """
    if isinstance(value, Mapping):
        return {key: substitute(inner, resolve) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [substitute(inner, resolve) for inner in value]
    if not isinstance(value, str):
        return value

    if whole := _REFERENCE.fullmatch(value):
        return resolve(whole[1])

    def text(match: re.Match[str]) -> str:
        found = resolve(match[1])
        if isinstance(found, list | Mapping):
            raise ConfigError(f"{match[0]} is a list and cannot be a part of '{brief(value)}'")
        return str(found)

    return _REFERENCE.sub(text, value)


def written(text: str) -> str:
    """A reference as it is in a file."""
    return f"${{{text}}}"
