"""The matrix of exactness, method x engine x ranks, as docs/explain/exactness.md has it: `make
parity`; names of methods: these only.

A cell is the largest deviation from one process at 2 and at 4 ranks; exit code 1 if one passes its
tolerance.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from kit import ranks
from kit.parity import (
    ENGINES,
    EXACT,
    SINGLE,
    STEPS,
    Case,
    alone,
    deviation,
    of,
    tolerance,
    train,
    under,
    whole,
)

from scaletrain.config.schema import components


def row(method: str) -> dict[tuple[str, int], float]:
    """The deviation under every engine at 2 and 4 ranks."""
    cases: dict[str, Case] = {engine: under(method, engine) for engine in ENGINES}
    like = {
        engine: "deepspeed stage=0" if engine.startswith("deepspeed") else "ddp"
        for engine in ENGINES
    }
    expected = whole([train({name: alone(cases[name]) for name in sorted(set(like.values()))})])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in (2, 4):
            got = whole(ranks.run(world, train, Path(folder), cases))
            for engine, case in cases.items():
                found[engine, world] = deviation(of(like[engine], expected), of(engine, got), case)[
                    0
                ]
    return found


def main(methods: tuple[str, ...]) -> int:
    print(
        f"Largest deviation after {STEPS} steps at 2 and 4 ranks; allowed: {EXACT:g}, for "
        f"DeepSpeed (float32) {SINGLE:g}.\n"
    )
    print(f"| method | {' | '.join(ENGINES)} |\n|---|{'---|' * len(ENGINES)}")
    passed = True
    for method in methods:
        found = row(method)
        cells = (", ".join(f"{found[engine, world]:.0e}" for world in (2, 4)) for engine in ENGINES)
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
        passed &= all(
            worst < tolerance(under(method, engine)) for (engine, _), worst in found.items()
        )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or components("methods")))
