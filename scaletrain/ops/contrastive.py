"""Similarities and contrastive losses over the global batch. Inputs are this rank's rows;
normalisation happens here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain import dist
from scaletrain.ops.precision import full_precision

# number of similarities that exist at a time: 4 MB of float32, which fit in a CPU's cache
BLOCK = 1 << 20
# on an accelerator, where small kernels cost more than memory
DEVICE_BLOCK = 1 << 24


@full_precision
def cosine_distance(p: Tensor, z: Tensor) -> Tensor:
    """Mean over rows of |p/|p| - z/|z||^2 = 2 - 2 cos (BYOL, eq. 2). [b, D] x [b, D] -> 0-d."""
    return (2 - 2 * F.cosine_similarity(p, z, dim=-1, eps=1e-12)).mean()


@torch.no_grad()
@full_precision
def similarities(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """For the monitor: the mean cosine of a sample's two embeddings, and of two samples' (1 in
    collapse). [n, D] each.
    """
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    own = (a * b).sum()
    others = (a.sum(0) * b.sum(0)).sum() - own
    n = len(a)

    return {"positive_similarity": own / n, "negative_similarity": others / max(1, n * (n - 1))}


@full_precision
def nt_xent(a: Tensor, b: Tensor, temperature: float, classes: Tensor | None = None) -> Tensor:
    """SimCLR's loss (Chen et al., 2020, eq. 1) over the global batch: the *sum* of both directions'
    means, as in its code.

    a, b [b, D]: two views of this rank's samples. Every row has one positive and 2B - 2 negatives.
    classes [b] int64, -1 where unknown: other samples of a row's known class are then none of its
    negatives.
    """
    rows = torch.stack([F.normalize(a, dim=-1), F.normalize(b, dim=-1)], 1).flatten(
        0, 1
    )  # [2b, D], partners side by side

    itself = dist.rank() * len(rows) + torch.arange(len(rows), device=rows.device)
    alike = None
    if classes is not None:
        known = classes.repeat_interleave(2)
        alike = known, dist.gather_nograd(known)

    return 2 * info_nce(rows, dist.gather(rows), itself ^ 1, temperature, itself, alike)


@full_precision
def info_nce(
    rows: Tensor,
    candidates: Tensor,
    positive: Tensor,
    temperature: float,
    excluded: Tensor | None = None,
    alike: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean over rows of -log softmax(rows candidates^T / temperature)[positive] (van den Oord et
    al., 2018, eq. 4). 0-d.

    rows [n, D] and candidates [N, D], float32 or float64, both with gradient; positive and excluded
    [n] int64: the candidate that belongs to a row, and one that does not compete for it; alike
    ([n], [N]) int64: classes of both, -1 where unknown: others of a row's class do not compete
    either. Memory is that of the arguments and gradients: the [n, N] similarities exist in blocks
    of rows, each of which gives its part of the gradient at once, since the loss is a mean.
    """
    wanted = torch.is_grad_enabled() and (rows.requires_grad or candidates.requires_grad)

    return _InfoNCE.apply(rows, candidates, positive, temperature, excluded, alike, wanted)  # type: ignore[no-any-return]


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        candidates: Tensor,
        positive: Tensor,
        temperature: float,
        excluded: Tensor | None,
        alike: tuple[Tensor, Tensor] | None,
        wanted: bool,
    ) -> Tensor:
        x = rows / temperature
        losses = x.new_empty(len(x), 1)
        d_rows, d_candidates = torch.empty_like(x), torch.zeros_like(candidates)
        block = max(16, (BLOCK if x.is_cpu else DEVICE_BLOCK) // len(candidates))
        buffer = x.new_empty(min(block, len(x)), len(candidates))

        for start in range(0, len(x), block):
            part = slice(start, start + block)
            s, column = (
                torch.mm(x[part], candidates.T, out=buffer[: len(x) - start]),
                positive[part, None],
            )
            own = s.gather(1, column)

            s.scatter_(1, column, float("-inf"))
            if excluded is not None:
                s.scatter_(1, excluded[part, None], float("-inf"))

            if alike is not None:
                mine = alike[0][part, None]
                s.masked_fill_((mine == alike[1]) & (mine >= 0), float("-inf"))

            # nothing may be left to compete
            top = s.amax(1, keepdim=True).nan_to_num_(neginf=0.0)
            total = s.sub_(top).exp_().sum(1, keepdim=True)
            # of the positive over all others; -log p = -log sigmoid(lead)
            lead = own - top - total.log()
            losses[part] = -F.logsigmoid(lead)

            if wanted:
                # now the gradient of each logit, up to a factor of the row
                s.scatter_(1, column, -total)
                factor = torch.sigmoid(-lead) / (total.clamp_min(1e-30) * len(x))
                torch.mm(s, candidates, out=d_rows[part]).mul_(factor / temperature)
                d_candidates.addmm_(s.T, x[part] * factor)

        if wanted:
            ctx.save_for_backward(d_rows, d_candidates)

        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, d_candidates = ctx.saved_tensors
        return grad * d_rows, grad * d_candidates, None, None, None, None, None


@full_precision
def key_contrast(
    q: Tensor, k: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE with keys that carry no gradient (MoCo, eq. 1): mean over rows of the cross entropy
    of one key in 1 + K.

    q, k [..., D]: rows and their positive keys, normalised here; negatives [K, D], unit rows. Also:
    how similar rows are to their keys and to the negatives on average, and the share of rows whose
    key is the most similar.
    """
    q, k, negatives = (
        F.normalize(q, dim=-1).flatten(0, -2),
        F.normalize(k.detach(), dim=-1).flatten(0, -2),
        negatives.to(q),
    )

    positive = (q * k).sum(-1, keepdim=True)
    others = q @ negatives.T  # [n, K]
    logits = torch.cat([positive, others], 1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))
    scalars = {
        "positive_similarity": positive.detach().mean(),
        "negative_similarity": q.detach().mean(0) @ negatives.mean(0),
        "contrast_accuracy": (others.detach().amax(1) < positive.detach()[:, 0]).to(q.dtype).mean(),
    }

    return loss, scalars
