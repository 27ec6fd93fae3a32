"""The variables by which a launcher, such as torchrun, describes a process.

They are valid before there is a process group; `dist` knows the ranks from then on.
"""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process among all processes of the run."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process among those of its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world() -> int:
    """Number of processes on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
