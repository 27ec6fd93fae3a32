"""Run folders as training and evaluation leave them, for `scaletrain compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kit.evals import write_result
from scaletrain.config import load
from scaletrain.train import records

PER_EPOCH, EVERY = 40, 7


def make(
    root: Path, name: str, scores: dict[int, float], *, batch: int, steps: int, seconds: float = 0.1
) -> Path:
    """A run of `steps` steps, recorded as a Monitor does it, with a result of `linear` for each
    step in `scores`.
    """
    run = root / name
    (run / "evals").mkdir(parents=True)
    recipe = {"batch": batch, "data": {"lanes": 1}, "method": "byol", "monitor": {"every": EVERY}}
    (run / "config.yaml").write_text(load.dump(load.build(recipe)))
    records = [
        {
            "step": s,
            "epoch": s // PER_EPOCH,
            "steps_per_epoch": PER_EPOCH,
            "speed/images_per_second": 1.0,
            "train/loss": None,
        }
        | ({"speed/seconds_per_step": seconds} if s else {})
        for s in range(0, steps, EVERY)
    ]
    write(run, records)
    for step, score in scores.items():
        result(run, step, score)
    return run


def result(run: Path, step: int, score: float, **changes: Any) -> Path:
    metrics = {"linear": score, "linear_per_class": score, "linear_top5": 99.0}
    return write_result(run, step, changes.pop("metrics", metrics), **changes)


def read(run: Path) -> list[dict[str, Any]]:
    return [record.model_dump(exclude_unset=True) for record in records.read(run).steps]


def write(run: Path, records: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
