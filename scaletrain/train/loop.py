"""The training loop and its entry point, `train`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from scaletrain import dist
from scaletrain.checkpoint import reader
from scaletrain.config.schema import Config
from scaletrain.optim import schedule
from scaletrain.runtime.signals import Interrupt, Stopped, announce
from scaletrain.runtime.timing import WAIT, span
from scaletrain.train import run_folder
from scaletrain.train.monitor import profile
from scaletrain.train.session import Session, open_session
from scaletrain.train.throughput_check import measuring

T = TypeVar("T")


def train(
    config: Config,
    run: Path,
    *,
    init: Path | None = None,
    continues: Path | None = None,
    trace: bool = False,
    change: bool = False,
    umask: str | None = None,
) -> None:
    """Train in the run folder, from its newest good checkpoint or from the start. Every rank calls
    it.

    init: a run, step or safetensors file whose backbone a new run starts from. continues: a run or
    step whose whole state a new run starts from, see continuation.py. trace: write a profile of
    some steps. change: accept a configuration or data that differ from those the run was started
    with. umask: as in run_folder.restrict.
    """
    with Interrupt() as interrupt, contextlib.ExitStack() as until:
        run_folder.restrict(run, umask, until)
        device = dist.init()
        if device.type == "cpu":
            dist.keep_freed_memory()

        torch.set_num_threads(config.threads or _threads())
        run_folder.on_main(lambda: run_folder.claim(run, config, change, until))
        try:
            session = open_session(
                config, run, device, init=init, continues=continues, change=change
            )
            _loop(session, device, interrupt, trace)
        except Stopped as stop:
            announce(stop)
            raise

        # Not after an error: other ranks would report the lost connection before this one reports
        # its cause.
        dist.shutdown()


def _loop(session: Session, device: torch.device, interrupt: Interrupt, trace: bool) -> None:
    config, run, total = session.config, session.run, session.total
    engine, writer, monitor = session.engine, session.writer, session.monitor
    per_epoch = session.stream.steps_per_epoch
    save_every = config.checkpoint.every_steps or per_epoch
    base_rate = schedule.base_lr(config.optim, config.batch)
    first = step = session.start.step
    stop = 0

    with contextlib.ExitStack() as stack:
        # the last thing to be done, when the save in flight has succeeded or failed
        stack.push(monitor.ended)
        timer = stack.enter_context(measuring(config, run, session.steps_left, device))
        # Also after an error: a save in flight is worth waiting for.
        for part in (writer, session.stream, session.passes, monitor):
            stack.callback(part.close)

        tracer = stack.enter_context(profile(run, trace))
        for step, (batch, waited) in enumerate(_timed(session.batches()), first):
            clock = session.clock(step)
            if step % per_epoch == 0:
                session.begin_epoch(clock, interrupt)

            result = engine.step(batch, clock, session.rate(step), base_rate)
            last = step + 1 == total
            stop = 0 if last else interrupt.agreed()
            save = last or bool(stop) or (step + 1) % save_every == 0

            replaced = session.count_replaced(clock, save)
            more = replaced | session.probed(result, batch)
            monitor.step(clock, result, engine.rates(), batch, waited, more)
            tracer.step()
            if save:
                session.save(step, finished=last and not session.unfinished)

            writer.check()
            timer.step()
            if stop:
                break

        if session.steps_left:
            session.summarise(step)
        if stop:
            raise Stopped(stop, session.updates(step), saved=True)

        session.finish(interrupt)
        writer.close()
        monitor.finish(run, reader.folder_of(run / "checkpoints", session.start.offset + total))


def _threads() -> int:
    """CPU threads of this rank: OMP_NUM_THREADS, else an equal share of the cores that this process
    may use.
    """
    # A list is for nested parallel regions.
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if given.isdecimal() and 0 < int(given) <= 4096:
        return int(given)

    if given and dist.main():
        print(
            f"warning: OMP_NUM_THREADS={given} is not a number of threads and is ignored",
            file=sys.stderr,
        )

    return max(1, len(os.sched_getaffinity(0)) // dist.local_world())


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
