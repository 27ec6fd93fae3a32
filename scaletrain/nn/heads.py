"""Projection and prediction heads: multi-layer perceptrons with the papers' choices of bias and
norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from scaletrain.nn.norm import BatchNorm


def plain(widths: Sequence[int]) -> nn.Sequential:
    """Linear - ReLU for every hidden width, then Linear; no norm anywhere (MoCo, PIRL)."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def mlp(
    widths: Sequence[int],
    *,
    hidden_bias: bool = True,
    last_bias: bool = True,
    last_norm: str = "none",
    group: int = 0,
) -> nn.Sequential:
    """Linear - BN - ReLU for every hidden width, then Linear and optionally a norm.

    last_norm: "none", "scale" (no shift: SimCLR), "plain" (neither: SimSiam) or "full".
    """
    layers: list[nn.Module] = []

    for inputs, outputs in pairwise(widths[:-1]):
        layers += [
            nn.Linear(inputs, outputs, bias=hidden_bias),
            BatchNorm(outputs, group=group),
            nn.ReLU(inplace=True),
        ]

    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    if last_norm != "none":
        layers.append(
            BatchNorm(
                widths[-1], scale=last_norm != "plain", shift=last_norm == "full", group=group
            )
        )

    return nn.Sequential(*layers)
