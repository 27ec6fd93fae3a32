"""The environment of every process: warnings are errors, in this one by pytest's setting, and one
thread is enough. The longest files come first.
"""

from __future__ import annotations

import os
import signal
import sys

import pytest

# The tensors of tests are tiny, and threads that spin for work slow every other process. Ranks and
# commands that are started inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A hundred commands are started, and would each compile the package and what they import.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Here a message is matched from its beginning, without a regular expression.
os.environ["PYTHONWARNINGS"] = "error,ignore:This process:DeprecationWarning"

# A shell that runs this in the background, or nohup, has processes ignore these, and children
# inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# folders whose files take minutes, the longest first
LONG = ("slurm", "parity", "e2e", "engines", "contract", "train", "doctor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no process is left with it at the end."""
    items.sort(
        key=lambda item: (
            LONG.index(item.path.parent.name) if item.path.parent.name in LONG else len(LONG)
        )
    )
