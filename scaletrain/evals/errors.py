"""The error of evaluations; without torch, for those that only name it."""

from __future__ import annotations


class EvalError(ValueError):
    """An evaluation that is not possible; the text names the file or field and the fix."""
