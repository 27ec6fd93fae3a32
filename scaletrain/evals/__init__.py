"""Evaluation of frozen encoders: `run` judges one target by any of the benchmarks beside this file and writes protocol cards.

A benchmark is a file here with a frozen `Config` and `measure(config, scene) -> (metrics, protocol)`, named by its
file name. Metrics are per cent. The protocol says how was measured, alike for every encoder; what came out besides is under
its key `found`, which the card has beside the protocol.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from scaletrain import config, dist, durable, recipe
from scaletrain.data.remote import is_remote
from scaletrain.evals import targets
from scaletrain.evals.features import Config as FeaturesConfig
from scaletrain.evals.features import Scene
from scaletrain.evals.targets import Encoder, EvalError, Subject
from scaletrain.versions import installed

_SHARED = ("features", "scores", "targets")  # files here that are no benchmarks


def names() -> tuple[str, ...]:
    """All benchmarks."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED))


def run(
    target: Path,
    benchmarks: Sequence[str],
    *,
    train: str | Path | None = None,
    test: str | Path | None = None,
    overrides: Iterable[str] = (),
    encoder: Encoder = "trained",
    labels: Path | None = None,
) -> list[dict[str, Any]]:
    """Judge RUN (its newest good checkpoint), RUN/checkpoints/step-N or an exported FILE; one card per benchmark.

    `train` and `test` are folders or addresses of shards with labels; by default the run's own data and the folder `test` or
    `val` beside it. `overrides` such as `linear.epochs=20` or `features.size=224` name a benchmark's or the features' settings.
    `encoder` puts a baseline in the place of the trained one. `labels` is a label subset of the training shards: no other
    sample of them is used, and the file's stem ends the names of cards and scalars. Cards go to RUN/evals or beside FILE,
    scalars to RUN/tensorboard/evals.
    Raises EvalError and other ValueErrors whose text says what to do.
    """
    dist.keep_freed_memory()
    settings = _settings(benchmarks, overrides)
    subject = targets.find(target, encoder)
    features = settings.pop("features")
    assert isinstance(features, FeaturesConfig)
    scene = Scene(subject, features, *_folders(subject, train, test), labels)
    cards = []
    for name, chosen in settings.items():
        begun = time.monotonic()
        metrics, protocol = _leaf(name).measure(chosen, scene)
        found = protocol.pop("found", {})
        card = {
            "benchmark": name,
            "encoder": encoder,
            "about": subject.about,
            "source": str(subject.source),
            "step": subject.step,
            "metrics": metrics,
            "unit": "per cent",
            "protocol": {"test_transform": scene.transform, **protocol},
            "found": found,
            "data": scene.provenance(),
            "versions": _versions(),
            "seconds": round(time.monotonic() - begun, 2),
        }
        _write(subject, card, f"-{labels.stem}" if labels else "")
        cards.append(card)
    return cards


def report(cards: Iterable[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print one table: a row per encoder and step, a column per top-1 accuracy."""
    rows: dict[tuple[str, str, int], dict[str, float]] = {}
    for card in cards:
        row = rows.setdefault((card["source"], card["encoder"], card["step"]), {})
        # every accuracy comes with its mean over classes; the bare name is the top-1
        row.update({name: value for name, value in card["metrics"].items() if f"{name}_per_class" in card["metrics"]})
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table("encoder", "step", title="top-1 accuracy, %")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for (_, encoder, step), row in rows.items():
        table.add_row(encoder, str(step), *(f"{row[c]:.2f}" if c in row else "-" for c in columns))
    (console or Console()).print(table)


def _leaf(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def _settings(benchmarks: Sequence[str], overrides: Iterable[str]) -> dict[str, config.Frozen]:
    """Validated settings of "features" and of each benchmark, in the order asked."""
    if not benchmarks:
        raise EvalError(f"no benchmark given; known: {', '.join(names())}")
    for name in benchmarks:
        if name not in names():
            raise EvalError(f"there is no benchmark '{name}'{recipe.nearest(name, names())}; known: {', '.join(names())}")
    models: dict[str, type[config.Frozen]] = {"features": FeaturesConfig, **{name: _leaf(name).Config for name in benchmarks}}
    raw = recipe.apply({}, overrides)
    for section in raw:
        if section not in models:
            hint = recipe.nearest(section, models) or f"; this evaluation has: {', '.join(models)}"
            raise EvalError(f"override of '{section}', which is not evaluated{hint}")
    return {name: _validate(model, raw.get(name, {}), name) for name, model in models.items()}


def _validate(model: type[config.Frozen], raw: Any, name: str) -> config.Frozen:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            key = ".".join(map(str, item["loc"]))
            known = recipe.nearest(key, model.model_fields) or f"; known: {', '.join(model.model_fields)}"
            text = f"unknown key{known}" if item["type"] == "extra_forbidden" else f"{item['msg']} (got {item['input']!r})"
            lines.append(f"{name}.{key}: {text}")
        raise EvalError("; ".join(lines)) from None


def _folders(subject: Subject, train: str | Path | None, test: str | Path | None) -> tuple[str, str]:
    """Training and test set: as given, else the run's own data and the folder beside it."""
    source = str(train or subject.data.path)
    if source in ("", "synthetic"):
        raise EvalError(f"{subject.source}: its data.path '{source}' has no labels to judge by; give --train and --test")
    if test is not None:
        return source, str(test)
    if is_remote(source):
        raise EvalError(f"no test set: {source} is remote; give its labelled test shards with --test")
    beside = [Path(source).absolute().parent / name for name in ("test", "val")]
    for folder in beside:
        if folder.is_dir():
            return source, str(folder)
    raise EvalError(f"no test set: neither {beside[0]} nor {beside[1]} is a folder; give one with --test")


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: installed(name) or "not installed" for name in ("scaletrain", "torch", "numpy")},
    }


def _write(subject: Subject, card: Mapping[str, Any], subset: str) -> None:
    """The card as JSON, whole or not at all, and its metrics into the run's TensorBoard. `subset` ends the names of both."""
    suffix = ("" if subject.encoder == "trained" else f"-{subject.encoder}") + subset
    prefix = "" if subject.run else f"{subject.source.stem}-"  # several exported files may share a folder
    path = subject.home / f"{prefix}{card['benchmark']}-step-{card['step']}{suffix}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacing(path, str(os.getpid())) as file:
            file.write(json.dumps(card, indent=1).encode() + b"\n")
    except OSError as error:
        raise EvalError(f"cannot write {path}: {error.strerror}") from None
    if subject.run is not None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        writer = SummaryWriter(str(subject.run / "tensorboard" / "evals"))
        for name, value in card["metrics"].items():
            writer.add_scalar(f"eval{suffix}/{name}", value, card["step"])
        writer.close()
