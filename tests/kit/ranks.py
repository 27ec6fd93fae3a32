"""Run a function on several gloo ranks; one set of processes serves every case of a module.

They are forked from a server that has imported what is slow to import and has run nothing yet.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from scaletrain import dist
from scaletrain.config import load
from scaletrain.train import loop


def run(
    world: int, function: Callable[..., dict[str, torch.Tensor]], folder: Path, *args: Any
) -> list[dict[str, torch.Tensor]]:
    """function(*args) on `world` ranks -> what each rank returned."""
    context = _start(world, function, folder, args)
    while not context.join():
        pass
    return [torch.load(folder / f"rank{r}-of-{world}.pt", weights_only=True) for r in range(world)]


def train(world: int, recipe: Path, run_folder: Path, *overrides: str) -> None:
    """Train in a run folder on `world` ranks, to the end: what a launcher's processes compute, but
    without their imports.
    """
    with tempfile.TemporaryDirectory() as folder:
        run(world, _train, Path(folder), recipe, run_folder, overrides)


@contextmanager
def training(world: int, recipe: Path, run_folder: Path, *overrides: str) -> Iterator[None]:
    """The same ranks, which train while the context lasts and are then killed with SIGKILL."""
    with tempfile.TemporaryDirectory() as folder:
        context = _start(world, _train, Path(folder), (recipe, run_folder, overrides))
        yield
        assert all(process.is_alive() for process in context.processes), "they ended by themselves"
        for process in context.processes:
            process.kill()
        for process in context.processes:
            process.join()


def _start(
    world: int, function: Callable[..., Any], folder: Path, args: tuple[Any, ...]
) -> mp.ProcessContext:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(["scaletrain.train.loop", "torch._dynamo"])
    context = mp.start_processes(
        _rank,
        (world, port, function, folder, args),
        nprocs=world,
        join=False,
        start_method="forkserver",
    )
    assert context is not None
    return context


def _train(recipe: Path, run_folder: Path, overrides: tuple[str, ...]) -> dict[str, torch.Tensor]:
    loop.train(load.load(recipe, overrides), run_folder)
    return {}


def _rank(
    rank: int,
    world: int,
    port: int,
    function: Callable[..., Any],
    folder: Path,
    args: tuple[Any, ...],
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init(timeout_seconds=120)
    try:
        torch.save(function(*args), folder / f"rank{rank}-of-{world}.pt")
    finally:
        dist.shutdown()
