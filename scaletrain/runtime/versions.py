"""Versions of scaletrain and of installed packages."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

from scaletrain.config.recipe import ConfigError


def installed(package: str) -> str:
    """Version of an installed distribution; empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def need(library: str) -> None:
    """Raise ConfigError unless the library of an engine, which is an extra, is installed."""
    if not installed(library):
        raise ConfigError(
            f"engine.name={library} needs {library}: pip install 'scaletrain[{library}]', or "
            "choose another engine.name"
        )


def commit() -> str:
    """Commit of the source tree, with '+' where it has changes; empty for an installed package."""
    where = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(where), "describe", "--always", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""

    return done.stdout.strip()
