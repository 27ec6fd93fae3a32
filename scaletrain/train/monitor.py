"""Monitoring of a run: TensorBoard, metrics.jsonl, status.json, console progress, speed and
collapse indicators.

Every rank makes a Monitor and calls it; only rank 0 writes. `train/loss` is that of the global
batch; all other values computed from samples (parts of the loss, embedding statistics, images) are
of rank 0's slice, so that monitoring needs no collective.
"""

from __future__ import annotations

import math
import resource
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from scaletrain import dist
from scaletrain.config import load
from scaletrain.config import schema as cfg
from scaletrain.core import Batch, Clock, StepResult
from scaletrain.runtime import durable
from scaletrain.runtime.signals import Stopped
from scaletrain.runtime.tables import plural
from scaletrain.train import records
from scaletrain.train.progress import Pace, Screen, duration
from scaletrain.train.resume import BEGINNING, Start
from scaletrain.train.status import State, StatusFile
from scaletrain.train.tensorboard_writer import Board

GRID_SAMPLES = 8
# Rows of the embedding whose singular values are computed, which bounds the cost.
RANK_SAMPLES = 1024


class Monitor:
    """Records a run under `run`: `tensorboard/`, `metrics.jsonl` (one JSON object per recorded
    step, and one per start), `status.json` and the console.

    Which steps are recorded depends on the step only, so that a resumed run continues the same
    curves. Records at or after the step it resumes from are dropped, since they will be computed
    again. A file that cannot be written causes a warning and never ends the run.
    """

    def __init__(
        self,
        run: Path,
        config: cfg.Config,
        *,
        total_steps: int,
        steps_per_epoch: int,
        start: Start = BEGINNING,
        described: records.StartRecord | None = None,
    ) -> None:
        """described: the record of this start, if it shall be recorded."""
        self._active = self._main = dist.main()
        self._every, self._images_every = config.monitor.every, config.monitor.images_every
        self._total, self._start, self._batch = total_steps, start, config.batch
        self._updates = start.updates
        if not self._active:
            return

        run.mkdir(parents=True, exist_ok=True)
        durable.drop_records(run / records.FILE, start.updates)
        self._metrics = durable.Records(run / records.FILE)
        if described is not None:
            self._metrics.add({durable.START: described.model_dump(mode="json")})

        self._status = StatusFile(run, start.offset + total_steps)
        self._status.write("running", start.updates)
        self._board = Board(run / "tensorboard", start.updates)
        self._board.text("config", f"```yaml\n{load.dump(config)}```", start.updates)
        self._board.flush()

        self._pace = Pace(config.batch)
        self._screen = Screen(
            total_steps, math.ceil(total_steps / max(1, steps_per_epoch)), start.step
        )

    def step(
        self,
        clock: Clock,
        result: StepResult,
        rates: Mapping[str, float],
        batch: Batch,
        waited: float,
        more: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        """Record the step that began at `clock`.

        rates: learning rate by group. waited: seconds spent waiting for data. more: further
        scalars, also on the device.
        """
        if not self._active:
            return

        step = self._start.offset + clock.step
        self._updates = step + 1
        self._pace.add(waited, result.skipped)
        self._screen.advance(clock.step + 1)

        if clock.every(self._images_every):
            for views in batch.views:
                self._board.image(
                    f"views/{views.shape[-1]}px", grid(views, batch.pixel_range), step
                )

        if clock.every(self._every) or clock.step == self._total - 1:
            # Tensors are read here only, since that makes the host wait for the device.
            further = {name: float(value) for name, value in (more or {}).items()}
            self._record(clock, self._scalars(result, rates) | further, rates)
            self._status.write("running", self._updates)

    def note(self, text: str) -> None:
        """Print a line on the console and add it to TensorBoard."""
        if self._active:
            self._screen.say(text)
            self._board.text("notes", text, self._updates)

    def finish(self, run: Path, checkpoint: Path) -> None:
        """Print the last line of a finished run: result, checkpoint and next command."""
        if not self._active or self._updates == self._start.updates:
            return

        steps, seconds = self._updates - self._start.updates, self._pace.seconds
        images = steps * self._batch
        rate = images / max(seconds, 1e-9)
        self.note(
            f"done: {plural(steps, 'step')}, {plural(images, 'image')} in {duration(seconds)} "
            f"({rate:.0f} images/s); "
            f"checkpoint {checkpoint}; next: scaletrain eval {shlex.quote(str(run))} knn"
        )

    def ended(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write how the run ended: an exit callback of contextlib.ExitStack, for the moment when
        everything else is done.
        """
        if self._main:
            stopped = isinstance(error, Stopped)
            state: State = "finished" if error is None else "stopped" if stopped else "failed"
            self._status.write(state, self._updates)

    def close(self) -> None:
        """Flush and release everything; may be called twice."""
        if self._active:
            self._active = False
            self._screen.close()
            self._board.close()

    def _scalars(self, result: StepResult, rates: Mapping[str, float]) -> dict[str, float]:
        scalars = {f"train/{name}": float(value) for name, value in result.scalars.items()}
        scalars["train/loss"] = result.loss
        scalars |= {f"lr/{name}": rate for name, rate in rates.items()}
        if result.ema is not None:
            scalars["ema"] = result.ema

        scalars["grad_norm"] = float(result.grad_norm)
        scalars |= {f"trust/{name}": float(value) for name, value in result.trust.items()}
        if result.embedding is not None:
            scalars |= {
                f"embedding/{name}": value for name, value in collapse(result.embedding).items()
            }

        return scalars | self._pace.read() | memory()

    def _record(self, clock: Clock, scalars: dict[str, float], rates: Mapping[str, float]) -> None:
        step = self._start.offset + clock.step
        for name, value in scalars.items():
            self._board.scalar(name, value, step)

        self._board.flush()
        # JSON has no word for NaN and infinity; null keeps the line readable by every parser.
        numbers = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        place: dict[str, float | None] = {
            "step": step,
            "epoch": clock.epoch,
            "steps_per_epoch": clock.steps_per_epoch,
            "epochs": (clock.step + 1) / clock.steps_per_epoch,
            "samples": self._start.after(clock.step, self._batch),
            "time": time.time(),
        }

        self._metrics.add(place | numbers)
        left = self._pace.seconds_per_step * (self._total - clock.step - 1)
        rate = rates.get("all", next(iter(rates.values()), 0.0))
        self._screen.report(clock, scalars, rate, left)


def collapse(embedding: Tensor) -> dict[str, float]:
    """Collapse indicators of an embedding [B, D], rows L2-normalised first.

    std: mean over channels of the standard deviation over the batch (SimSiam, section 4.1); 0 when
    all rows agree. std_ratio: the same divided by 1 / sqrt(D), its value for isotropic directions;
    about 1 is healthy. effective_rank: exp of the entropy of the normalised singular values (Roy
    and Vetterli, 2007), in [1, min(B, D)].
    """
    x = torch.nn.functional.normalize(embedding.detach().float(), dim=1)  # [B, D]

    if not x.isfinite().all():
        return dict.fromkeys(("std", "std_ratio", "effective_rank"), math.nan)

    std = float(x.std(dim=0, correction=0).mean())
    sigma = torch.linalg.svdvals(x[:RANK_SAMPLES].cpu())
    p = sigma / sigma.sum().clamp_min(1e-12)
    return {
        "std": std,
        "std_ratio": std * math.sqrt(x.shape[1]),
        "effective_rank": float(torch.exp(-torch.special.xlogy(p, p).sum())),
    }


def grid(views: Tensor, pixel_range: Tensor) -> Tensor:
    """Normalised views [V, B, 3, H, W] -> one image [3, h, w] uint8: a row per sample, a column per
    view.
    """
    first = (
        views[:, :GRID_SAMPLES].detach().float().transpose(0, 1).flatten(0, 1)
    )  # [b * V, 3, H, W]
    black, white = pixel_range.to(first).view(2, 1, 3, 1, 1)
    pixels = ((first - black) / (white - black)).clamp(0, 1).mul(255).round().byte().cpu()
    # torchvision takes a third of a second to import, and few processes draw
    from torchvision.utils import make_grid

    picture: Tensor = make_grid(pixels, nrow=views.shape[0], padding=2)

    return picture


def memory() -> dict[str, float]:
    """Peak memory of this process and of its accelerator, in MB."""
    peak = {"memory/rss_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available():
        peak["memory/cuda_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        peak["memory/cuda_reserved_mb"] = torch.cuda.max_memory_reserved() / 2**20

    return peak


class StepObserver(Protocol):
    """Whatever is called after each step: a profiler or a timer."""

    def step(self) -> None: ...


class NullObserver:
    """Observes nothing."""

    def step(self) -> None:
        """Do nothing."""


@contextmanager
def profile(run: Path, enabled: bool) -> Iterator[StepObserver]:
    """Trace steps 5 to 10 (from 0) of this session into RUN/profile/rank<r>.json."""
    if not enabled:
        yield NullObserver()
        return

    path = run / "profile" / f"rank{dist.rank()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    schedule = torch.profiler.schedule(wait=4, warmup=1, active=6, repeat=1)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(path))
    ) as recorder:
        yield recorder
