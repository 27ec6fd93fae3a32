"""Trains with NCCL over one rank, and with two ranks on one device against a single process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as c10d
import typer
from kit import small  # type: ignore[import-not-found]
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.comparison import batch, clock, distance, trained
from benchmarks.gpu.report import Settings, attempt, check
from scaletrain import dist
from scaletrain.config.schema import Config
from scaletrain.train.build import build

METHODS = ("byol", "relicv2", "moco", "swav")
STEPS = 2
# of float64 sums in another order
TOLERANCE = 1e-9


def run(settings: Settings) -> None:
    if settings.cuda:
        attempt("NCCL", lambda: nccl(settings))
    attempt("two ranks", lambda: two_ranks(settings))


def nccl(settings: Settings) -> None:
    """Every collective of the project and three steps of DDP; more GPUs would be needed to see it
    scale.
    """
    c10d.init_process_group("cpu:gloo,cuda:nccl", store=HashStore(), rank=0, world_size=1)
    x, out = torch.ones(4, device=settings.device), torch.empty(4, device=settings.device)
    c10d.all_reduce(x)
    dist._all_gather(out, x)
    dist._reduce_scatter(out, x)
    c10d.all_to_all_single(out, x)
    c10d.all_reduce(torch.ones(1))
    c10d.broadcast_object_list([1])

    config = small.config("byol", engine={"precision": "bf16"}, model={"width": 0.25})
    engine = build(config, small.SAMPLES, small.STEPS_PER_EPOCH, settings.device)
    wrapped = DistributedDataParallel(engine.method, init_sync=False, gradient_as_bucket_view=True)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            with engine.autocast():
                losses = wrapped(batch(config, step, settings.device), clock(step)).losses
            torch.stack(list(losses.values())).sum().backward()
        settings.synchronize()

    c10d.destroy_process_group()
    texts = sorted({str(w.message).split("\n")[0][:120] for w in caught})
    version = ".".join(map(str, torch.cuda.nccl.version()))
    check(True, f"NCCL {version} with one rank, DDP over it; warnings: {texts or 'none'}")


def config_of(method: str) -> Config:
    changes = {"model": {"norm_group": 6}} if method == "moco" else {}
    config: Config = small.config(method, **changes)
    return config


def two_ranks(settings: Settings) -> None:
    """Two processes that share the device through gloo compute what one does."""
    methods = METHODS[:1] if settings.tiny else METHODS
    with tempfile.TemporaryDirectory() as folder:
        codes = launch(settings, methods, Path(folder))
        if any(codes):
            check(False, f"two ranks on one device: exit codes {codes}")

        for method in methods:
            files = [Path(folder) / f"{method}-{rank}.pt" for rank in range(2)]
            if not all(file.exists() for file in files):
                check(False, f"{method}: two ranks on one device did not finish")
                continue

            # each tensor is written by one of the ranks
            both = {k: v for file in files for k, v in torch.load(file, weights_only=True).items()}
            apart = distance(both, trained(config_of(method), settings.device, STEPS))
            check(
                apart < TOLERANCE,
                f"{method}: two ranks on one device (gloo) and one process: {apart:.1e} apart",
            )


def launch(settings: Settings, methods: tuple[str, ...], folder: Path) -> list[int]:
    """Exit codes of two ranks that train the methods and leave their states in the folder."""
    words = [sys.executable, "-m", "benchmarks.gpu.ranks", str(folder), *methods]
    words += ["--device", str(settings.device)]
    processes = [
        subprocess.Popen(
            [*words, "--rank", str(rank)],
            env=os.environ | {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]

    codes = []
    for process in processes:
        try:
            codes.append(process.wait(settings.seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())

    return codes


def rank_main(
    folder: Path,
    methods: list[str],
    rank: Annotated[int, typer.Option()],
    device: Annotated[str, typer.Option()],
) -> None:
    """One of two ranks."""
    backend = "cpu:gloo,cuda:gloo" if device.startswith("cuda") else "gloo"
    meeting = f"file://{folder.resolve() / 'rendezvous'}"
    c10d.init_process_group(backend, init_method=meeting, rank=rank, world_size=2)

    for method in methods:
        state = trained(config_of(method), torch.device(device), STEPS)
        path = folder / f"{method}-{rank}"
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path.with_suffix(".pt"))

    c10d.destroy_process_group()


if __name__ == "__main__":
    typer.run(rank_main)
