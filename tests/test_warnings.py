"""conftest.py: a warning ends commands and spawned processes too."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import warnings

import pytest

FORK = "This process (pid=1) is multi-threaded, use of fork() may lead to deadlocks in the child."
CASES = [
    ("something is odd", UserWarning, True),
    ("it will go", DeprecationWarning, True),
    (FORK, DeprecationWarning, False),
]


@pytest.mark.parametrize(("text", "category", "fatal"), CASES)
def test_a_warning_ends_a_command(text: str, category: type[Warning], fatal: bool) -> None:
    command = f"import warnings; warnings.warn({text!r}, {category.__name__})"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=False
    )
    assert done.returncode == fatal
    assert (f"{category.__name__}: {text}" in done.stderr) == fatal


@pytest.mark.parametrize(("text", "category", "fatal"), CASES)
def test_a_warning_ends_a_spawned_process(text: str, category: type[Warning], fatal: bool) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=warnings.warn, args=(text, category)
    )
    process.start()
    process.join()
    assert process.exitcode == fatal
