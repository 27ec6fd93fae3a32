"""Evaluation results as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scaletrain.report.scores import INTERVAL, between
from scaletrain.runtime import tables
from scaletrain.runtime.tables import plural


def report(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the results of one evaluation: scores with intervals, data and result files."""
    first = found[0]
    rows = [
        (name, f"{value:.2f}", between(*result.get("intervals", {}).get(name, (None, None))))
        for result in found
        for name, value in result["metrics"].items()
    ]
    name = f"{first['name']}: " if first.get("name") else ""
    text = [f"{name}{first['encoder']} encoder, step {first['step']}, per cent", ""]
    text += tables.render(("", "score", INTERVAL), rows, width=tables.width()).splitlines()

    text += ["", *(f"{name}: {_set(first['data'][name])}" for name in ("train", "test"))]
    if subset := first["data"].get("labels"):
        text.append(f"of which labels: {subset['samples']:,} of {subset['file']}")
    if own := first.get("trained", {}).get("subset"):
        text.append(f"the run was trained on the samples of {own} only")
        if not subset:
            text[-1] += "; --labels FILE evaluates with a label subset only"

    text.append(
        f"classes: {first['data']['classes']['count']:,}, matched "
        f"{first['data']['classes']['matched']}"
    )
    text += [
        f"warning: {seen}: this is no score of unseen images"
        for seen in first["data"].get("seen_in_training", ())
    ]
    return [*text, *(f"result: {result['file']}" for result in found)]


def _set(data: Mapping[str, Any]) -> str:
    lost = len(data.get("left_out", ()))
    left = f", {lost:,} of them left out because they cannot be read" if lost else ""
    return f"{plural(data['samples'], 'sample')} of {data['path']}{left}"
