"""Golden values of every method: the first losses of its miniature, the schedules of its recipes.
`python tests/golden/regenerate.py [METHOD...]` writes them to methods/METHOD.json.

Run it for a new method or recipe, or when a change is meant to alter the numbers, and say so with
the change: a refactoring never needs it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("methods")
STEPS = 6
# deeper than the miniature of other tests: changing it would change every value
MODEL = {"name": "resnet18"}
# of an epoch, to which the schedules of all recipes are brought
PER_EPOCH = 1000

if __name__ == "__main__":
    sys.path[:0] = [str(FOLDER.parents[2]), str(FOLDER.parents[1])]

import torch  # noqa: E402
from kit import small  # noqa: E402

from scaletrain.config import load, recipe  # noqa: E402
from scaletrain.config.schema import Config, components  # noqa: E402
from scaletrain.optim import schedule  # noqa: E402


def losses(method: str) -> list[float]:
    """Float64, from parameters that do not depend on the processor, as torch's float32 normal draws
    do.
    """
    cfg = small.config(method, model=MODEL)
    engine = small.engine(cfg)
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, p in sorted(engine.method.named_parameters()):
            if p.dim() > 1:
                p.copy_(
                    (torch.rand(p.shape, generator=draw, dtype=p.dtype) - 0.5)
                    * (12 / p[0].numel()) ** 0.5
                )
            else:
                p.copy_(0.5 + torch.rand(p.shape, generator=draw, dtype=p.dtype))
    return small.run(engine, cfg, 0, STEPS)


@functools.cache
def recipes() -> dict[str, Config]:
    return {path.stem: load.load(path) for path in sorted(recipe.CONFIGS.glob("*.yaml"))}


def schedules(method: str) -> dict[str, Any]:
    """What the recipes of a method, with auxiliaries or without, ask of the optimizer: to be
    compared with their sources when it is written.
    """
    return {
        name: timetable(config)
        for name, config in recipes().items()
        if config.method.name == method
    }


def timetable(config: Config) -> dict[str, Any]:
    warmup, total = (
        round(PER_EPOCH * epochs) for epochs in (config.optim.warmup_epochs, config.epochs)
    )
    rates = [
        schedule.lr(config.optim, config.batch, step, PER_EPOCH, total)
        for step in (0, warmup, total)
    ]
    return {
        "batch": config.batch,
        "epochs": config.epochs,
        "warmup_epochs": config.optim.warmup_epochs,
        "first, highest and final learning rate": [float(f"{rate:.10g}") for rate in rates],
        "weight_decay": config.optim.weight_decay,
    }


def names(method: str) -> dict[str, Any]:
    """Of all that a checkpoint of the method has: how many, their digest, and those of the method
    itself without encoder and optimizer.
    """
    found = sorted(small.engine(small.config(method, model=MODEL)).state())
    own = [n for n in found if n.startswith("method.") and "backbone." not in n]
    whole = hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]
    return {"count": len(found), "sha256": whole, "own": own}


def write(methods: Sequence[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for method in methods:
        file = FOLDER / f"{method}.json"
        found = {
            "losses": losses(method),
            "schedules": schedules(method),
            "checkpoint": names(method),
        }
        file.write_text(json.dumps(found, indent=2) + "\n")
        print(file)


if __name__ == "__main__":
    write(sys.argv[1:] or components("methods"))
