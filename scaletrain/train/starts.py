"""What a start of a run records about itself: processes, devices, job and versions."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter

import torch

from scaletrain import dist
from scaletrain.runtime.versions import commit, installed
from scaletrain.train.records import StartRecord


def versions() -> dict[str, str]:
    """Versions of what computes, and on rank 0 the commit of the source tree as `git`."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git": commit() if dist.main() else "",
    }


def describe(step: int, device: torch.device, engine: str, known: dict[str, str]) -> StartRecord:
    """The record of a start at an optimizer step. Every rank calls it.

    device: of this rank. engine: the engine's name. known: what `versions` says.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    nodes, names = zip(*dist.gather_objects((platform.node(), name)), strict=True)
    libraries = {library: installed(library) for library in ("scaletrain", engine)}

    return StartRecord(
        step=step,
        time=time.time(),
        world=dist.world(),
        devices=dict(Counter(names)),
        host=platform.node(),
        hosts=tuple(dict.fromkeys(nodes)),
        job=os.environ.get("SLURM_JOB_ID", ""),
        versions={
            **{library: version for library, version in libraries.items() if version},
            "python": known["python"],
            "torch": known["torch"],
        },
        git=known["git"],
    )
