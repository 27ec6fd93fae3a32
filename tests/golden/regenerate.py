"""The first losses of every method in miniature. `python tests/golden/regenerate.py` writes them to
losses.json.

Run it only when a change is meant to alter the numbers, and say so with the change: a refactor
never needs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FILE = Path(__file__).with_name("losses.json")
STEPS = 6

if __name__ == "__main__":
    sys.path[:0] = [str(FILE.parents[2]), str(FILE.parents[1])]

import torch  # noqa: E402
from kit import small  # noqa: E402

from scaletrain.config.schema import components  # noqa: E402


def losses(method: str) -> list[float]:
    """Float64, from parameters that do not depend on the processor, as torch's float32 normal draws
    do.
    """
    cfg = small.config(method)
    engine = small.engine(cfg)
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, p in sorted(engine.method.named_parameters()):
            if p.dim() > 1:
                p.copy_(
                    (torch.rand(p.shape, generator=draw, dtype=p.dtype) - 0.5)
                    * (12 / p[0].numel()) ** 0.5
                )
            else:
                p.copy_(0.5 + torch.rand(p.shape, generator=draw, dtype=p.dtype))
    return small.run(engine, cfg, 0, STEPS)


def write() -> None:
    found = {method: losses(method) for method in components("methods")}
    FILE.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{FILE}: {len(found)} methods, {STEPS} steps each")


if __name__ == "__main__":
    write()
