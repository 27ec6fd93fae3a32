"""Compilation of numeric loops by numba: once per machine, kept in a cache, without threads, so
safe to fork.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, **options: Any) -> Function:
    """Compiled, with numba's options, at its first call. The cache lies beside the file or, if that
    is read-only, where NUMBA_CACHE_DIR or the user's cache folder is; processes may share it.
    Without any such folder every run compiles anew.
    """
    try:
        return cast(Function, njit(cache=True, **options)(function))
    except RuntimeError:  # "no locator available": no folder takes the cache
        return cast(Function, njit(**options)(function))


def inlined(function: Function) -> Function:
    """A part of compiled functions in the same file, cached with them."""
    return cast(Function, njit(function))


def summed(function: Function) -> Function:
    """Compiled; sums over elements may be taken in any order, one and the same at every call, which
    is several times faster.
    """
    return compiled(function, fastmath={"reassoc", "nsz"})
