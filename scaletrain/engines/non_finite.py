"""Names the rank and the samples behind a loss or gradient that is not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scaletrain import dist
from scaletrain.core import Batch, Clock, MethodOutput

log = logging.getLogger("scaletrain")
# Samples that a warning lists per rank.
LISTED = 16


def total_loss(out: MethodOutput) -> Tensor:
    """The sum of a method's losses."""
    return torch.stack(list(out.losses.values())).sum()


def report(
    batch: Batch, clock: Clock, outs: Sequence[MethodOutput], name: Callable[[int], str]
) -> None:
    """Log the ranks and samples that a skipped step is due to. Every rank calls it.

    outs: the outputs of this rank's micro-batches. name: what the data calls a sample.
    """
    bad = ~torch.stack([total_loss(out) for out in outs]).isfinite().all()
    ranks = dist.gather_objects((bool(bad), _suspects(batch, outs, name)))
    # Where every loss is finite the gradient is not, and averaging has spread it: any rank may be
    # its origin.
    what = "loss" if any(is_bad for is_bad, _ in ranks) else "gradient"

    for rank, (is_bad, samples) in enumerate(ranks):
        if dist.main() and (is_bad or what == "gradient"):
            log.warning(
                "step %d skipped: the %s of rank %d is not finite; samples %s",
                clock.step,
                what,
                rank,
                samples,
            )


def _suspects(batch: Batch, outs: Sequence[MethodOutput], name: Callable[[int], str]) -> str:
    """The samples whose pixels, or else whose embeddings, are not finite; all samples if neither
    singles any out.

    Pixels come first, since batch norm spreads a bad sample to the embeddings of all.
    """
    checks = [torch.stack([v.flatten(2).isfinite().all(2).all(0) for v in batch.views]).all(0)]
    if rows := [out.embedding for out in outs if out.embedding is not None]:
        checks.append(torch.cat(rows).flatten(1).isfinite().all(1))

    chosen = next(
        (
            batch.index[~fine]
            for fine in checks
            if len(fine) == len(batch) and fine.any() and not fine.all()
        ),
        batch.index,
    )
    rest = f" and {len(chosen) - LISTED} more" if len(chosen) > LISTED else ""

    return ", ".join(map(name, chosen[:LISTED].tolist())) + rest
