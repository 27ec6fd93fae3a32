"""Compilation of numeric loops by numba: cached on disk, and without threads, so safe to fork."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, **options: Any) -> Function:
    """Compile a function at its first call, with numba's options.

    The cache is in the folder of the source file or, if that is read-only, in NUMBA_CACHE_DIR or
    the user's cache folder; processes may share it. Without any of these every run compiles.
    """
    try:
        return cast(Function, njit(cache=True, **options)(function))
    except RuntimeError:  # "no locator available": no folder takes the cache
        return cast(Function, njit(**options)(function))


def inlined(function: Function) -> Function:
    """Compile a helper of compiled functions in the same file, with which it is cached."""
    return cast(Function, njit(function))


def summed(function: Function) -> Function:
    """Compile a function whose sums may be reordered, which is several times faster; the order is
    the same at every call.
    """
    return compiled(function, fastmath={"reassoc", "nsz"})
