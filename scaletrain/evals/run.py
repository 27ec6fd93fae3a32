"""Evaluation of frozen encoders: an encoder on benchmarks, to result files."""

from __future__ import annotations

import contextlib
import glob
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scaletrain import dist
from scaletrain.data.errors import ShardError
from scaletrain.evals import benchmark, datasets, intervals, request, results
from scaletrain.evals.context import EvalContext
from scaletrain.evals.datasets import BenchmarkDataset
from scaletrain.evals.encoders import targets
from scaletrain.evals.encoders.encoder import EncoderConfig
from scaletrain.evals.encoders.targets import Encoder, EncoderKind
from scaletrain.evals.errors import EvalError
from scaletrain.evals.features import FeatureConfig
from scaletrain.evals.open_dataset import open_dataset
from scaletrain.evals.predictions import Score, named_metrics, pack
from scaletrain.evals.request import Request
from scaletrain.runtime import locks
from scaletrain.runtime.versions import installed


def run(
    target: str | Path,
    benchmarks: Sequence[str],
    *,
    overrides: Iterable[str] = (),
    encoder: EncoderKind = "trained",
    notice: Callable[[str], None] = print,
    **options: Any,
) -> list[dict[str, Any]]:
    """Evaluate a run (its newest good checkpoint), a step, or another encoder that
    `encoders.targets.find` knows; one result per benchmark.

    options: further fields of Request. Results go to the folder RUN/evals or that of the file. A
    result that exists is read, not measured again. Each result is the content of its file, with the
    path as `file`. Raises EvalError and other ValueErrors whose text says what to do.
    """
    for name in ("train", "test"):
        if options.get(name) is not None:
            options[name] = str(options[name])

    wanted = Request(tuple(benchmarks), overrides=tuple(overrides), kind=encoder, **options)
    dist.keep_freed_memory()
    dist.init()
    evaluation = Evaluation(target, wanted)
    # Other ranks help to encode, and are done then.
    evaluation.prepare()
    helps = not dist.main()
    dist.shutdown()
    if helps:
        return []

    return [evaluation.result(name, notice) for name in wanted.benchmarks]


class Evaluation:
    """An encoder, its dataset and the settings of benchmarks, opened and checked; nothing is
    measured yet.
    """

    def __init__(self, target: str | Path, wanted: Request) -> None:
        """Raises EvalError, ConfigError, DataError or CheckpointError."""
        self._settings = request.settings(wanted.benchmarks, wanted.overrides)
        features = self._settings.pop("features")
        assert isinstance(features, FeatureConfig)
        config = self._settings.pop("encoder")
        assert isinstance(config, EncoderConfig)

        encoder = targets.find(target, wanted.kind, config)
        self._home = wanted.results or encoder.home
        store = wanted.store or self._home / "features"
        data = encoder.data
        skip = (data.on_bad if features.on_bad == "auto" else features.on_bad) == "skip"
        max_bad = data.max_bad if features.max_bad is None else features.max_bad

        dataset = open_dataset(
            _described(wanted, encoder), cache=data.cache, skip=skip, max_bad=max_bad
        )
        self.context = EvalContext(encoder, dataset, features, store)

    def path(self, name: str) -> Path:
        """Where the result of a benchmark is or will be; nothing is measured for it."""
        return self._path(name, results.digest(self._identity(name)))

    def prepare(self) -> None:
        """Store the features that missing results need, with the devices of all ranks. Every rank
        calls it; with one there is nothing to share.
        """
        if dist.world() == 1:
            return

        missing = [name for name in self._settings if not self.path(name).exists()]
        for name in dist.broadcast_object(missing):
            needs = benchmark.load(name).needs(self._settings[name], self.context.encoder)
            for split in needs.splits:
                self.context.prepare(split)

    def result(self, name: str, notice: Callable[[str], None] = print) -> dict[str, Any]:
        """The result of a benchmark: read if it exists, else measured and written.

        Of several processes that want the same result one measures it, and the others wait.
        """
        identity = self._identity(name)
        digest = results.digest(identity)
        path = self._path(name, digest)
        if path.exists():
            return _existing(name, path, digest, notice)

        results.prepare(path)
        with _alone(path.parent / "locks" / digest):
            path = self._path(name, digest)
            if path.exists():
                return _existing(name, path, digest, notice)

            content, score = self._measure(name)
            content |= {"digest": digest, "identity": identity}
            written = results.write(path, content, pack(score.predictions))

        return {**written, "file": str(path)}

    def _path(self, name: str, digest: str) -> Path:
        encoder, dataset = self.context.encoder, self.context.dataset.name
        # Several exported files may share a folder.
        prefix = "" if encoder.run else f"{encoder.name}-"
        baseline = "" if encoder.kind == "trained" else f"-{encoder.kind}"
        end = f"-step-{encoder.step}{baseline}-{digest}.json"
        # The same data may have been evaluated under another name.
        known = sorted(self._home.glob(f"{glob.escape(prefix)}{name}@*{end}"))

        return known[0] if known else self._home / f"{prefix}{name}@{dataset}{end}"

    def _identity(self, name: str) -> dict[str, Any]:
        """All that defines a result."""
        context, module, settings = self.context, benchmark.load(name), self._settings[name]
        chosen = settings.model_dump(mode="json")
        further = benchmark.identity(module, context)
        augmented = module.needs(settings, context.encoder).augmented

        return {
            "format": results.FORMAT,
            "scaletrain": installed("scaletrain"),
            "protocol": {"benchmark": name, name: chosen, **context.identity},
            "encoder": {**context.encoder.identity, **further},
            "views": context.stream if augmented else None,
            "max_bad": context.extractor.max_bad if context.extractor.skip else None,
        }

    def _measure(self, name: str) -> tuple[dict[str, Any], Score]:
        context, encoder, begun = self.context, self.context.encoder, time.monotonic()
        try:
            score: Score = benchmark.load(name).measure(self._settings[name], context)
        except ShardError as fault:
            text = (
                f"{fault.text}; --set features.on_bad=skip leaves such samples out and counts them"
            )
            raise ShardError(fault.shard, fault.offset, text) from None

        metric = context.dataset.metric
        if metric in ("map", "map11") and not score.main.endswith(metric):
            print(
                f"warning: {name} does not measure {metric}, by which {context.dataset.name} is "
                f"scored; its main metric is {score.main}",
                file=sys.stderr,
            )

        metrics, bounds = {}, {}
        for key, prediction, metric, value in named_metrics(score.predictions):
            metrics[key] = value
            bounds[key] = intervals.interval(score.predictions[prediction], metric)

        trained: dict[str, Any] = {"samples": encoder.samples, "epochs": encoder.epochs}
        if encoder.data.subset:
            trained["subset"] = encoder.data.subset

        return {
            "format": results.FORMAT,
            "benchmark": name,
            "dataset": context.dataset.name,
            "name": "" if encoder.run else encoder.name,
            "encoder": encoder.kind,
            "about": encoder.about,
            "source": str(encoder.source),
            "step": encoder.step,
            "trained": trained,
            "measured": datetime.now(UTC).isoformat(),
            "main": score.main,
            "metrics": metrics,
            "intervals": bounds,
            "unit": "per cent",
            "protocol": {"test_transform": context.transform, **score.protocol},
            "found": score.found,
            "data": context.provenance(),
            "versions": _versions(),
            "device": str(context.device),
            "seconds": round(time.monotonic() - begun, 2),
        }, score


def _described(wanted: Request, encoder: Encoder) -> BenchmarkDataset:
    """The dataset that is asked for. Raises EvalError or ConfigError."""
    if not wanted.dataset:
        return datasets.given(
            encoder.data.path if wanted.train is None else wanted.train,
            wanted.test,
            labels=wanted.labels,
            same_numbers=wanted.same_numbers,
            source=encoder.source,
        )

    if wanted.train is not None or wanted.test is not None or wanted.same_numbers:
        raise EvalError(
            "--dataset says which training and test images there are, and how their classes are "
            "numbered: leave out --train, --test and --same-numbers, or --dataset"
        )

    chosen = datasets.load(wanted.dataset, wanted.data_root)
    return chosen if wanted.labels is None else chosen.labelled(wanted.labels)


def _existing(name: str, path: Path, digest: str, notice: Callable[[str], None]) -> dict[str, Any]:
    content = results.parse(path)[1]
    if content["digest"] != digest:
        raise EvalError(
            f"{path} contains another result than its name says; move it away, or delete it "
            "to measure again"
        )

    notice(f"{name}: read from {path}, measured before; delete this file to measure again")
    return {**content, "file": str(path)}


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Measure a result only while no other process does; where the file system has no locks, both
    do, and the first result counts.
    """
    lock.parent.mkdir(exist_ok=True)
    with contextlib.ExitStack() as until:
        with contextlib.suppress(OSError):
            until.enter_context(locks.locked(lock, wait=True))
        yield


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: installed(name) or "not installed" for name in ("scaletrain", "torch", "numpy")},
    }
