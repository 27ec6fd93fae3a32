"""The matrix of exactness, method x engine x ranks, as docs/explain/exactness.md has it: `make
parity`; names of methods: these only.

A cell is the largest deviation from one process at 2 and at 4 ranks, or "refused" where the engine
cannot train the method; the exit code is 1 if one exceeds its tolerance. A second table has what
only ddp can compare: auxiliaries, accumulated gradients and options of methods.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from kit import ranks
from kit.parity import (
    CASES,
    ENGINES,
    EXACT,
    SINGLE,
    STEPS,
    Case,
    Run,
    alone,
    deviation,
    of,
    tolerance,
    train,
    under,
    whole,
)

from scaletrain.config.recipe import ConfigError, merge
from scaletrain.config.schema import components

WORLDS = (2, 4)
# deeper than in the suite, which has less time
NETWORK = {"name": "resnet18"}
# None: refused
Row = dict[tuple[str, int], float | None]


def attempted(cases: Mapping[str, Case]) -> Run:
    """As `train`; a case that the engine refuses, on every rank alike, has `refused` alone."""
    found: Run = {}
    for name, case in cases.items():
        try:
            found |= train({name: case})
        except ConfigError:
            found[f"{name}/refused"] = torch.ones(1)
    return found


def deviations(cases: Mapping[str, Case], like: Mapping[str, str]) -> Row:
    """Of each case at 2 and 4 ranks from the one-process run of the case that it is like."""
    cases = {
        name: (method, merge(changes, {"model": NETWORK}))
        for name, (method, changes) in cases.items()
    }
    expected = whole([train({name: alone(cases[name]) for name in sorted(set(like.values()))})])
    found: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in WORLDS:
            got = whole(ranks.run(world, attempted, Path(folder), cases))
            for name, case in cases.items():
                result = of(name, got)
                found[name, world] = (
                    None
                    if "refused" in result
                    else deviation(of(like[name], expected), result, case)[0]
                )
    return found


def row(method: str) -> Row:
    """The deviations of a method under every engine."""
    like = {
        engine: "deepspeed stage=0" if engine.startswith("deepspeed") else "ddp"
        for engine in ENGINES
    }
    return deviations({engine: under(method, engine) for engine in ENGINES}, like)


def cell(found: Row, name: str) -> str:
    worst = [found[name, world] for world in WORLDS]
    return "refused" if None in worst else ", ".join(f"{value:.0e}" for value in worst)


def passes(worst: float | None, allowed: float) -> bool:
    return worst is None or worst < allowed


def main(names: tuple[str, ...]) -> int:
    methods = names or components("methods")
    print(
        f"Largest deviation after {STEPS} steps at 2 and 4 ranks; allowed: {EXACT:g}, for "
        f"DeepSpeed (float32) {SINGLE:g}.\n"
    )
    print(f"| method | {' | '.join(ENGINES)} |\n|---|{'---|' * len(ENGINES)}")
    passed = True
    for method in methods:
        found = row(method)
        cells = (cell(found, engine) for engine in ENGINES)
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
        passed &= all(
            passes(worst, tolerance(under(method, engine))) for (engine, _), worst in found.items()
        )
    others = {} if names else {name: case for name, case in CASES.items() if name not in methods}
    if others:
        found = deviations(others, {name: name for name in others})
        print("\n| case | ddp |\n|---|---|")
        for name in others:
            print(f"| {name} | {cell(found, name)} |")
        passed &= all(passes(worst, EXACT) for worst in found.values())
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
