"""The matrix of exactness, method x engine x ranks, as the README has it: `make parity`; names of methods: these only.

A cell is the largest deviation from one process at 2 and at 4 ranks; exit code 1 if one passes its tolerance.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import ranks
from parity.cells import ENGINES, EXACT, SINGLE, STEPS, Case, alone, deviation, of, tolerance, train, under, whole

from scaletrain.config import leaves


def main(methods: tuple[str, ...]) -> int:
    cases: dict[str, Case] = {f"{method} under {engine}": under(method, engine) for method in methods for engine in ENGINES}
    plain = {
        name: alone(cases[name]) for method in methods for name in (f"{method} under ddp", f"{method} under deepspeed stage=0")
    }
    expected = whole([train(plain)])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in (2, 4):
            got = whole(ranks.run(world, train, Path(folder), cases))
            for name, case in cases.items():
                method, _, engine = name.partition(" under ")
                like = f"{method} under {'deepspeed stage=0' if engine.startswith('deepspeed') else 'ddp'}"
                found[name, world] = deviation(of(like, expected), of(name, got))[0], tolerance(case)
    print(f"Largest deviation after {STEPS} steps at 2 and 4 ranks; allowed: {EXACT:g}, for DeepSpeed (float32) {SINGLE:g}.\n")
    print(f"| method | {' | '.join(ENGINES)} |\n|---|{'---|' * len(ENGINES)}")
    for method in methods:
        cells = (" ".join(f"{found[f'{method} under {engine}', world][0]:.0e}" for world in (2, 4)) for engine in ENGINES)
        print(f"| {method} | {' | '.join(cells)} |")
    return int(any(worst >= limit for worst, limit in found.values()))


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or leaves("methods")))
