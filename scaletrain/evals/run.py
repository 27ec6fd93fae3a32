"""Evaluation of frozen encoders: `run` evaluates one encoder on benchmarks and writes results.

A benchmark is a file in benchmarks/, named by its file name, with a frozen `Config` and
`measure(config, context) -> (metrics, protocol)`. Metrics are in per cent. The protocol describes
how they were measured, in the same way for every encoder. Further findings, such as a chosen
learning rate, are under its key `found`, which a result lists separately. A benchmark of more than
the encoder also has `identity(context)`, which identifies the rest.
"""

from __future__ import annotations

import importlib
import pkgutil
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scaletrain import dist
from scaletrain.config import recipe, schema, validation
from scaletrain.data.errors import ShardError
from scaletrain.data.format import selection
from scaletrain.data.format.names import is_remote
from scaletrain.evals import benchmarks as package
from scaletrain.evals import folders, results
from scaletrain.evals.context import EvalContext
from scaletrain.evals.encoders import targets
from scaletrain.evals.encoders.targets import Encoder, EncoderKind
from scaletrain.evals.errors import EvalError
from scaletrain.evals.features import FeatureConfig
from scaletrain.runtime.versions import installed
from scaletrain.train import run_folder


def names() -> tuple[str, ...]:
    """Names of all benchmarks."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__)))


def run(
    target: Path,
    benchmarks: Sequence[str],
    *,
    train: str | Path | None = None,
    test: str | Path | None = None,
    overrides: Iterable[str] = (),
    encoder: EncoderKind = "trained",
    labels: Path | None = None,
    same_numbers: bool = False,
    notice: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Evaluate RUN (its newest good checkpoint), RUN/checkpoints/step-N or an exported FILE; one
    result per benchmark.

    `train` and `test` are folders or addresses of labelled shards; by default the run's own data
    and a folder `test` or `val` next to it. `overrides` such as `linear.epochs=20` or
    `features.size=224` change settings of a benchmark or of the features. `encoder` selects the
    trained encoder or a baseline. `labels` is a label subset of the training shards: only its
    samples are used. Without it all are, also where the run itself was trained on a data.subset,
    which the result then says. `same_numbers` asserts that both sets number their classes alike,
    whatever their classes.json say. Results go to RUN/evals or the folder of FILE, scalars to
    RUN/tensorboard/evals. A result that exists is read, not measured again. Each result is the
    content of its file, with the path as `file`. Raises EvalError and other ValueErrors whose text
    says what to do.
    """
    dist.keep_freed_memory()

    settings = _settings(benchmarks, overrides)
    chosen = targets.find(target, encoder)
    features = settings.pop("features")
    assert isinstance(features, FeatureConfig)
    sets = _folders(chosen, train, test)

    for place in (
        chosen.source,
        *(Path(selection.one_folder(folder).folder) for folder in sets),
    ):
        run_folder.warn_if_open(place)

    context = EvalContext(chosen, features, *sets, labels, same_numbers)
    return [_result(name, chosen, context, notice) for name, chosen in settings.items()]


def _benchmark(name: str) -> Any:
    return importlib.import_module(f"{package.__name__}.{name}")


def _settings(benchmarks: Sequence[str], overrides: Iterable[str]) -> dict[str, schema.Frozen]:
    """Validated settings of "features" and of each benchmark, in the given order."""
    if not benchmarks:
        raise EvalError(f"no benchmark given; available: {', '.join(names())}")

    for name in benchmarks:
        if name not in names():
            raise EvalError(
                f"unknown benchmark '{name}'{recipe.closest(name, names())}; available: "
                f"{', '.join(names())}"
            )

    models: dict[str, type[schema.Frozen]] = {
        "features": FeatureConfig,
        **{name: _benchmark(name).Config for name in benchmarks},
    }
    raw = recipe.apply({}, overrides)

    for section in raw:
        if section not in models:
            hint = recipe.nearest(section, models) or f"; this evaluation has: {', '.join(models)}"
            raise EvalError(f"override of '{section}', which is not evaluated{hint}")

    return {name: _validate(model, raw.get(name, {}), name) for name, model in models.items()}


def _validate(model: type[schema.Frozen], raw: Any, name: str) -> schema.Frozen:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        text = validation.explain(error, lambda loc: _hint(str(loc[-1]), model), name)
        raise EvalError(text) from None


def _hint(key: str, model: type[schema.Frozen]) -> str:
    fields = model.model_fields
    return recipe.nearest(key, fields) or f"; available: {', '.join(fields)}"


def _folders(
    encoder: Encoder, train: str | Path | None, test: str | Path | None
) -> tuple[str, str]:
    """Training and test set: as given, else the run's own data and the folder next to it."""
    source = schema.absolute(str(train or encoder.data.path))
    if source in ("", "synthetic"):
        raise EvalError(
            f"{encoder.source}: its data.path '{source}' has no labels to evaluate with; give "
            "--train and --test"
        )
    if test is not None:
        return source, schema.absolute(str(test))
    if is_remote(source):
        raise EvalError(
            f"no test set: {source} is remote; give its labelled test shards with --test"
        )

    siblings = folders.next_to(source)
    for folder in siblings:
        if folder.is_dir():
            return source, str(folder)

    raise EvalError(
        f"no test set: neither {siblings[0]} nor {siblings[1]} is a folder; give one with --test"
    )


def _result(
    name: str, chosen: schema.Frozen, context: EvalContext, notice: Callable[[str], None]
) -> dict[str, Any]:
    """The result of one benchmark: read if it exists, else measured and written; also plotted in
    TensorBoard.
    """
    encoder, data = context.encoder, context.encoder.data
    further = getattr(_benchmark(name), "identity", None)
    defined = {
        "format": results.FORMAT,
        "scaletrain": installed("scaletrain"),
        "protocol": {"benchmark": name, name: chosen.model_dump(mode="json"), **context.identity},
        "encoder": encoder.identity | (further(context) if further else {}),
        # Order of the augmented images.
        "order": {"lanes": data.lanes, "window": data.window},
        "max_bad": context.max_bad if context.skip else None,
    }

    # Several exported files may share a folder.
    prefix = "" if encoder.run else f"{encoder.source.stem}-"
    baseline = "" if encoder.kind == "trained" else f"-{encoder.kind}"
    digest = results.digest(defined)
    path = encoder.home / f"{prefix}{name}-step-{encoder.step}{baseline}-{digest}.json"

    if path.exists():
        content = results.parse(path)[1]
        if content["digest"] != digest:
            raise EvalError(
                f"{path} contains another result than its name says; move it away, or delete it "
                "to measure again"
            )

        notice(f"{name}: read from {path}, measured before; delete this file to measure again")
    else:
        results.prepare(path)
        content = results.write(
            path, {**_measure(name, chosen, context), "digest": digest, "identity": defined}
        )

    if encoder.run is not None:
        results.plot(encoder.run, path)

    return {**content, "file": str(path)}


def _measure(name: str, chosen: schema.Frozen, context: EvalContext) -> dict[str, Any]:
    encoder, begun = context.encoder, time.monotonic()
    try:
        metrics, protocol = _benchmark(name).measure(chosen, context)
    except ShardError as fault:
        text = f"{fault.text}; --set features.on_bad=skip leaves such samples out and counts them"
        raise ShardError(fault.shard, fault.offset, text) from None

    found = protocol.pop("found", {})
    trained: dict[str, Any] = {"samples": encoder.samples, "epochs": encoder.epochs}
    if encoder.data.subset:
        trained["subset"] = encoder.data.subset

    return {
        "format": results.FORMAT,
        "benchmark": name,
        "encoder": encoder.kind,
        "about": encoder.about,
        "source": str(encoder.source),
        "step": encoder.step,
        "trained": trained,
        "measured": datetime.now(UTC).isoformat(),
        "metrics": metrics,
        "unit": "per cent",
        "protocol": {"test_transform": context.transform, **protocol},
        "found": found,
        "data": context.provenance(),
        "versions": _versions(),
        "seconds": round(time.monotonic() - begun, 2),
    }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: installed(name) or "not installed" for name in ("scaletrain", "torch", "numpy")},
    }
