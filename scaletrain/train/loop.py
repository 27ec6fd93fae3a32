"""The loop. Everything else is a leaf of it."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from scaletrain import dist
from scaletrain.checkpoint import reader
from scaletrain.checkpoint import writer as checkpoint
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config, Data
from scaletrain.core import Batch, Clock
from scaletrain.data.format import selection
from scaletrain.data.loading.loader import Stream, open_stream
from scaletrain.data.reading.replacement import ReplacementLog, count_of
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.nn.bank import Bank
from scaletrain.optim import schedule
from scaletrain.runtime.signals import Interrupt, Stopped, announce
from scaletrain.runtime.timing import WAIT, span
from scaletrain.runtime.versions import commit
from scaletrain.train import run_folder
from scaletrain.train.build import build, total_steps
from scaletrain.train.initial_weights import start_from
from scaletrain.train.monitor import Monitor, profile
from scaletrain.train.resume import BEGINNING, Start, check_end, other_data, start_of
from scaletrain.train.throughput_check import measuring

T = TypeVar("T")


def train(
    config: Config,
    run: Path,
    *,
    init: Path | None = None,
    trace: bool = False,
    change: bool = False,
    umask: str | None = None,
) -> None:
    """Train in the run folder from its newest good checkpoint, or from the start. Every rank calls
    it.

    init: an exported or foreign safetensors file whose backbone starts a new run. trace: write a
    profile of some steps. change: accept a configuration or data that differ from those the run
    folder was started with. umask: as run_folder.restrict.
    """
    with Interrupt() as interrupt, contextlib.ExitStack() as until:
        run_folder.restrict(run, umask, until)
        device = dist.init()
        if device.type == "cpu":
            dist.keep_freed_memory()

        torch.set_num_threads(config.threads or _threads())
        run_folder.on_main(lambda: run_folder.claim(run, config, change, until))
        try:
            _loop(config, run, device, init, trace, interrupt, change)
        except Stopped as stop:
            announce(stop)
            raise

        # not after an error: other ranks would report the lost connection before this one reports
        # its cause
        dist.shutdown()


def _loop(
    config: Config,
    run: Path,
    device: torch.device,
    init: Path | None,
    trace: bool,
    interrupt: Interrupt,
    change: bool,
) -> None:
    def opened(data: Data) -> Stream:
        return open_stream(
            data,
            seed=config.seed,
            batch=config.batch,
            rank=dist.rank(),
            world=dist.world(),
            device=device,
        )

    stream = opened(config.data)
    sources = stream.sources()
    data = {"sources": sources, "support": stream.support_sources(), "masks": config.data.masks}
    for source in sources if dist.main() else ():
        run_folder.warn_if_open(Path(selection.one_folder(source["path"]).folder))

    saved = reader.latest(run / "checkpoints")
    total = total_steps(config, stream.steps_per_epoch)
    start, notes = _start(saved, config, stream, data, total, change)
    engine = build(config, stream.samples, stream.steps_per_epoch, device)
    if not stream.plan.whole and any(
        isinstance(module, Bank) for module in engine.method.modules()
    ):
        raise ConfigError(
            f"{config.method.name} carries every sample's embedding from epoch to epoch, so its "
            "epochs must be those of one "
            "whole data set: use data.path, without data.mixture and data.epoch_samples"
        )

    run_folder.on_main(lambda: _check_labels(stream, engine.method.classes))
    engine.sample_name = stream.name
    writer = checkpoint.Writer(
        run / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    )

    if saved is not None:
        engine.restore(saved)

    origin = f"resumed from step {start.updates}" if saved else f"started from seed {config.seed}"
    if saved is None and init is not None:
        taken = start_from(engine, init)
        origin = f"started from {init}" + (f" ({taken})" if taken else "")

    run_folder.on_main(lambda: _accept(run, config, start, notes))
    meta = {
        "config": config.model_dump(mode="json"),
        "data": data,
        "world": dist.world(),
        "versions": _versions(),
    }
    monitor = Monitor(
        run, config, total_steps=total, steps_per_epoch=stream.steps_per_epoch, start=start
    )

    for line in notes:
        monitor.note(line)

    left = total - start.step
    monitor.note(
        f"{origin}; {stream.mixing()}"
        if left
        else f"nothing left to train: all {total} steps are done"
    )

    bad = ReplacementLog(
        run,
        config.data,
        epoch=stream.steps_per_epoch * config.batch,
        start=start.updates,
        before=count_of(saved.meta if saved else {}),
        missing=stream.missing,
    )
    base = schedule.base_lr(config.optim, config.batch)

    every = config.checkpoint.every_steps or stream.steps_per_epoch

    passes = opened(_whole(config.data)) if engine.method.whole_images else stream

    def features(clock: Clock, embed: Callable[[Batch], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        first = clock.epoch * passes.steps_per_epoch
        for found in engine.features(passes.batches(first, first + passes.steps_per_epoch), embed):
            # such a pass may take longer than a scheduler waits
            if number := interrupt.agreed():
                raise Stopped(number, clock.step + start.offset, saved=False)
            yield found

    def replaced(step: int, samples: Sequence[Replaced]) -> None:
        bad.add(step + start.offset, samples)

    with contextlib.ExitStack() as stack:
        timer = stack.enter_context(measuring(config, run, left, device))
        # also after an error: a save in flight is worth waiting for
        stack.callback(writer.close)
        stack.callback(stream.close)
        stack.callback(passes.close)
        stack.callback(monitor.close)

        with profile(run, trace) as tracer:
            for step, (batch, waited) in enumerate(
                _timed(stream.batches(start.step, total, replaced)), start.step
            ):
                clock = Clock(step, total, step // stream.steps_per_epoch, stream.steps_per_epoch)
                if step % stream.steps_per_epoch == 0:
                    engine.method.on_epoch(clock, partial(features, clock), engine.write)

                lr = schedule.lr(config.optim, config.batch, step, stream.steps_per_epoch, total)
                result = engine.step(batch, clock, lr, base)
                ema = engine.method.ema(clock) if engine.method.targets else None
                done, drawn = start.offset + step + 1, start.after(step, config.batch)
                last = step + 1 == total
                stop = 0 if last else interrupt.agreed()
                save = (step + 1) % every == 0 or last or bool(stop)

                if bad.on and (save or clock.every(config.monitor.every)):
                    bad.agree(drawn)

                monitor.step(clock, result, engine.rates(), batch, waited, ema, bad.scalars())
                tracer.step()
                if save:
                    place = start.meta(step, total, stream.steps_per_epoch, config.batch)
                    writer.save(done, engine.state(), {**place, **bad.meta(), **meta})

                writer.check()
                if bad.on and (last or stop):
                    monitor.note(bad.summary(drawn))

                timer.step()
                if stop:
                    raise Stopped(stop, done, saved=True)

        writer.close()
        monitor.finish(run, reader.folder_of(run / "checkpoints", start.offset + total))


def _start(
    saved: reader.Saved | None,
    config: Config,
    stream: Stream,
    data: Mapping[str, Any],
    total: int,
    change: bool,
) -> tuple[Start, list[str]]:
    """Where to start, and what --change has accepted for it. Raises ConfigError for other data
    without --change.
    """
    if saved is None:
        return BEGINNING, []

    found = other_data(saved.meta.get("data"), data)
    if found and not change:
        shown = "".join(f"\n  {line}" for line in found)
        raise ConfigError(
            f"the data is not what {saved.path} was trained on:{shown}\n"
            "Restore it, use another --run, or --change to resume with this data"
        )

    notes = [f"--change: {line}" for line in found]
    if "data" not in saved.meta:
        notes.append(
            f"{saved.path} is of an earlier version and does not say which data it was trained on: "
            "not checked"
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
    """Write the configuration, only now that it is known to fit, and log what it changes in a run
    that has begun.
    """
    changes = [f"{key}: {old} -> {new}" for key, old, new in run_folder.differences(run, config)]

    if start.updates and (changes or notes):
        run_folder.log_change(run, start.updates, [*changes, *notes])

    run_folder.write_config(run, config)


def _check_labels(stream: Stream, classes: int | None) -> None:
    """Refuse data whose labels a method would stumble over hours later. `classes`: as
    Method.classes.
    """
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


def _threads() -> int:
    """CPU threads of this rank: what its launcher says, else an equal share of the cores that this
    process may use.
    """
    # a list is for nested parallel regions
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if given.isdecimal() and 0 < int(given) <= 4096:
        return int(given)

    if given and dist.main():
        print(
            f"warning: OMP_NUM_THREADS={given} is no number of threads and is passed over",
            file=sys.stderr,
        )

    return max(1, len(os.sched_getaffinity(0)) // dist.local_world())


def _whole(data: Data) -> Data:
    """The same samples, each as one view of its whole image."""
    first = next(view for view in data.views if view.count)
    plain = dict.fromkeys(("crop", "flip", "jitter", "grayscale", "blur", "solarize"), 0.0)
    whole = first.model_copy(update={"count": 1, **plain})
    off = {"support": None, "masks": False, "good_crops": 0.0, "mask_study": ""}

    return data.model_copy(update={"views": (whole,), **off})


def _timed(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Each item with the seconds spent waiting for it."""
    iterator = iter(items)
    while True:
        before = time.perf_counter()
        try:
            with span(WAIT):
                item = next(iterator)
        except StopIteration:
            return

        yield item, time.perf_counter() - before


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git": commit() if dist.main() else "",
    }
