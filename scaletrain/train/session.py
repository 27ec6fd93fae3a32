"""A training session: everything that is opened, built and restored before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from scaletrain.core import Batch, Clock, Method, StepResult
from scaletrain.data.format import selection
from scaletrain.data.loading.loader import Stream, open_stream
from scaletrain.data.reading.replacement import ReplacementLog, count_of
from scaletrain.engines.base import Engine
from scaletrain.nn.bank import has_banks
from scaletrain.optim import schedule
from scaletrain.runtime.signals import Interrupt
from scaletrain.train import continuation, initial_weights, run_folder, starts
from scaletrain.train.build import build, total_steps
from scaletrain.train.monitor import Monitor
from scaletrain.train.passes import Passes
from scaletrain.train.probe import OnlineProbe, open_probe
from scaletrain.train.resume import BEGINNING, Start, check_end, other_data, start_of
from scaletrain.train.weight_sources import images_of


@dataclass(frozen=True)
class Session:
    """The parts of a run that its loop works with."""

    config: Config
    run: Path
    engine: Engine
    # Batches to train on.
    stream: Stream
    # Passes over all samples that a method makes between epochs.
    passes: Passes
    start: Start
    # Steps of the whole run.
    total: int
    writer: checkpoint.Writer
    monitor: Monitor
    # None without monitor.probe
    probe: OnlineProbe | None
    replacements: ReplacementLog
    # What every checkpoint records besides its place in the run.
    meta: Mapping[str, Any]
    # The method's work after the last step is still to be done.
    unfinished: bool
    # The newest checkpoint is of the last step without saying so, as a run was shortened to it.
    unrecorded: bool

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
        with self.passes.features(clock, interrupt, clock.step + self.start.offset) as features:
            self.engine.method.on_epoch(clock, features, self.engine.write)

    def finish(self, interrupt: Interrupt) -> None:
        """Let the method do its work after the last step, if it has any that no checkpoint has yet,
        and save again; or record that a checkpoint that was there is of the last step.
        """
        if self.unfinished:
            clock = self.clock(self.total)
            with self.passes.features(clock, interrupt, clock.step + self.start.offset) as features:
                self.engine.method.on_end(clock, features, self.engine.write)
        elif not self.unrecorded:
            return

        self.save(self.total - 1, finished=True)

    def probed(self, result: StepResult, batch: Batch) -> dict[str, Tensor]:
        """Let the online probe learn from a step; its scalars, on the device."""
        return {} if self.probe is None else self.probe.step(result, batch)

    def count_replaced(self, clock: Clock, save: bool) -> dict[str, float]:
        """Scalars of the replaced samples; all ranks agree on them before they are recorded."""
        log = self.replacements
        if log.on and (save or clock.every(self.config.monitor.every)):
            log.agree(self.start.after(clock.step, self.config.batch))
        return log.scalars()

    def save(self, step: int, *, finished: bool = False) -> None:
        """Begin to save a checkpoint after the step at this place in the schedule.

        finished: nothing of the run is left to do, the method's work after the last step included.
        """
        place = self.start.meta(step, self.total, self.stream.steps_per_epoch, self.config.batch)
        meta = {**place, **self.replacements.meta(), **self.meta, "finished": finished}
        probe = {} if self.probe is None else self.probe.state()
        self.writer.save(self.updates(step), self.engine.state() | probe, meta)

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
    data = {
        "sources": sources,
        "support": stream.support_sources(),
        "maps": stream.maps,
        **stream.list_sources(),
    }
    for source in (*sources, *stream.maps) if dist.main() else ():
        run_folder.warn_if_open(Path(selection.one_folder(source["path"]).folder))

    saved = reader.latest(run / "checkpoints")
    total = total_steps(config, stream.steps_per_epoch)
    start, notes = _start(saved, config, stream, data, total, change)
    continued = continuation.find(continues, init, saved)
    engine = build(config, stream.samples, stream.steps_per_epoch, device)
    _check_data(config, stream, engine)
    if saved is not None and has_banks(engine.method):
        _check_memories(saved, data)
    engine.sample_name = stream.name
    writer = checkpoint.Writer(
        run / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    )
    origin, weights, accepted = _restore(
        engine, config, data, start, saved, init, continued, change
    )
    notes += accepted
    probe = None
    if config.monitor.probe:
        probe = open_probe(stream, engine.method.backbone.features, device)
        state = saved or (continued.saved if continued else None)
        notes += [] if state is None else probe.restore(state)

    run_folder.on_main(lambda: _accept(run, config, start, notes))
    versions = starts.versions()

    monitor = Monitor(
        run,
        config,
        total_steps=total,
        steps_per_epoch=stream.steps_per_epoch,
        start=start,
        described=starts.describe(start.updates, device, config.engine.name, versions),
    )
    last = saved if start.step == total else None
    ended = last is not None and last.meta.get("finished", False)
    unfinished = type(engine.method).on_end is not Method.on_end and not ended
    finished = f"nothing left to train: all {total} steps are done"
    finished += "; the method's work after the last one follows" if unfinished else ""
    for line in (*notes, f"{origin}; {stream.mixing()}" if start.step < total else finished):
        monitor.note(line)

    return Session(
        config=config,
        run=run,
        engine=engine,
        stream=stream,
        passes=_passes(engine, stream, config, device),
        start=start,
        total=total,
        writer=writer,
        monitor=monitor,
        probe=probe,
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
            "samples_in_use": stream.samples,
            initial_weights.META: weights,
            "world": dist.world(),
            "versions": versions,
            **({} if continued is None else {"continues": continued.meta}),
        },
        unfinished=unfinished,
        unrecorded=last is not None
        and (last.meta.get("finished") is False or last.meta["clock"].get("total") != total),
    )


def _passes(engine: Engine, stream: Stream, config: Config, device: torch.device) -> Passes:
    """The passes that the method of an engine may ask for."""
    whole = engine.method.whole_images
    data = whole_images(config.data) if whole else config.data.model_copy(update={"support": None})

    def opened(every: bool) -> Stream:
        return _open(data, config, device, every=every) if every or whole else stream

    return Passes(engine, opened)


def whole_images(data: DataConfig) -> DataConfig:
    """The same samples, each as one view of its whole image."""
    first = next(view for view in data.views if view.count)
    off = dict.fromkeys(("crop", "flip", "jitter", "grayscale", "blur", "solarize"), 0.0)
    return data.plain(views=(first.model_copy(update={"count": 1, **off}),))


def _open(data: DataConfig, config: Config, device: torch.device, *, every: bool = False) -> Stream:
    return open_stream(
        data,
        seed=config.seed,
        batch=config.batch,
        rank=dist.rank(),
        world=dist.world(),
        device=device,
        every=every,
    )


def _check_data(config: Config, stream: Stream, engine: Engine) -> None:
    """Raise ConfigError for data that the method cannot be trained on."""
    if has_banks(engine.method) and not stream.plan.whole:
        raise ConfigError(
            f"{config.method.name} keeps every sample's embedding from epoch to epoch, so each of "
            "its epochs must be one whole data set: use data.path, without data.mixture and "
            "data.epoch_samples"
        )

    run_folder.on_main(lambda: _check_labels(stream, engine.method.classes))


def _check_memories(saved: reader.SavedStep, data: Mapping[str, Any]) -> None:
    """Raise ConfigError where the memories in a checkpoint are of other samples than the data's:
    --change cannot make them fit.
    """
    before, now = (
        {key: part[key] for key in ("sources", "subset") if key in part}
        for part in (saved.meta.get("data") or {}, data)
    )
    if before and (changes := other_data(before, now)):
        listed = "".join(f"\n  {line}" for line in changes)
        raise ConfigError(
            f"{saved.path} keeps an embedding of every sample, and the samples are others now:"
            f"{listed}\nRestore the data, or start a new run from its encoder with --init"
        )


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
    change: bool,
) -> tuple[str, initial_weights.Origins, list[str]]:
    """Give the engine its first state. Returns a line on where that came from, the origins of its
    modules, and notes on what --change has accepted.
    """
    if saved is not None:
        weights, notes = initial_weights.load_constant(engine, saved, change)
        engine.restore(saved)
        return f"resumed from step {start.updates}", weights, [f"--change: {n}" for n in notes]
    if continued is not None:
        origin = continuation.restore(engine, config, data, continued)
        assert continued.saved is not None
        return origin, *initial_weights.load_constant(engine, continued.saved, False)

    sources = initial_weights.sources_of(engine.method, init)
    images = images_of(config.model_dump(mode="json"))
    weights, lines = initial_weights.start_from(engine, sources, images)
    return "; ".join([f"started from seed {config.seed}", *lines]), weights, []


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
