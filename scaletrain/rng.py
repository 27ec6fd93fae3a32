"""Stateless random numbers: functions of a seed, a purpose and numbers such as epoch and sample."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_GOLDEN, _MIX1, _MIX2 = (
    c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al., 2014) on int64 with wrap-around; >> is made logical by
    masking.
    """
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX2

    return x ^ ((x >> 31) & ((1 << 33) - 1))


def hash64(*parts: int | str | Tensor) -> Tensor:
    """A well-mixed int64 (of the tensors' common shape, else 0-d) of all parts in order."""
    # numbers stay 0-d on the host, where they meet device tensors without a copy
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part
        state = _mix(state + _GOLDEN + _mix(torch.as_tensor(number, dtype=torch.int64)))

    return state


def uniform(keys: Tensor, purpose: str, n: int) -> Tensor:
    """[...] int64 keys -> [..., n] float32 in [0, 1): a function of key, purpose and column, never
    of rank or call order.
    """
    bits = hash64(keys.unsqueeze(-1), purpose, torch.arange(n, device=keys.device))
    return ((bits >> 40) & ((1 << 24) - 1)).float() * 2.0**-24


def permutation(n: int, *key: int | str, device: torch.device | str = "cpu") -> Tensor:
    """[n] int64: a permutation that depends on the key only."""
    return hash64(*key, torch.arange(n, device=device)).argsort(stable=True)
