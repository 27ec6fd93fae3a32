"""A table of all datasets that have a descriptor in configs/datasets."""

from __future__ import annotations

from pathlib import Path

from scaletrain.evals import datasets
from scaletrain.evals.datasets import BenchmarkDataset
from scaletrain.runtime import tables


def show(root: Path | None) -> list[str]:
    """A row for each dataset: its classes, main metric and splits, and whether its shards are in
    the data root.
    """
    rows = [_row(datasets.load(name, root)) for name in datasets.names()]
    text = tables.render(
        ("name", "classes", "main metric", "training images", "validation images", "shards"),
        rows,
        title=f"datasets, with shards below {datasets.data_root(root)}",
        width=tables.width(),
    )
    return text.splitlines()


def _row(found: BenchmarkDataset) -> tuple[str, ...]:
    chosen = f"{found.held_out:,}" if found.held_out else "a tenth, at most 10,009"
    if found.held_out_per_class:
        chosen = f"{found.held_out_per_class} of each class"

    return (
        found.name,
        str(found.classes),
        found.metric,
        f"of {found.train_from}" if found.train_from else "its own",
        "official" if found.val is not None else f"held out: {chosen}",
        "missing" if datasets.missing(found) else "there",
    )
