"""Methods that predict what was done to an image, against plain transcriptions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from kit import plain_losses as plain
from kit import small
from kit.tiny import CLOCK, LARGE, MULTI, agrees, encode, make, make_batch
from torch import Tensor

from scaletrain.core import Batch

# --- rotation -------------------------------------------------------------------------------------


def authors_turn(image: Tensor, quarters: int) -> Tensor:
    """As dataloader.py of gidariss/FeatureLearningRotNet turns [H, W, 3], by transposing and
    flipping.
    """
    x = image.permute(1, 2, 0).numpy()
    across = np.transpose(x, (1, 0, 2))
    turned = (x, np.flipud(across), np.fliplr(np.flipud(x)), np.transpose(np.flipud(x), (1, 0, 2)))
    return torch.from_numpy(turned[quarters].copy()).permute(2, 0, 1)


def plain_rotation(model: Any, batch: Batch) -> tuple[Tensor, float]:
    """The mean over images, and over their four turns, of -log of the turn's probability
    (equations 2 and 3), and the share of right answers.
    """
    losses, right = [], 0
    for size in batch.views:
        for view in size:
            for image in view:
                for quarters in range(4):
                    turned = authors_turn(image, quarters)
                    h = encode(model.backbone, (turned[None, None],))[0][0]
                    logits = [
                        (w * h).sum() + b
                        for w, b in zip(model.classifier.weight, model.classifier.bias, strict=True)
                    ]
                    losses.append(-plain.log_softmax(logits)[quarters])
                    right += int(torch.stack(logits).argmax()) == quarters
    return torch.stack(losses).sum() / len(losses), right / len(losses)


@pytest.mark.parametrize("views", [((4, 1),), LARGE, MULTI])
@pytest.mark.parametrize("rows", [1, 5])
def test_rotation(rows: int, views: tuple[tuple[int, int], ...]) -> None:
    model, batch = make("rotation", rows, views), make_batch(rows, views)
    out = model(batch, CLOCK)
    loss, accuracy = plain_rotation(model, batch)
    agrees(model, out.losses["all"], loss)
    assert out.scalars["accuracy"].item() == pytest.approx(accuracy)
    upright = torch.stack(encode(model.backbone, batch.views)[0]).detach()
    torch.testing.assert_close(out.embedding, upright)


def test_rotation_of_zero_weights_is_the_logarithm_of_four() -> None:
    model = make("rotation", 3)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    assert model(make_batch(3), CLOCK).losses["all"].item() == pytest.approx(math.log(4))


def test_the_four_turns_share_their_statistics() -> None:
    """One update of the running statistics a step and size, of the mean over all turns."""
    cfg = small.config("rotation", data={"views": [{"size": 16, "count": 1}]})
    engine = small.engine(cfg)
    stem = engine.method.backbone.bn1
    seen: list[Tensor] = []
    stem.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))  # type: ignore[union-attr,operator]
    small.run(engine, cfg, 0, 1)
    assert seen[-1].shape[0] == 4 * cfg.batch
    assert stem.num_batches_tracked == 1
    torch.testing.assert_close(stem.running_mean, 0.1 * seen[-1].mean((0, 2, 3)))
