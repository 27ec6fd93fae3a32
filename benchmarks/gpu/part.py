"""Runs one part of the check on a GPU: `python -m benchmarks.gpu.part MODULE --work FOLDER`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.gpu.report import Settings, say


def main(
    module: Annotated[str, typer.Argument(help="A module of benchmarks.gpu that has `run`.")],
    work: Annotated[Path, typer.Option(help="Folder of shards and runs.")],
    data: Annotated[Path, typer.Option(help="Folder of archives of real images.")] = Path(),
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="The smallest settings.")] = False,
    seconds: Annotated[float, typer.Option(help="After which the part is stopped.")] = 170.0,
) -> None:
    """Run one part; its results are the lines that begin with `##`."""
    if device == "cuda" and not torch.cuda.is_available():
        say("FAIL there is no GPU that PyTorch can use; DEVICE=cpu TINY=1 only tries the checks")
        raise typer.Exit(1)

    place = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)

    part = importlib.import_module(f"benchmarks.gpu.{module}")
    part.run(Settings(place, tiny, work, data, seconds))


if __name__ == "__main__":
    typer.run(main)
