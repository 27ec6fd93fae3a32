"""Linear probe on a frozen backbone, with the protocol of BYOL (appendix C.1) and ReLICv2 (its
repository's configs/eval.py).

Nesterov SGD without weight decay, cosine without warm-up, a sweep of learning rates whose heads are
trained in parallel on the same features. The rate is chosen on held-out training images; the test
set is scored once, by the chosen head at its last epoch. BYOL trains 80 epochs and sweeps; ReLICv2
trains 100 at rate .3 on all images (`epochs=80`; `rates=[.3] refit=true`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from scaletrain import rng
from scaletrain.config.schema import Count, Frozen
from scaletrain.evals.context import EvalContext
from scaletrain.evals.features import mask, some, watch
from scaletrain.evals.held_out import held_out
from scaletrain.evals.scores import accuracy, ranks

# Samples per chunk of scoring.
_ROWS = 4096


class Config(Frozen):
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 100
    batch: Count = 1024
    """Samples per step; at most all training images."""

    rates: Annotated[
        tuple[Annotated[float, Field(ge=1e-12, le=1e6)], ...], AfterValidator(some)
    ] = (0.4, 0.3, 0.2, 0.1, 0.05)
    """Per 256 samples of the batch."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    augment: bool = True
    """Random crops and flips, encoded again each epoch; false: the test transform, encoded once."""

    refit: bool = False
    """Train again on all training images at the chosen rate before the test."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of the order of samples."""


class Heads:
    """L linear classifiers with learning rates of their own that see the same batches; weight [L,
    C, D], bias [L, C].

    They start at zero. differs: Haiku draws the weights; the problem is convex and a fixed start
    makes the rates comparable.
    """

    def __init__(self, rates: Tensor, classes: int, width: int, momentum: float) -> None:
        """`rates` [L] sets device and dtype."""
        self.rates, self.momentum = rates, momentum
        self.weight = rates.new_zeros(len(rates), classes, width)
        self.bias = rates.new_zeros(len(rates), classes)
        self._moving = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def logits(self, x: Tensor) -> Tensor:
        """[B, D] -> [L, C, B]: with the batch innermost, softmax over few classes is several times
        faster on a CPU.
        """
        flat = torch.addmm(self.bias.view(-1, 1), self.weight.flatten(0, 1), x.T)  # [L * C, B]
        return flat.view(*self.bias.shape, len(x))

    def step(self, x: Tensor, labels: Tensor, share: float) -> None:
        """One step of SGD (torch.optim.SGD's nesterov) on the mean cross-entropy, at `share` of
        each head's rate.

        One matrix product forward and one backward serve all heads: the gradient of cross-entropy
        is softmax - one-hot.
        """
        error = self.logits(x).softmax(1)  # [L, C, B]
        error[:, labels, torch.arange(len(x), device=x.device)] -= 1
        error /= len(x)

        gradients = ((error.flatten(0, 1) @ x).view_as(self.weight), error.sum(2))
        rates = self.rates * share
        for tensor, moving, gradient in zip(
            (self.weight, self.bias), self._moving, gradients, strict=True
        ):
            moving.mul_(self.momentum).add_(gradient)
            tensor.sub_(
                (gradient + self.momentum * moving) * rates.view(-1, *[1] * (tensor.ndim - 1))
            )

    def ranks(self, x: Tensor, labels: Tensor) -> Tensor:
        """Places of the true class, [L, N] int64 on the CPU."""
        parts = []
        for rows, truth in zip(torch.split(x, _ROWS), torch.split(labels, _ROWS), strict=True):
            truth = truth.to(self.bias.device)
            parts.append(
                torch.stack([ranks(one, truth) for one in self.logits(rows.to(self.bias)).mT]).cpu()
            )

        return torch.cat(parts, 1)


def carve(chunks: Iterable[tuple[Tensor, ...]], batch: int) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of any length -> batches of exactly `batch` rows from the continuing line; the last
    remainder is dropped.
    """
    rest: tuple[Tensor, ...] | None = None

    for chunk in chunks:
        line = (
            chunk
            if rest is None
            else tuple(torch.cat(pair) for pair in zip(rest, chunk, strict=True))
        )
        whole = len(line[0]) // batch * batch

        for start in range(0, whole, batch):
            yield tuple(part[start : start + batch] for part in line)

        rest = tuple(part[whole:] for part in line)


def shuffled(
    x: Tensor, labels: Tensor, rows: Tensor, batch: int, seed: int
) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches of (features, labels) drawn from `rows`, each epoch in a new keyed order."""

    def epochs() -> Iterator[tuple[Tensor]]:
        epoch = 0
        while True:
            yield (rows[rng.permutation(len(rows), seed, "linear", epoch)],)
            epoch += 1

    for (picked,) in carve(epochs(), batch):
        yield x.index_select(0, picked), labels.index_select(0, picked)


def fit(
    rates: Sequence[float],
    batches: Iterator[tuple[Tensor, ...]],
    steps: int,
    classes: int,
    config: Config,
) -> Heads:
    """Train a head per learning rate (already scaled by the batch) for `steps` batches, cosine to
    zero.
    """
    heads: Heads | None = None

    for step, (x, labels) in enumerate(watch(islice(batches, steps), "linear probe", steps)):
        if heads is None:
            heads = Heads(
                torch.tensor(rates, device=x.device), classes, x.shape[1], config.momentum
            )
        heads.step(x, labels.to(x.device), (1 + math.cos(math.pi * step / steps)) / 2)

    assert heads is not None, "steps is at least 1 and the batches do not end"
    return heads


def measure(config: Config, context: EvalContext) -> tuple[dict[str, float], dict[str, Any]]:
    """Run the benchmark: metrics in per cent, and the protocol for the result."""
    out = held_out(context.samples, context.subset_labels)
    validation, classes = context.part(out), context.classes
    rows = (~mask(out, context.samples)).nonzero().flatten()
    batch = min(config.batch, len(rows))

    def train(rows: Tensor, rates: Sequence[float]) -> Heads:
        steps = max(1, round(config.epochs * len(rows) / batch))
        return fit(
            [r * batch / 256 for r in rates],
            _batches(config, context, rows, batch),
            steps,
            classes,
            config,
        )

    heads = train(rows, config.rates)
    by_rate = [
        accuracy(rank, validation.labels, classes)["top1"]
        for rank in heads.ranks(validation.x, validation.labels)
    ]
    # of equals the first listed
    best = by_rate.index(max(by_rate))

    if config.refit:
        heads, best_head = train(torch.arange(context.samples), config.rates[best : best + 1]), 0
    else:
        best_head = best

    queries = context.queries()
    scores = accuracy(heads.ranks(queries.x, queries.labels)[best_head], queries.labels, classes)
    metrics = {
        "linear" if name == "top1" else f"linear_{name}": value for name, value in scores.items()
    }

    return {**metrics, "linear_held_out": by_rate[best]}, {
        **config.model_dump(mode="json"),
        "batch": batch,
        "optimizer": "sgd nesterov",
        "weight_decay": 0.0,
        "schedule": "cosine to 0 by step, no warm-up",
        "standardised": False,
        "train_transform": context.augmentation if config.augment else context.transform,
        "chosen_on": f"{len(out)} held-out training images",
        "trained_on": context.samples if config.refit else len(rows),
        "reported": "test set, last epoch",
        "found": {
            "chosen_rate": config.rates[best],
            # then a wider sweep may do better
            "chosen_at_edge": config.rates[best] in (min(config.rates), max(config.rates)),
            "held_out_top1": dict(zip(map(str, config.rates), by_rate, strict=True)),
        },
    }


def _batches(
    config: Config, context: EvalContext, rows: Tensor, batch: int
) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches of (features, labels) of the training images `rows`."""
    if not config.augment:
        bank = context.bank()
        return shuffled(bank.x, bank.labels, rows, batch, config.seed)
    return carve(context.augmented(mask(rows, context.samples), config.seed), batch)
