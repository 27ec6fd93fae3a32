"""The environment of every process: warnings are errors, in this one by pytest's setting, and one thread is enough."""

from __future__ import annotations

import os

# The tensors of tests are tiny, and threads that spin for work slow every other process. Spawned ranks and commands inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Here a message is matched as it stands, from its beginning.
os.environ["PYTHONWARNINGS"] = "error,ignore:This process:DeprecationWarning"
