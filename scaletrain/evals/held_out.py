"""The training images that choose a setting where a dataset has no official validation images."""

from __future__ import annotations

import torch
from torch import Tensor

from scaletrain import rng
from scaletrain.evals.errors import EvalError

# BYOL holds out this many of ImageNet's training images (appendix D.1).
MOST = 10_009


def held_out(
    samples: int, labels: Tensor | None = None, *, count: int = 0, per_class: int = 0
) -> Tensor:
    """Sample numbers [H] of the held-out images, those of the smallest hash, ascending.

    H is `count`, or min(10,009, a tenth); with `per_class`, that many of each class. The list
    depends on the number of samples and on labels only, never on a seed, a rank or the order of
    reading. With `labels` [samples], every class keeps the image of its largest hash for the
    training: with few images a tenth could be all of a class. Raises EvalError where nothing is
    left for the one or the other.
    """
    if samples < 2 or count >= samples:
        raise EvalError(
            f"{samples} training image(s) cannot be split into a training and a held-out part"
            + (f" of {count}" if count else "")
        )

    order = rng.hash64("linear held-out", torch.arange(samples)).argsort(stable=True)
    if labels is not None:
        order = order[_occurs_later(labels[order])]
        if not len(order):
            raise EvalError(
                "there is one image per class, which cannot be split into a training and a "
                "held-out part; take at least two per class, or evaluate with knn"
            )
        if count > len(order):
            raise EvalError(
                f"{count} of {samples} training images of {samples - len(order)} classes cannot be "
                "held out, since one of each class is kept for the training; give a smaller "
                "held_out in the descriptor of the dataset"
            )

    if per_class:
        assert labels is not None, "a number per class needs the classes"
        return order[_earlier(labels[order]) < per_class].sort().values

    return order[: count or max(1, min(MOST, samples // 10))].sort().values


def _occurs_later(values: Tensor) -> Tensor:
    """[N] bool: the same value comes again in `values` [N]."""
    last = torch.full((int(values.max()) + 1,), -1).scatter_reduce(
        0, values, torch.arange(len(values)), "amax"
    )
    return last[values] > torch.arange(len(values))


def _earlier(values: Tensor) -> Tensor:
    """[N] int64: how often the same value comes before in `values` [N]."""
    order = values.argsort(stable=True)
    ordered = values[order]
    starts = torch.searchsorted(ordered, ordered)

    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(values)) - starts)
