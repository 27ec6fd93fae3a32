"""The heads of evaluations against scikit-learn and a bare search: `python -m benchmarks.heads`.

Logistic regression: the path of 45 strengths, warm-started from the largest on, against
scikit-learn's LogisticRegression with `warm_start` on the same float32 features; how far the
minimised function of each ends above the minimum, which is that of float64 at a tolerance of 1e-12.
scikit-learn is timed with its usual tolerance, and in float64, whose rounding smaller tolerances
need, with the first tenth, hundredth, ... of it that ends as near to the minimum as asked of ours.
kNN: search and votes of four k against a matrix product and topk alone, on the same chunks. The
features are those of a random network with two layers on blobs: positive, correlated and of very
different variance. Times are CPU times of one thread, so that other work on the machine counts
less.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from time import process_time
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.rows import HEAD, Row, machine, spread, versions
from scaletrain.evals.benchmarks import knn as knn_benchmark
from scaletrain.evals.benchmarks import logistic as logistic_benchmark
from scaletrain.evals.heads import knn, lbfgs
from scaletrain.evals.heads.classifier import Linear

# Same minimum, as a share of it; times scikit-learn's speed; times the bare search's time.
GAP, FASTER, SLOWER = 1e-4, 3.0, 1.2
ROUNDS = 5


def features(samples: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features [samples, width] float32 and their classes [samples]."""
    random = torch.Generator().manual_seed(seed)
    # the network and the centres are the same for every number of samples
    first, second = (
        torch.randn(size, width, generator=random) / math.sqrt(size) for size in (64, width)
    )
    centres = torch.randn(classes, 64, generator=random)
    labels = torch.randint(classes, (samples,), generator=random)
    blobs = centres[labels] + 3 * torch.randn(samples, 64, generator=random)
    return F.relu(F.relu(blobs @ first) @ second), labels


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of CPU time, and what came out."""
    begin = process_time()
    outcome = run()
    return process_time() - begin, outcome


def value(x: Tensor, labels: Tensor, head: Linear, strength: float) -> float:
    """The minimised function, in float64."""
    weight, bias = head.weight.double(), head.bias.double()
    loss = F.cross_entropy(x.double() @ weight.T + bias, labels)
    return float(loss + strength / 2 * weight.square().sum())


def theirs(x: Tensor, labels: Tensor, strengths: list[float], tolerance: float) -> list[Linear]:
    model = LogisticRegression(warm_start=True, max_iter=100_000, tol=tolerance)
    outcome, numbers = [], (x.numpy(), labels.numpy())
    for strength in strengths:
        model.C = 1 / (strength * len(x))
        model.fit(*numbers)
        parts = (torch.from_numpy(part.copy()) for part in (model.coef_, model.intercept_))
        outcome.append(Linear(*parts))

    return outcome


def logistic(samples: int, width: int, classes: int) -> Iterator[Row]:
    """One run each: theirs takes a minute or more."""
    x, labels = features(samples, width, classes)
    strengths = logistic_benchmark.Config().path
    exact = list(lbfgs.path(x.double(), labels, classes, strengths, tolerance=1e-12))
    assert all(fit.converged for fit in exact), "else they are no measure"

    def above(heads: Iterable[Linear]) -> float:
        """Largest share of the minimum that the function of a strength is above it."""
        return max(
            value(x, labels, head, best.strength) / value(x, labels, best.head, best.strength) - 1
            for head, best in zip(heads, exact, strict=True)
        )

    seconds, fits = timed(lambda: list(lbfgs.path(x, labels, classes, strengths)))
    gap = above(fit.head for fit in fits)
    for tolerance in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
        their_x = x if tolerance == 1e-4 else x.double()
        their_seconds, heads = timed(partial(theirs, their_x, labels, strengths, tolerance))
        their_gap, ratio = above(heads), their_seconds / seconds
        same = their_gap <= GAP
        yield Row(
            f"logistic regression, 45 strengths, {samples:,} x {width}, {classes} classes",
            f"{seconds:.1f} s, {gap:.0e} above the minimum",
            f"scikit-learn, {their_x.dtype}, tol={tolerance:g}".replace("torch.", ""),
            f"{their_seconds:.1f} s, {their_gap:.0e} above",
            f"{ratio:.1f} times faster",
            f"{FASTER:g} times, {GAP:g} above" if same else "none: not the same minimum",
            gap <= GAP and (ratio >= FASTER or not same),
        )
        if same:
            break


def neighbours(bank_size: int, queries_size: int, width: int, classes: int) -> Row:
    """Alternating rounds of both, after one that is not counted."""
    x, labels = features(bank_size + queries_size, width, classes)
    bank, queries, labels = x[:bank_size], x[bank_size:], labels[:bank_size]
    config = knn_benchmark.Config()
    k = max(config.ks)

    def ours() -> list[Tensor]:
        near, where = knn.search(queries, bank, k)
        voters = labels[where]
        return [knn.votes(near, voters, one, config.temperature, classes) for one in config.ks]

    unit_bank, unit_queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    chunk = max(1, (1 << 25) // bank_size)

    def bare() -> list[Tensor]:
        return [(part @ unit_bank.T).topk(k).indices for part in unit_queries.split(chunk)]

    times = [(timed(ours)[0], timed(bare)[0]) for _ in range(ROUNDS + 1)][1:]
    ratios = [a / b for a, b in times]
    middle = sorted(ratios)[len(ratios) // 2]
    return Row(
        f"kNN of four k, {queries_size:,} queries in {bank_size:,} x {width}, {classes} classes",
        spread([a for a, _ in times]) + " s",
        "matrix product and topk",
        spread([b for _, b in times]) + " s",
        spread(ratios),
        f"at most {SLOWER:g}",
        middle <= SLOWER,
    )


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the samples.")] = False,
) -> None:
    """Print the rows of the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    share = 10 if quick else 1

    with threadpool_limits(1):
        print(HEAD, flush=True)
        for size in ((5_000, 256, 10), (2_000, 128, 20)):
            for row in logistic(size[0] // share, *size[1:]):
                print(row, flush=True)
        for classes in (10, 1000):
            print(neighbours(50_000 // share, 5_000 // share, 512, classes), flush=True)

    print(f"\nOn {machine()}; {versions(('torch', 'scikit-learn'))}.")


if __name__ == "__main__":
    typer.run(main)
