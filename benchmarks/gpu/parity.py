"""Compares what this device computes with float64 on the CPU, which the test suite proves right."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kit import small  # type: ignore[import-not-found]

from benchmarks.gpu.comparison import batch, changed_by_skipped_step, clock, distance, trained
from benchmarks.gpu.report import Settings, attempt, check, say
from scaletrain.checkpoint import reader
from scaletrain.checkpoint.writer import Writer
from scaletrain.config.schema import Config
from scaletrain.data.loading.dataset import RawBatch
from scaletrain.data.loading.to_device import ToDevice
from scaletrain.data.transforms.params import COLUMNS
from scaletrain.train.build import build

STEPS = 2
CPU = torch.device("cpu")
# how far a state may be from float64 on the CPU
FLOAT64, FLOAT32 = 1e-9, 2e-3
# SimCLR at a temperature of 0.1 differs by 0.54 even on the CPU
BFLOAT16 = 0.8
# Adam divides by the root of tiny second moments
FLOAT32_ADAMW = 0.1
CACHED = {"grad_accum_steps": 3, "gradient_cache": True}
GROUPS_OF_2 = {"model": {"norm_group": 2}}


class Case(NamedTuple):
    """A miniature method trained in one way."""

    method: str
    tolerance: float = FLOAT64
    precision: str = "fp64"
    engine: dict[str, Any] = {}  # noqa: RUF012
    changes: dict[str, dict[str, Any]] = {}  # noqa: RUF012

    def __str__(self) -> str:
        options = {**({"engine": self.engine} if self.engine else {}), **self.changes}
        return f"{self.method} {self.precision} {options or ''}".strip()

    def config(self) -> Config:
        return self._config({"precision": self.precision, **self.engine})

    def reference(self) -> Config:
        """In float64 without the options of the engine, which must not change what is computed."""
        return self._config({"precision": "fp64"})

    def _config(self, engine: dict[str, Any]) -> Config:
        config: Config = small.config(self.method, engine={"name": "ddp", **engine}, **self.changes)
        return config


def cases(*, tiny: bool) -> list[Case]:
    """Every method, and a few with each of the options."""
    if tiny:
        return [
            Case("byol"),
            Case("byol", BFLOAT16, "bf16"),
            Case("simclr", engine=CACHED, changes=GROUPS_OF_2),
        ]

    found = [Case(name) for name in (*small.OPTIONS, *small.JOINED)]
    for name in ("byol", "simclr", "relicv2", "moco"):
        found += [
            Case(name, FLOAT32, "fp32"),
            Case(name, BFLOAT16, "bf16"),
            Case(name, changes={"model": {"norm_group": 4}}),
            Case(name, engine={"channels_last": False}),
            Case(name, engine={"activation_checkpointing": True}),
        ]

    return [
        *found,
        Case("byol", engine={"grad_accum_steps": 3}, changes=GROUPS_OF_2),
        Case("simclr", engine=CACHED, changes=GROUPS_OF_2),
        Case("moco", changes={"method": {"shuffle": True}, "model": {"norm_group": 4}}),
        Case("byol", changes={"optim": {"name": "sgd"}}),
        Case("byol", FLOAT32_ADAMW, "fp32", changes={"optim": {"name": "adamw"}}),
    ]


def run(settings: Settings) -> None:
    # TF32 has 10 bits
    torch.backends.cudnn.allow_tf32 = False
    begin, chosen = time.perf_counter(), cases(tiny=settings.tiny)
    right = sum(bool(attempt(f"parity {case}", lambda: agrees(case, settings))) for case in chosen)  # noqa: B023
    say(
        f"parity: {right} of {len(chosen)} agree with float64 on the CPU, "
        f"{time.perf_counter() - begin:.0f} s"
    )

    attempt("skipped step", lambda: skipped_step(settings))
    attempt("data.augment=device", lambda: augmentation(settings))
    attempt("checkpoint", lambda: checkpoint(settings))


def agrees(case: Case, settings: Settings) -> bool:
    here = trained(case.config(), settings.device, STEPS)
    apart = distance(here, trained(case.reference(), CPU, STEPS))
    good = apart <= case.tolerance
    check(good, f"{case}: {apart:.1e} apart, {case.tolerance:.0e} allowed")
    return good


def skipped_step(settings: Settings) -> None:
    changed = changed_by_skipped_step(small.config("byol"), settings.device)
    check(not changed, f"a step that is not finite leaves no trace {sorted(changed)[:5] or ''}")


def augmentation(settings: Settings) -> None:
    """Augments random images with random parameters on this device and on the CPU."""
    draw = torch.Generator().manual_seed(0)
    count, size = (8, 32) if settings.tiny else (64, 224)
    shape = (1, count, size, size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    params = random_params(count, size, draw)
    raw = RawBatch(
        0, (pixels,), torch.arange(count), torch.zeros(count, dtype=torch.int64), (), (params,)
    )

    here, reference = (
        ToDevice(device, 0, (0.0,) * 3, (1.0,) * 3)(raw).views[0].cpu() * 255
        for device in (settings.device, CPU)
    )
    levels = (here - reference).abs()
    check(
        float(levels.max()) <= 1.5,
        f"data.augment=device: {float((levels > 0.5).float().mean()):.2%} of the pixels differ "
        f"from the CPU's, at most by {float(levels.max()):.0f} grey levels",
    )


def random_params(count: int, size: int, draw: torch.Generator) -> torch.Tensor:
    """Parameters [1, count, COLUMNS] of views in the order of transforms.params.packed."""
    p = torch.rand(1, count, COLUMNS, generator=draw)
    order, factors, hue, gray, sigma, solarize, flip = 0, slice(1, 4), 4, 5, 6, 7, 8

    p[..., order] = (p[..., order] * 24).floor()
    p[..., factors] = 0.6 + 0.8 * p[..., factors]
    p[..., hue] = (p[..., hue] * 51 - 25).trunc()
    p[..., sigma] *= 2 * size / 224
    for column, probability in ((gray, 0.2), (solarize, 0.2), (flip, 0.5)):
        p[..., column] = (p[..., column] < probability).float()

    return p


def checkpoint(settings: Settings) -> None:
    """Saves from this device while training continues, and restores on the CPU."""
    config = small.config("moco", engine={"precision": "fp32"})
    engine = build(config, small.SAMPLES, small.STEPS_PER_EPOCH, settings.device)
    engine.step(batch(config, 0, settings.device), clock(0), 0.1, 0.1)

    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder))
        state = engine.state()
        writer.save(1, state, {})
        saved = {name: piece.data.cpu().clone() for name, piece in state.items()}

        # the files may still be being written
        engine.step(batch(config, 1, settings.device), clock(1), 0.1, 0.1)
        writer.save(2, engine.state(), {})
        writer.close()

        other = build(config, small.SAMPLES, small.STEPS_PER_EPOCH, CPU)
        other.restore(reader.open_step(reader.folder_of(Path(folder), 1)))
        restored = {name: piece.data for name, piece in other.state().items()}

    same = saved.keys() == restored.keys() and all(
        torch.equal(saved[name], restored[name]) for name in saved
    )
    check(same, "a checkpoint of this device is restored on the CPU bit for bit")
