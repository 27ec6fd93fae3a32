"""Compiled kernels: cached once for several processes, and usable where no folder takes the
cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[4]
MODULE = """
from scaletrain.runtime.jit import compiled

@compiled
def double(x: int) -> int:
    return 2 * x

print(double(21), sum(double.stats.cache_hits.values()))
"""


def start(script: Path, cache: Path | str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(cache),
        "PYTHONPATH": str(REPOSITORY),
        "HOME": "/dev/null/none",
    }
    environment.pop("XDG_CACHE_HOME", None)
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_share_one_cache(tmp_path: Path) -> None:
    script = tmp_path / "twice.py"
    script.write_text(MODULE)
    together = [start(script, tmp_path / "cache") for _ in range(3)]
    for process in together:
        out, err = process.communicate(timeout=120)
        assert out.startswith("42"), err
    assert list((tmp_path / "cache").rglob("*.nbi"))
    out, err = start(script, tmp_path / "cache").communicate(timeout=120)
    assert out.split() == ["42", "1"], err


def test_without_a_folder_for_the_cache_it_compiles_in_memory(tmp_path: Path) -> None:
    """A function that comes from no file has no place beside which to cache, as in an installation
    that nobody may write.
    """
    script = tmp_path / "inline.py"
    script.write_text(f"exec(compile({MODULE!r}, '/dev/null/none/module.py', 'exec'))")
    out, err = start(script, "").communicate(timeout=120)
    assert out.split() == ["42", "0"], err
