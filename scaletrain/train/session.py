"""A training session: everything that is opened, built and restored before its first step."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaletrain import dist
from scaletrain.checkpoint import reader
from scaletrain.checkpoint import writer as checkpoint
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config, DataConfig
from scaletrain.core import Batch, Clock
from scaletrain.data.format import selection
from scaletrain.data.loading.loader import Stream, open_stream
from scaletrain.data.reading.replacement import ReplacementLog, count_of
from scaletrain.engines.base import Engine
from scaletrain.nn.bank import Bank
from scaletrain.optim import schedule
from scaletrain.runtime.signals import Interrupt, Stopped
from scaletrain.runtime.versions import commit
from scaletrain.train import continuation, run_folder
from scaletrain.train.build import build, total_steps
from scaletrain.train.initial_weights import start_from
from scaletrain.train.monitor import Monitor
from scaletrain.train.resume import BEGINNING, Start, check_end, other_data, start_of


@dataclass(frozen=True)
class Session:
    """The parts of a run that its loop works with."""

    config: Config
    run: Path
    engine: Engine
    # Batches to train on.
    stream: Stream
    # Batches of the passes over all samples that a method makes between epochs.
    passes: Stream
    start: Start
    # Steps of the whole run.
    total: int
    writer: checkpoint.Writer
    monitor: Monitor
    replacements: ReplacementLog
    # What every checkpoint records besides its place in the run.
    meta: Mapping[str, Any]

    @property
    def steps_left(self) -> int:
        return self.total - self.start.step

    def updates(self, step: int) -> int:
        """Optimizer steps made once the step at this place in the schedule is done."""
        return self.start.offset + step + 1

    def batches(self) -> Iterator[Batch]:
        """The batches from the start to the end of the run; replaced samples are logged."""
        offset = self.start.offset
        return self.stream.batches(
            self.start.step,
            self.total,
            lambda step, samples: self.replacements.add(step + offset, samples),
        )

    def clock(self, step: int) -> Clock:
        per_epoch = self.stream.steps_per_epoch
        return Clock(step, self.total, step // per_epoch, per_epoch)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        per_epoch = self.stream.steps_per_epoch
        return schedule.lr(self.config.optim, self.config.batch, step, per_epoch, self.total)

    def begin_epoch(self, clock: Clock, interrupt: Interrupt) -> None:
        """Let the method prepare an epoch; it may ask for features of all samples."""

        def features(embed: Callable[[Batch], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
            first = clock.epoch * self.passes.steps_per_epoch
            batches = self.passes.batches(first, first + self.passes.steps_per_epoch)
            for item in self.engine.features(batches, embed):
                # Such a pass may take longer than a scheduler waits after its signal.
                if number := interrupt.agreed():
                    raise Stopped(number, clock.step + self.start.offset, saved=False)
                yield item

        self.engine.method.on_epoch(clock, features, self.engine.write)

    def count_replaced(self, clock: Clock, save: bool) -> dict[str, float]:
        """Scalars of the replaced samples; all ranks agree on them before they are recorded."""
        log = self.replacements
        if log.on and (save or clock.every(self.config.monitor.every)):
            log.agree(self.start.after(clock.step, self.config.batch))
        return log.scalars()

    def save(self, step: int) -> None:
        """Begin to save a checkpoint after the step at this place in the schedule."""
        place = self.start.meta(step, self.total, self.stream.steps_per_epoch, self.config.batch)
        meta = {**place, **self.replacements.meta(), **self.meta}
        self.writer.save(self.updates(step), self.engine.state(), meta)

    def summarise(self, step: int) -> None:
        """Say how many samples were replaced by the end of the step at this place."""
        if self.replacements.on:
            drawn = self.start.after(step, self.config.batch)
            self.monitor.note(self.replacements.summary(drawn))


def open_session(
    config: Config,
    run: Path,
    device: torch.device,
    *,
    init: Path | None,
    continues: Path | None,
    change: bool,
) -> Session:
    """Open the data, build the engine, and restore it from the newest good checkpoint, if any.

    init, continues and change: as in `train`. Every rank calls it.
    """
    stream = _open(config.data, config, device)
    sources = stream.sources()
    data = {"sources": sources, "support": stream.support_sources(), "masks": config.data.masks}
    for source in sources if dist.main() else ():
        run_folder.warn_if_open(Path(selection.one_folder(source["path"]).folder))

    saved = reader.latest(run / "checkpoints")
    total = total_steps(config, stream.steps_per_epoch)
    start, notes = _start(saved, config, stream, data, total, change)
    continued = continuation.find(continues, init, saved)
    engine = build(config, stream.samples, stream.steps_per_epoch, device)
    _check_data(config, stream, engine)
    engine.sample_name = stream.name
    writer = checkpoint.Writer(
        run / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    )
    origin = _restore(engine, config, data, start, saved, init, continued)
    run_folder.on_main(lambda: _accept(run, config, start, notes))

    monitor = Monitor(
        run, config, total_steps=total, steps_per_epoch=stream.steps_per_epoch, start=start
    )
    finished = f"nothing left to train: all {total} steps are done"
    for line in (*notes, f"{origin}; {stream.mixing()}" if start.step < total else finished):
        monitor.note(line)

    return Session(
        config=config,
        run=run,
        engine=engine,
        stream=stream,
        passes=_open(whole_images(config.data), config, device)
        if engine.method.whole_images
        else stream,
        start=start,
        total=total,
        writer=writer,
        monitor=monitor,
        replacements=ReplacementLog(
            run,
            config.data,
            epoch=stream.steps_per_epoch * config.batch,
            start=start.updates,
            before=count_of(saved.meta if saved else {}),
            missing=stream.missing,
        ),
        meta={
            "config": config.model_dump(mode="json"),
            "data": data,
            "world": dist.world(),
            "versions": _versions(),
            **({} if continued is None else {"continues": continued.meta}),
        },
    )


def whole_images(data: DataConfig) -> DataConfig:
    """The same samples, each as one view of its whole image."""
    first = next(view for view in data.views if view.count)
    plain = dict.fromkeys(("crop", "flip", "jitter", "grayscale", "blur", "solarize"), 0.0)
    whole = first.model_copy(update={"count": 1, **plain})
    off = {"support": None, "masks": False, "good_crops": 0.0, "mask_study": ""}

    return data.model_copy(update={"views": (whole,), **off})


def _open(data: DataConfig, config: Config, device: torch.device) -> Stream:
    return open_stream(
        data,
        seed=config.seed,
        batch=config.batch,
        rank=dist.rank(),
        world=dist.world(),
        device=device,
    )


def _check_data(config: Config, stream: Stream, engine: Engine) -> None:
    """Raise ConfigError for data that the method cannot be trained on."""
    banks = any(isinstance(module, Bank) for module in engine.method.modules())
    if banks and not stream.plan.whole:
        raise ConfigError(
            f"{config.method.name} keeps every sample's embedding from epoch to epoch, so each of "
            "its epochs must be one whole data set: use data.path, without data.mixture and "
            "data.epoch_samples"
        )

    run_folder.on_main(lambda: _check_labels(stream, engine.method.classes))


def _check_labels(stream: Stream, classes: int | None) -> None:
    """Refuse labels that would fail only once they are drawn. classes: as Method.classes."""
    labels = None if classes is None else stream.labels()
    if labels is None:
        return
    if lacking := stream.unlabelled():
        raise ConfigError(
            f"{lacking}; this method needs every label: write them as whole numbers, or choose "
            "another data.path"
        )

    if classes and labels.max() >= classes:
        there, largest = len(np.unique(labels)), int(labels.max())
        fix = (
            f"set it to {there}"
            if largest < there
            else "write the shards again: importers number classes without gaps"
        )

        raise ConfigError(
            f"method.classes={classes}, but the labels are of {there} classes with numbers up to "
            f"{largest}: {fix}"
        )


def _restore(
    engine: Engine,
    config: Config,
    data: Mapping[str, Any],
    start: Start,
    saved: reader.SavedStep | None,
    init: Path | None,
    continued: continuation.Source | None,
) -> str:
    """Give the engine its first state; returns where that came from."""
    if saved is not None:
        engine.restore(saved)
        return f"resumed from step {start.updates}"
    if continued is not None:
        return continuation.restore(engine, config, data, continued)
    if init is None:
        return f"started from seed {config.seed}"

    notes = start_from(engine, init)
    return f"started from {init}" + (f" ({notes})" if notes else "")


def _start(
    saved: reader.SavedStep | None,
    config: Config,
    stream: Stream,
    data: Mapping[str, Any],
    total: int,
    change: bool,
) -> tuple[Start, list[str]]:
    """Where to start, and notes on what --change has accepted. Raises ConfigError for other data
    without --change.
    """
    if saved is None:
        return BEGINNING, []

    found = other_data(saved.meta.get("data"), data)
    if found and not change:
        listed = "".join(f"\n  {line}" for line in found)
        raise ConfigError(
            f"the data is not what {saved.path} was trained on:{listed}\n"
            "Restore it, use another --run, or --change to resume with this data"
        )

    notes = [f"--change: {line}" for line in found]
    if "data" not in saved.meta:
        notes.append(
            f"{saved.path} was written by an earlier version, which did not record its data: not "
            "checked"
        )

    epoch = config.data.epoch_samples or stream.samples
    other_epochs = (
        bool(found)
        or saved.meta["config"]["data"].get("epoch_samples", 0) != config.data.epoch_samples
    )
    start, converted = start_of(saved.step, saved.meta, config, epoch, other_epochs)

    check_end(start, total)
    return start, [*notes, *([converted] if converted else [])]


def _accept(run: Path, config: Config, start: Start, notes: Sequence[str]) -> None:
    """Write the configuration, now that it is known to fit, and log what it changes in a run that
    has begun.
    """
    changes = [f"{key}: {old} -> {new}" for key, old, new in run_folder.differences(run, config)]

    if start.updates and (changes or notes):
        run_folder.log_change(run, start.updates, [*changes, *notes])

    run_folder.write_config(run, config)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git": commit() if dist.main() else "",
    }
