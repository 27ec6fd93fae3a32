"""The order of samples over three epochs, as `make golden` writes it to order.json. It does not
depend on the processor.

Run it only when a change is meant to alter the order: runs that are resumed afterwards would
continue with another one.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("order.json")
EPOCHS = 3

if __name__ == "__main__":
    sys.path[:0] = [str(FILE.parents[2]), str(FILE.parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from kit.data import write_shards  # noqa: E402

from scaletrain.config.schema import DataConfig, View  # noqa: E402
from scaletrain.core import Batch  # noqa: E402
from scaletrain.data.format import index  # noqa: E402
from scaletrain.data.loading.loader import open_stream  # noqa: E402
from scaletrain.data.reading import subset  # noqa: E402
from scaletrain.data.reading.reader import Shards  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixture": {"mixture": [("first", 0.3), ("second", 0.7)], "epoch_samples": 60},
    "masks": {"foreground": {"masks": True}},
    "subset": {"subset": "every third"},
    "label support": {"support": {"classes": 3, "per_class": 2, "epochs": EPOCHS}},
}


def digest(parts: list[torch.Tensor]) -> str:
    return hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()[:16]


def hashes(batches: list[Batch], per_epoch: int) -> list[dict[str, str]]:
    """Of each epoch: which samples came, and the keys from which their views are drawn."""
    epochs = [batches[n : n + per_epoch] for n in range(0, len(batches), per_epoch)]
    return [
        {"index": digest([b.index for b in part]), "keys": digest([b.keys for b in part])}
        for part in epochs
    ]


def orders(folder: Path) -> dict[str, Any]:
    """The hashes of every kind of data, from shards that are written to `folder`."""
    paths = {
        name: str(write_shards(folder / name, counts, masks=True))
        for name, counts in {"first": (11, 3, 20, 14), "second": (9, 16)}.items()
    }
    for path in paths.values():
        index.build(Path(path))
    found: dict[str, Any] = {}
    for kind, options in KINDS.items():
        settings: dict[str, Any] = {"path": paths["first"], **options}
        if parts := options.get("mixture"):
            settings |= {
                "path": "",
                "mixture": [{"path": paths[name], "weight": weight} for name, weight in parts],
            }
        if rule := options.get("subset"):
            shards = Shards(paths["first"])
            subset.save(folder / "some.json", shards, np.arange(0, 48, 3), rule, "samples")
            settings["subset"] = str(folder / "some.json")
        if support := options.get("support"):
            shards = Shards(paths["first"])
            subset.save(folder / "all.json", shards, np.arange(len(shards)), "all")
            settings["support"] = {**support, "labels": str(folder / "all.json")}
        data = DataConfig(lanes=4, window=2, workers=0, views=(View(size=8, count=2),), **settings)
        source = open_stream(data, seed=3, batch=12, rank=0, world=1, device=torch.device("cpu"))
        steps = source.plan.steps_per_epoch
        batches = list(source.batches(0, EPOCHS * steps))
        found[kind] = hashes(batches, steps)
        if data.support:
            labelled = [b.support for b in batches if b.support is not None]
            found["labelled samples"] = hashes(labelled, steps)
    return found


def write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = orders(Path(folder))
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{FILE}: {len(found)} orders")


if __name__ == "__main__":
    write()
