"""Names that files and addresses of a data set have."""

from __future__ import annotations

import re

CLASSES = "classes.json"


def slug(name: str) -> str:
    """The readable part of a key."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[-60:]


def is_remote(path: str) -> bool:
    return "://" in path
