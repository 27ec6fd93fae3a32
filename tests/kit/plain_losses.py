"""The papers' losses once more: float64, one sample at a time, written from the formulas and from
nothing else.

Embeddings are lists: views of samples of vectors. Only sums, products, exp and log are used, so
that autograd through these loops gives the gradient that the fast code must have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

Rows = Sequence[Tensor]  # one vector per sample
Views = Sequence[Rows]


def unit(v: Tensor) -> Tensor:
    return v / (v * v).sum().sqrt()


def cos(a: Tensor, b: Tensor) -> Tensor:
    return (unit(a) * unit(b)).sum()


def mean(values: Iterable[Tensor]) -> Tensor:
    found = list(values)
    return sum(found, torch.zeros((), dtype=torch.float64)) / max(1, len(found))


# --- networks -------------------------------------------------------------------------------------


def head(layers: Iterable[nn.Module], rows: Rows) -> list[Tensor]:
    """A stack of dense, batch-norm (statistics over exactly these rows) and ReLU layers."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            shift = 0.0 if layer.bias is None else layer.bias
            rows = [layer.weight @ x + shift for x in rows]
        elif isinstance(layer, nn.ReLU):
            rows = [torch.where(x > 0, x, torch.zeros_like(x)) for x in rows]
        else:
            rows = norm(rows, layer.weight, layer.bias)  # type: ignore[arg-type]
    return list(rows)


def norm(rows: Rows, gamma: Tensor | None, beta: Tensor | None) -> list[Tensor]:
    middle = mean(rows)
    variance = mean((x - middle) * (x - middle) for x in rows)
    rows = [(x - middle) / (variance + 1e-5).sqrt() for x in rows]
    return [(x if gamma is None else x * gamma) + (0.0 if beta is None else beta) for x in rows]


# --- losses ---------------------------------------------------------------------------------------


def byol(q: Views, z: Views) -> Tensor:
    """BYOL, eq. 2: |n(q1) - sg n(z2)|^2 + |n(q2) - sg n(z1)|^2, mean over the batch."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        difference = unit(a) - unit(b).detach()
        return (difference * difference).sum()

    return mean(distance(q[0][n], z[1][n]) + distance(q[1][n], z[0][n]) for n in range(len(q[0])))


def nt_xent(a: Rows, b: Rows, temperature: float) -> Tensor:
    """SimCLR, eq. 1: each of the 2B embeddings finds its partner among the 2B - 1 others; the two
    directions are summed.
    """

    def direction(x: Rows, y: Rows) -> Tensor:
        losses = []
        for i in range(len(x)):
            partner = torch.exp(cos(x[i], y[i]) / temperature)
            other = [
                torch.exp(cos(x[i], rows[j]) / temperature)
                for rows in (x, y)
                for j in range(len(x))
                if j != i
            ]
            losses.append(-torch.log(partner / sum(other, partner)))
        return mean(losses)

    return direction(a, b) + direction(b, a)


def sinkhorn(
    scores: Sequence[Sequence[float]], epsilon: float, iterations: int
) -> list[list[float]]:
    """SwAV, listing 1; scores [samples][prototypes]. Q is K x B: rows to 1/K, then columns to 1/B,
    in turns; then times B.
    """
    samples, prototypes = len(scores), len(scores[0])
    q = [[math.exp(scores[n][k] / epsilon) for n in range(samples)] for k in range(prototypes)]
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        q = [[x / sum(row) / prototypes for x in row] for row in q]
        columns = [sum(row[n] for row in q) for n in range(samples)]
        q = [[row[n] / columns[n] / samples for n in range(samples)] for row in q]
    return [[q[k][n] * samples for k in range(prototypes)] for n in range(samples)]


def log_softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    total = sum((torch.exp(x) for x in logits), torch.zeros((), dtype=torch.float64))
    return [x - torch.log(total) for x in logits]


def swav(
    z: Views,
    prototypes: Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    past: Sequence[Rows] = ((), ()),
) -> Tensor:
    """SwAV, eq. 2 over all crops. past: normalised embeddings in the queue of each assigned view,
    in front of the batch's.
    """
    losses = []
    for i in range(2):
        rows = [*past[i], *(unit(x) for x in z[i])]
        scores = [[(x * c).sum().item() for c in prototypes] for x in rows]
        codes = sinkhorn(scores, epsilon, iterations)[len(past[i]) :]
        for v in range(len(z)):
            if v != i:
                for n, code in enumerate(codes):
                    log_p = log_softmax(
                        [(unit(z[v][n]) * c).sum() / temperature for c in prototypes]
                    )
                    losses.append(
                        -sum(
                            (q * p for q, p in zip(code, log_p, strict=True)),
                            torch.zeros((), dtype=torch.float64),
                        )
                    )
    return mean(losses)


def deepcluster(
    z: Views, prototypes: Sequence[Tensor], labels: Sequence[Sequence[int]], temperature: float
) -> Tensor:
    """DeepCluster v2: cross entropy of every crop with its sample's cluster, mean over known
    samples, then over heads.
    """
    heads = []
    for h, centroids in enumerate(prototypes):
        known = [
            (view[n], labels[n][h]) for view in z for n in range(len(view)) if labels[n][h] >= 0
        ]
        heads.append(
            mean(
                -log_softmax([(unit(x) * c).sum() / temperature for c in centroids])[y]
                for x, y in known
            )
        )
    return mean(heads)


def relicv2(
    online: Views,
    target: Views,
    negatives: Sequence[Sequence[int]],
    temperature: float,
    *,
    same_view: bool = True,
) -> tuple[Tensor, Tensor]:
    """ReLICv2, equations 1 and 2 over all pairs of equation 4 -> (contrastive, invariance), both
    means over pairs and samples.

    p: the online embedding against the target's positive and negatives. q: the target's embedding
    against the online positive and the online embeddings of the same negatives. The divergence is
    KL(p || sg q).
    """
    contrast, invariance = [], []
    for i, o in enumerate(online):
        for j, t in enumerate(target):
            if i == j and not same_view:
                continue
            for n, others in enumerate(negatives):
                p = log_softmax([cos(o[n], t[m].detach()) / temperature for m in (n, *others)])
                q = log_softmax([cos(t[n], o[m]).detach() / temperature for m in (n, *others)])
                contrast.append(-p[0])
                pairs = [torch.exp(a) * (a - b) for a, b in zip(p, q, strict=True)]
                invariance.append(sum(pairs, torch.zeros((), dtype=torch.float64)))
    return mean(contrast), mean(invariance)
