"""The loss of classifiers that see several views of each labelled sample."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from scaletrain.ops.precision import full_precision


@full_precision
def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[V, B, classes], [B] -> cross entropy and share of right answers, means over views and
    samples.
    """
    accuracy = (logits.detach().argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))), accuracy
