"""Evaluation results as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scaletrain.runtime import tables
from scaletrain.runtime.tables import plural


def report(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the results of one evaluation: accuracies, data and result files."""
    first = found[0]
    metrics = {name: value for result in found for name, value in result["metrics"].items()}
    # every accuracy comes with its mean over classes; the bare name is the top-1
    parts = [
        (name, [metrics.get(name + part) for part in ("", "_top5", "_per_class")])
        for name in metrics
    ]

    rows = [
        (name, *("-" if x is None else f"{x:.2f}" for x in values))
        for name, values in parts
        if values[-1] is not None
    ]
    text = [f"{first['encoder']} encoder, step {first['step']}, per cent", ""]
    text += tables.render(
        ("", "top-1", "top-5", "per class"), rows, width=tables.width()
    ).splitlines()

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
