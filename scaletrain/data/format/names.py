"""Names of files and addresses of a data set."""

from __future__ import annotations

import re

CLASSES = "classes.json"


def slug(name: str) -> str:
    """The readable part of a sample's key, from the name of its file."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[-60:]


def is_remote(path: str) -> bool:
    """Whether a path is an address."""
    return "://" in path
