"""SimCLR's loss beside lightly's NTXentLoss, forward and backward on the CPU: `python
benchmarks/contrast.py`.

Peak memory: what the resident set of a fresh process rises by. Speed: alternating pairs in one
process. Both give one value and one gradient, and those of float64 similarities held all at once.
Needs `pip install lightly==1.6.0`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from torch import Tensor

from scaletrain.ops.contrastive import nt_xent

TEMPERATURE, PAIRS, EXACT_ROWS = 0.1, 7, 2048
Loss = Callable[[Tensor, Tensor], Tensor]


def dense(a: Tensor, b: Tensor) -> Tensor:
    z = F.normalize(torch.cat([a, b]), dim=1)
    s = (z @ z.T / TEMPERATURE).fill_diagonal_(float("-inf"))
    return 2 * F.cross_entropy(s, torch.arange(len(z)).roll(len(a)))


LOSSES: dict[str, Loss] = {  # lightly takes the mean over both directions, SimCLR's code their sum
    "lightly": lambda a, b: 2 * NTXentLoss(TEMPERATURE)(a, b),
    "scaletrain": lambda a, b: nt_xent(a, b, TEMPERATURE),
    "float64": lambda a, b: dense(a.double(), b.double()),
}


def pair(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(rows // 2, dim, generator=draw)
    b = a + torch.randn(rows // 2, dim, generator=draw)
    return a.requires_grad_(), b.requires_grad_()


def peak(name: str, rows: int, dim: int) -> float:
    """Megabytes that one forward and backward adds to this process."""

    def now() -> float:  # ru_maxrss would begin with what the parent process had
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

    a, b = pair(rows, dim)
    LOSSES[name](*pair(64, dim)).backward()  # loads libraries and makes threads
    before = now()
    LOSSES[name](a, b).backward()
    return now() - before


def apart(names: tuple[str, str], rows: int, dim: int) -> tuple[float, float]:
    """Relative difference of the values and of the gradients."""
    values, gradients = [], []
    for name in names:
        a, b = pair(rows, dim)
        loss = LOSSES[name](a, b)
        values.append(loss.item())
        gradients.append(torch.cat(torch.autograd.grad(loss, (a, b))))

    return abs(values[0] / values[1] - 1), (
        (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    ).item()


def seconds(name: str, rows: int, dim: int) -> float:
    a, b = pair(rows, dim)
    begin = perf_counter()
    LOSSES[name](a, b).backward()
    return perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8192, help="embeddings: two of each sample")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--peak", choices=LOSSES, help="only print what this one adds to the memory of the process"
    )

    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(args.peak, args.rows, args.dim))
        return

    options = ["--rows", str(args.rows), "--dim", str(args.dim), "--threads", str(args.threads)]

    def measured(name: str) -> float:
        command = [sys.executable, __file__, *options, "--peak", name]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    print(f"{args.rows} rows x {args.dim}, {args.threads} threads, torch {torch.__version__}")
    for other, rows in (("float64", min(EXACT_ROWS, args.rows)), ("lightly", args.rows)):
        value, gradient = apart(("scaletrain", other), rows, args.dim)
        print(
            f"against {other} at {rows} rows: value apart by {value:.1e}, gradient by "
            f"{gradient:.1e}"
        )

    theirs, ours = measured("lightly"), measured("scaletrain")
    print(
        f"peak memory: lightly {theirs:.0f} MB, scaletrain {ours:.0f} MB: "
        f"1/{theirs / max(1.0, ours):.1f}"
    )
    times = [
        (seconds("lightly", args.rows, args.dim), seconds("scaletrain", args.rows, args.dim))
        for _ in range(PAIRS)
    ]

    ratios = [a / b for a, b in times]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(
        f"seconds: lightly {median(a for a, _ in times):.2f}, scaletrain "
        f"{median(b for _, b in times):.2f}"
    )
    print(f"speed: {median(ratios):.2f} times lightly's ({spread}, {PAIRS} pairs)")


if __name__ == "__main__":
    main()
