"""Draw the figure of the README: one run on 1, 2 and 4 processes, and one that is killed.

    python -m benchmarks.figure docs/figures/parity.svg

Four real trainings of BYOL with a narrow ResNet-18 in float64 on made-up images, started by
launchers/local.py. The fourth runs on 2 processes, is killed with SIGKILL half-way and resumes on
4. The loss of every step is drawn; exit code 1 if the curves differ by more than rounding. Takes
one or two minutes on two cores.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer

from scaletrain.train import records

ROOT = Path(__file__).parents[1]
IMAGES, STEPS, KILLED = 256, 52, 26
SETTINGS = (
    "model.width=0.0625",
    "engine.precision=fp64",
    "batch=32",
    f"steps={STEPS}",
    "method.hidden=128",
    "method.dim=32",
    "optim.name=sgd",
    "optim.lr=0.2",
    "optim.lr_scaling=none",
    "optim.warmup_epochs=1",
    "data.lanes=8",
    "data.workers=0",
    "checkpoint.every_steps=10",
    "monitor.every=1",
    "monitor.images_every=0",
)
# relative; what the order of additions in float64 leaves after so many steps is far below
TOLERANCE = 1e-6
# width of the line, colour, dashes: later curves are narrower and lie on the earlier ones
STYLES = (
    (11.0, "#c6dbef", ""),
    (6.5, "#6baed6", ""),
    (3.0, "#08519c", ""),
    (2.0, "#e6550d", "2 7"),
)
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 340, 62, 46, 20, 50


def main(out: Annotated[Path, typer.Argument(help="SVG file to write.")]) -> None:
    """Train, compare and draw."""
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        write_shards(work)

        curves = {}
        for procs in (1, 2, 4):
            name = f"{procs} process{'es' if procs > 1 else ''}"
            curves[name] = train(work, work / f"run-{procs}", procs)

        interrupted = work / "interrupted"
        stopped = train_and_kill(work, interrupted)
        curves[f"2, killed after step {stopped}, resumed on 4"] = train(work, interrupted, 4)

    worst = deviation(list(curves.values()))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw(curves, stopped, worst))

    typer.echo(f"{out}: {STEPS} steps, largest relative difference of a loss {worst:.1e}")
    if worst > TOLERANCE:
        raise typer.Exit(1)


def write_shards(work: Path) -> None:
    """Images of a few random colours each, as tar shards in WORK/shards."""
    draws = np.random.default_rng(0)
    (work / "images").mkdir()
    for number in range(IMAGES):
        colours = draws.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        image = cv2.resize(colours, (40, 40), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(work / "images" / f"{number:03d}.png"), image)

    subprocess.run(
        [sys.executable, ROOT / "shards" / "folder.py", work / "images", work / "shards"],
        check=True,
        stdout=subprocess.DEVNULL,
        env=environment(),
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(work: Path, run: Path, procs: int) -> list[str | Path]:
    return [
        sys.executable,
        ROOT / "launchers" / "local.py",
        "--procs",
        str(procs),
        ROOT / "configs" / "byol_r18_cifar10.yaml",
        "--run",
        run,
        f"data.path={work / 'shards'}",
        *SETTINGS,
    ]


def train(work: Path, run: Path, procs: int) -> list[float]:
    """The loss of every step."""
    subprocess.run(
        command(work, run, procs), check=True, stdout=subprocess.DEVNULL, env=environment()
    )
    return losses(run)


def train_and_kill(work: Path, run: Path) -> int:
    """Kill a training on 2 processes in the middle; the last step that it had recorded."""
    process = subprocess.Popen(
        command(work, run, 2),
        stdout=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    while len(losses(run)) < KILLED:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with exit code {process.returncode} before its kill")
        time.sleep(0.02)

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    return len(losses(run))


def losses(run: Path) -> list[float]:
    """The recorded losses."""
    recorded = (record.scalars.get("train/loss") for record in records.read(run).steps)
    return [loss for loss in recorded if loss is not None]


def deviation(curves: Sequence[Sequence[float]]) -> float:
    """Largest relative difference of a loss from the first curve's; all have every step."""
    first = np.array(curves[0])
    return max(float(np.max(np.abs(np.array(curve) / first - 1))) for curve in curves)


def draw(curves: Mapping[str, Sequence[float]], stopped: int, worst: float) -> str:
    """An SVG of the curves over each other, on a white ground that any page can hold."""
    values = [loss for curve in curves.values() for loss in curve]
    low, high = np.floor(min(values)), np.ceil(max(values))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(step: float) -> float:
        return LEFT + (right - LEFT) * step / STEPS

    def y(loss: float) -> float:
        return float(bottom - (bottom - TOP) * (loss - low) / (high - low))

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="24" font-size="15">BYOL, loss of every step: four runs, one line '
        f"(largest relative difference {worst:.0e})</text>",
    ]
    for loss in np.linspace(low, high, 5):
        lines += [
            f'<path d="M{LEFT} {y(loss):.1f}H{right}" stroke="#ddd"/>',
            f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:g}</text>',
        ]

    for step in range(0, STEPS + 1, 8):
        lines.append(
            f'<text x="{x(step):.1f}" y="{bottom + 19}" text-anchor="middle">{step}</text>'
        )

    lines += [
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">step</text>',
        f'<path d="M{x(stopped):.1f} {TOP}V{bottom}" stroke="#e6550d" stroke-dasharray="3 3"/>',
        f'<text x="{x(stopped) - 6:.1f}" y="{bottom - 8}" text-anchor="end" fill="#a63603">'
        "kill -9</text>",
    ]

    for row, ((name, curve), (width, colour, dashes)) in enumerate(
        zip(curves.items(), STYLES, strict=True)
    ):
        style = f'fill="none" stroke="{colour}" stroke-width="{width}"'
        style += f' stroke-dasharray="{dashes}" stroke-linecap="round"' if dashes else ""
        points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in enumerate(curve, 1))
        top = TOP + 16 + 22 * row
        lines += [
            f'<polyline points="{points}" stroke-linejoin="round" {style}/>',
            f'<path d="M{right - 330} {top}h34" {style}/>',
            f'<text x="{right - 286}" y="{top + 4}">{name}</text>',
        ]

    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    typer.run(main)
