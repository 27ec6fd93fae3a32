"""Linear classifiers of features, and where they compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain.evals.errors import EvalError

# Samples per chunk of scoring.
ROWS = 4096


@dataclass(frozen=True)
class Linear:
    """Scores of C classes from features of width D."""

    weight: Tensor  # [C, D]
    bias: Tensor  # [C]

    def scores(self, x: Tensor) -> Tensor:
        """[N, D] on any device -> [N, C] on the CPU."""
        parts = [
            torch.addmm(self.bias, rows.to(self.bias), self.weight.T) for rows in x.split(ROWS)
        ]
        return torch.cat([part.cpu() for part in parts])


def resident(x: Tensor, device: torch.device) -> Tensor:
    """Features [N, D] on the device, or as they are where they and as much again do not fit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what earlier tensors have left is free for new ones, and the driver does not know it
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if 2 * x.numel() * x.element_size() > free:
            return x

    return x.to(device)


def finite(x: Tensor) -> Tensor:
    """The features. Raises EvalError where some are not finite."""
    # A sum is not finite if one of them is not. In parts, since float64 is a copy on the CPU.
    if not all(rows.sum(dtype=torch.float64).isfinite() for rows in x.split(ROWS)):
        raise EvalError(
            "some features of the training images are not finite: the encoder has diverged"
        )

    return x


def normalized(x: Tensor, least: float = 1e-12) -> Tensor:
    """Features [N, D] float32 of length one; shorter ones than `least` are divided by it."""
    return F.normalize(x.float(), dim=1, eps=least)
