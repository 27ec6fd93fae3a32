"""Validation errors of pydantic as text for the user."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from scaletrain.config.recipe import ERRORS, brief, nearest

Location = tuple[int | str, ...]


def explain(error: ValidationError, hint: Callable[[Location], str], prefix: str = "") -> str:
    """Every invalid key with what is wrong and the value given; at most `ERRORS` of them.

    hint: what to say after an unknown key, such as the nearest valid one. prefix: the section that
    the keys belong to.
    """
    errors = error.errors(include_url=False)
    lines = [_line(item, hint, prefix) for item in errors[:ERRORS]]
    more = f"; and {len(errors) - ERRORS:,} more" if len(errors) > ERRORS else ""
    return "; ".join(lines) + more


def first(error: ValidationError) -> str:
    """The first error alone, for files that a program has written."""
    item = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, item['loc'])) or 'whole'}: {item['msg']}"


def _line(item: Mapping[str, Any], hint: Callable[[Location], str], prefix: str) -> str:
    where = brief(".".join(map(str, ([prefix] if prefix else []) + list(item["loc"]))))
    if item["type"] == "extra_forbidden":
        return f"unknown key '{where}'{hint(item['loc'])}"

    text = brief(item["msg"].removeprefix("Value error, "), 1000)
    given = "" if isinstance(item["input"], Mapping) else f" (got {brief(repr(item['input']))})"
    choices = re.findall(r"'([^']+)'", text) if item["type"] == "literal_error" else []
    close = nearest(str(item["input"]), choices)
    return f"{where}{': ' if where else ''}{text}{given}{close}"
