"""Linear classifiers trained by SGD, one for each of several learning rates on the same batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scaletrain import rng
from scaletrain.evals.heads.classifier import ROWS
from scaletrain.evals.scores import ranks

Schedule = Literal["cosine", "cosine_by_epoch", "steps"]


@dataclass(frozen=True)
class Sgd:
    """SGD on the mean cross-entropy, as in torch.optim."""

    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    # shares of the training after each of which `steps` divides the rate by ten
    milestones: tuple[float, ...] = ()
    # in `cosine_by_epoch` the rate changes between epochs only
    epochs: int = 100

    def share(self, step: int, steps: int) -> float:
        """Share of the learning rate at a step of 0 .. steps - 1."""
        done = step / steps
        if self.schedule == "steps":
            # a tolerance, since .6 * 100 is no whole number
            return 0.1 ** sum(done >= milestone - 1e-9 for milestone in self.milestones)
        if self.schedule == "cosine_by_epoch":
            done = math.floor(done * self.epochs + 1e-9) / self.epochs

        return (1 + math.cos(math.pi * done)) / 2


class Heads:
    """L linear classifiers with learning rates of their own that see the same batches; weight [L,
    C, D], bias [L, C].

    They start at zero. differs: the papers' code draws the weights; the problem is convex, and a
    fixed start makes the rates comparable and the result independent of the numbers of classes.
    """

    def __init__(self, rates: Tensor, classes: int, width: int, recipe: Sgd) -> None:
        """`rates` [L] sets device and dtype."""
        self.rates, self.recipe = rates, recipe
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
        """One step of torch.optim.SGD on the mean cross-entropy, at `share` of each head's rate.

        One matrix product forward and one backward serve all heads: the gradient of cross-entropy
        is softmax - one-hot.
        """
        error = self.logits(x).softmax(1)  # [L, C, B]
        error[:, labels, torch.arange(len(x), device=x.device)] -= 1
        error /= len(x)

        gradients = ((error.flatten(0, 1) @ x).view_as(self.weight), error.sum(2))
        rates, recipe = self.rates * share, self.recipe
        for tensor, moving, gradient in zip(
            (self.weight, self.bias), self._moving, gradients, strict=True
        ):
            if recipe.weight_decay:
                gradient = gradient.add(tensor, alpha=recipe.weight_decay)

            moving.mul_(recipe.momentum).add_(gradient)
            step = gradient + recipe.momentum * moving if recipe.nesterov else moving
            tensor.sub_(step * rates.view(-1, *[1] * (tensor.ndim - 1)))

    def ranks(self, x: Tensor, labels: Tensor) -> Tensor:
        """Places of the true class, [L, N] int64 on the CPU, as in scores.ranks."""
        parts = []
        for rows, truth in zip(x.split(ROWS), labels.split(ROWS), strict=True):
            truth = truth.to(self.bias.device)
            places = [ranks(one, truth) for one in self.logits(rows.to(self.bias)).mT]
            parts.append(torch.stack(places).cpu())

        return torch.cat(parts, 1)

    def scores(self, x: Tensor, number: int) -> Tensor:
        """Class scores [N, C] of one head, on the CPU."""
        parts = (self.logits(rows.to(self.bias))[number].T.cpu() for rows in x.split(ROWS))
        return torch.cat(list(parts))


def fit(
    batches: Iterable[tuple[Tensor, ...]],
    steps: int,
    classes: int,
    rates: Sequence[float],
    recipe: Sgd,
) -> Heads:
    """Train a head for each learning rate on the first `steps` >= 1 batches of (features [B, D],
    labels [B]), on the device of the features.
    """
    heads: Heads | None = None

    for step, (x, labels) in zip(range(steps), batches, strict=False):
        if heads is None:
            heads = Heads(torch.tensor(rates, device=x.device), classes, x.shape[1], recipe)
        heads.step(x, labels.to(x.device), recipe.share(step, steps))

    assert heads is not None, "steps is at least 1 and the batches do not end"
    return heads


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
    """Endless batches of (features, labels) drawn from `rows`, each epoch in a new keyed order, on
    the device of the features.
    """

    def epochs() -> Iterator[tuple[Tensor]]:
        epoch = 0
        while True:
            yield (rows[rng.permutation(len(rows), seed, "linear", epoch)],)
            epoch += 1

    for (picked,) in carve(epochs(), batch):
        yield x.index_select(0, picked.to(x.device)), labels.index_select(0, picked)
