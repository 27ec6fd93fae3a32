"""A method with a constant teacher, which recipes can name within `offered()`, and a teacher for
it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from kit import small
from scaletrain.checkpoint import writer as checkpoint
from scaletrain.core import Piece

METHOD = "toy_distillation"


@contextmanager
def offered() -> Iterator[None]:
    """Context in which the toy is one of the methods."""
    methods = importlib.import_module("scaletrain.methods")
    folder = str(Path(__file__).with_name("toy_methods"))
    try:
        with mock.patch.object(methods, "__path__", [*methods.__path__, folder]):
            yield
    finally:
        sys.modules.pop(f"scaletrain.methods.{METHOD}", None)


def weights(seed: int = 5) -> dict[str, Tensor]:
    """An encoder of small's size and a classifier, by their names in a run: backbone.*, head.*."""
    method = small.engine(small.config("supervised", seed=seed)).method.float()
    state = {k: v.clone() for k, v in method.state_dict().items()}
    return {k.replace("classifier.", "head.0."): v for k, v in state.items()}


def save(run: Path, step: int, tensors: dict[str, Tensor]) -> Path:
    """Write a step of a run with these tensors of its method, and an optimizer's; returns the
    run.
    """
    pieces = {
        f"method.{name}": Piece(t.reshape(-1), 0, tuple(t.shape)) for name, t in tensors.items()
    }
    pieces["optim.head.momentum_buffer"] = Piece(torch.zeros(6), 0, (6,))
    writer = checkpoint.Writer(run / "checkpoints", keep_last=5, keep_every=0)
    writer.save(step, pieces, {})
    writer.close()
    return run
