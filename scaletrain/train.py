"""The loop. Everything else is a leaf of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TextIO, TypeVar

import torch
from torch import Tensor

from scaletrain import auxiliaries, checkpoint, dist
from scaletrain import config as configuration
from scaletrain.config import Config, ConfigError, Data
from scaletrain.core import Batch, Clock, Facts, Method
from scaletrain.data import support
from scaletrain.data.bad import Account, count_of
from scaletrain.data.loader import Stream
from scaletrain.engines.base import Engine, TrainingError
from scaletrain.interrupt import Interrupt, Stopped, announce
from scaletrain.marks import WAIT, mark
from scaletrain.monitor import Monitor, profile
from scaletrain.nn import backbone
from scaletrain.nn.bank import Bank
from scaletrain.optim import schedule
from scaletrain.rehearsal import rehearse
from scaletrain.versions import commit

T = TypeVar("T")


class BusyError(ConfigError):
    """Another process trains in the run folder."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


def train(config: Config, run: Path, *, init: Path | None = None, trace: bool = False, change: bool = False) -> None:
    """Train in the run folder from its newest good checkpoint, or from the start. Every rank calls it.

    init: an exported or foreign safetensors file whose backbone starts a new run. trace: write a profile of some steps.
    change: accept a configuration that differs from the one the run folder was started with.
    """
    with Interrupt() as interrupt, contextlib.ExitStack() as held:
        device = dist.init()
        if device.type == "cpu":
            dist.keep_freed_memory()
        torch.set_num_threads(config.threads or _threads())
        _on_main(lambda: _claim(run, config, change, held))
        try:
            _loop(config, run, device, init, trace, interrupt)
        except Stopped as stop:
            announce(stop)
            raise
        dist.shutdown()  # not after an error: other ranks would report the lost connection before this one reports its cause


def _loop(config: Config, run: Path, device: torch.device, init: Path | None, trace: bool, interrupt: Interrupt) -> None:
    def opened(data: Data) -> Stream:
        return support.stream(data, seed=config.seed, batch=config.batch, rank=dist.rank(), world=dist.world(), device=device)

    stream = opened(config.data)
    total = total_steps(config, stream.steps_per_epoch)
    engine = build(config, stream.samples, stream.steps_per_epoch, device)
    if not stream.plan.whole and any(isinstance(module, Bank) for module in engine.method.modules()):
        raise ConfigError(
            f"{config.method.name} carries every sample's embedding from epoch to epoch, so its epochs must be those of one "
            "whole data set: use data.path, without data.mixture and data.epoch_samples"
        )
    _on_main(lambda: _check_labels(stream, engine.method.classes))
    engine.sample_name = stream.name
    writer = checkpoint.Writer(
        run / "checkpoints", keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every
    )
    start, told = _resume(engine, run, init)
    _on_main(lambda: _write_config(run, config))  # only now: one that does not fit must not replace the one that does
    meta = {"config": config.model_dump(mode="json"), "world": dist.world(), "versions": _versions()}
    monitor = Monitor(run, config, total_steps=total, steps_per_epoch=stream.steps_per_epoch, start_step=start)
    origin = f"resumed from step {start}" if start else f"started from {init}" if init else f"started from seed {config.seed}"
    monitor.note(f"{origin}; {stream.mixing()}" if start < total else f"nothing left to train: {start} of {total} steps")
    bad = Account(
        run,
        config.data,
        epoch=stream.steps_per_epoch * config.batch,
        batch=config.batch,
        start=start,
        before=count_of(told),
        missing=stream.missing,
    )
    base = schedule.base_lr(config.optim, config.batch)
    every = config.checkpoint.every_steps or stream.steps_per_epoch

    passes = opened(_whole(config.data)) if engine.method.whole_images else stream

    def features(clock: Clock, embed: Callable[[Batch], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        first = clock.epoch * passes.steps_per_epoch
        for found in engine.features(passes.batches(first, first + passes.steps_per_epoch), embed):
            if number := interrupt.agreed():  # such a pass may take longer than a scheduler waits
                raise Stopped(number, clock.step, saved=False)
            yield found

    with contextlib.ExitStack() as stack:
        timer = stack.enter_context(rehearse(config, run, total - start, device))
        stack.callback(writer.close)  # also after an error: a save in flight is worth waiting for
        stack.callback(stream.close)
        stack.callback(passes.close)
        stack.callback(monitor.close)
        with profile(run, trace) as tracer:
            for step, (batch, waited) in enumerate(_timed(stream.batches(start, total, bad.add)), start):
                clock = Clock(step, total, step // stream.steps_per_epoch, stream.steps_per_epoch)
                if step % stream.steps_per_epoch == 0:
                    engine.method.on_epoch(clock, partial(features, clock), engine.write)
                lr = schedule.lr(config.optim, config.batch, step, stream.steps_per_epoch, total)
                result = engine.step(batch, clock, lr, base)
                ema = engine.method.ema(clock) if engine.method.targets else None
                last = step + 1 == total
                stop = 0 if last else interrupt.agreed()
                save = (step + 1) % every == 0 or last or bool(stop)
                if bad.on and (save or clock.every(config.monitor.every)):
                    bad.agree(step + 1)
                monitor.step(clock, result, engine.rates(), batch, waited, ema, bad.scalars())
                tracer.step()
                if save:
                    writer.save(step + 1, engine.state(), {"clock": {"step": step + 1, "total": total}, **bad.meta(), **meta})
                if bad.on and (last or stop):
                    monitor.note(bad.summary(step + 1))
                timer.step()
                if stop:
                    raise Stopped(stop, step + 1, saved=True)


def _check_labels(stream: Stream, classes: int | None) -> None:
    """Refuse data whose labels a method would stumble over hours later. `classes`: as Method.classes."""
    labels = None if classes is None else stream.labels()
    if labels is None:
        return
    if lacking := stream.unlabelled():
        raise ConfigError(f"{lacking}; this method needs every label: write them as whole numbers, or choose another data.path")
    if classes and labels.max() >= classes:
        raise ConfigError(f"method.classes={classes}, but there are labels up to {labels.max()}: set it to {labels.max() + 1}")


def facts_of(config: Config, samples: int, steps_per_epoch: int) -> Facts:
    """What the method is told of a run."""
    sizes: dict[int, int] = {}
    for view in config.data.views:
        sizes[view.size] = sizes.get(view.size, 0) + view.count
    views = tuple((size, count) for size, count in sorted(sizes.items(), reverse=True) if count)
    beside = config.data.support
    rows = 0 if beside is None else beside.classes * beside.per_class
    return Facts(samples, config.batch, steps_per_epoch, views, config.model.norm_group, config.seed, rows)


def build_method(config: Config, facts: Facts) -> Method:
    """The method of a configuration with its auxiliaries, drawn from its seed alone."""
    torch.manual_seed(config.seed)
    leaf = importlib.import_module(f"scaletrain.methods.{config.method.name}")
    return auxiliaries.attach(leaf.Model(config.method, lambda: backbone.build(config.model), facts), config.auxiliaries, facts)


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run. Raises ConfigError for what does not fit them."""
    total = config.steps or round(config.epochs * steps_per_epoch)
    if total < 1:
        raise ConfigError(f"epochs={config.epochs:g} is less than one step of the {steps_per_epoch} per epoch")
    schedule.lr(config.optim, config.batch, 0, steps_per_epoch, total)  # raises when the warm-up is longer
    return total


def build(config: Config, samples: int, steps_per_epoch: int, device: torch.device) -> Engine:
    """The method of a configuration inside its engine."""
    method = build_method(config, facts_of(config, samples, steps_per_epoch))
    engine = importlib.import_module(f"scaletrain.engines.{config.engine.name}")
    return engine.Engine(method, config.engine, config.optim, device)  # type: ignore[no-any-return]


def _on_main(work: Callable[[], None]) -> None:
    """Run on rank 0; every rank raises what it raised. A run folder that cannot be written is a ConfigError."""
    problem = None
    if dist.main():
        try:
            work()
        except ConfigError as error:
            problem = error
        except OSError as error:
            problem = ConfigError(f"cannot write the run folder: {error}; choose another with --run")
    if problem := dist.broadcast_object(problem):
        raise problem


def _claim(run: Path, config: Config, change: bool, held: contextlib.ExitStack) -> None:
    """Make the run folder and hold it; refuse that of a run with another configuration, or one that another process holds."""
    path = run / "config.yaml"
    run.mkdir(parents=True, exist_ok=True)
    _hold(held.enter_context((run / ".lock").open("a+")), run)
    # without a checkpoint there is nothing to protect: a start that was refused leaves only its configuration
    if not path.exists() or change or not any((run / "checkpoints").glob("step-*")):
        return
    if differences := configuration.diff(configuration.load(path), config):
        shown = "\n".join(f"  {key}: {old} -> {new}" for key, old, new in differences)
        raise ConfigError(
            f"{run} holds a run of another configuration:\n{shown}\nUse another --run, or --change to go on with this one"
        )


def _hold(lock: TextIO, run: Path) -> None:
    """Lock the run folder until the file is closed, at the latest by the end of this process."""
    # a predecessor that is being killed may take a moment, one on a lost node until the file system gives up its lock
    for patience in range(240 if "SLURM_RESTART_COUNT" in os.environ else 20, -1, -1):
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a file system without locks cannot protect
            if not patience:
                lock.seek(0)
                raise BusyError(f"{run} is being trained by {lock.read().strip() or 'another process'}") from None
            time.sleep(0.25)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}, job {os.environ.get('SLURM_JOB_ID', 'none')}\n")
    lock.flush()


def _threads() -> int:
    """CPU threads of this rank: what its launcher says, else an equal share of the cores that this process may use."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // dist.local_world()))


def _whole(data: Data) -> Data:
    """The same samples, each as one view of its whole image."""
    first = next(view for view in data.views if view.count)
    plain = dict.fromkeys(("crop", "flip", "jitter", "grayscale", "blur", "solarize"), 0.0)
    whole = first.model_copy(update={"count": 1, **plain})
    off = {"support": None, "masks": False, "good_crops": 0.0, "mask_study": ""}
    return data.model_copy(update={"views": (whole,), **off})


def _write_config(run: Path, config: Config) -> None:
    draft = run / "config.tmp"
    draft.write_text(configuration.dump(config))
    draft.replace(run / "config.yaml")


def _resume(engine: Engine, run: Path, init: Path | None) -> tuple[int, Mapping[str, object]]:
    """The step to go on from, and what its checkpoint tells besides."""
    saved = checkpoint.latest(run / "checkpoints")
    if saved is not None:
        engine.restore(saved)
        return saved.step, saved.meta
    if init is not None:
        start_from(engine, init)
    return 0, {}


def start_from(engine: Engine, path: Path) -> None:
    """Load the backbone of a safetensors file (exported here, or torchvision's and timm's names); targets start from it too."""
    tensors, _ = checkpoint.load_file(path)
    tensors = {k.removeprefix("backbone."): v for k, v in tensors.items() if not k.startswith("fc.")}
    prefix = "method.backbone."
    mine = {name.removeprefix(prefix): at.shape for name, at in engine.placed().items() if name.startswith(prefix)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [k for k in mine if shapes.get(k) != mine[k]]
    if wrong or set(tensors) - set(mine):
        name = (wrong or sorted(set(tensors) - set(mine)))[0]
        there, here = (t.get(name, "absent") for t in (shapes, mine))
        raise TrainingError(f"{path} does not fit this model: {name} is {there} in the file and {here} in the model")
    for module in ("backbone", *(target for target, online in engine.method.targets.items() if online == "backbone")):
        for name, tensor in tensors.items():
            engine.write(f"{module}.{name}", tensor)


def _timed(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Each item with the seconds spent waiting for it."""
    iterator = iter(items)
    while True:
        before = time.perf_counter()
        try:
            with mark(WAIT):
                item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - before


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "git": commit() if dist.main() else ""}
