"""Losses are computed in full precision whatever autocast does around them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Switch autocast off inside and turn half-precision tensor arguments into float32 (float64
    stays).
    """

    def lift(value: object) -> object:
        return (
            value.float()
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
            else value
        )

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*map(lift, args), **{k: lift(v) for k, v in kwargs.items()})  # type: ignore[arg-type]

    return wrapped


@full_precision
def unit(x: Tensor) -> Tensor:
    """Rows of length 1 along the last dimension; of bfloat16, as float32."""
    return F.normalize(x, dim=-1)
