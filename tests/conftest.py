"""Warnings are errors in every process: in this one by pytest's setting, in commands and spawned ranks by what follows."""

from __future__ import annotations

import os

# Here a message is matched as it stands, from its beginning.
os.environ["PYTHONWARNINGS"] = "error,ignore:This process:DeprecationWarning"
