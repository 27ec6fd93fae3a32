"""Methods over a linear encoder, small enough for loops over samples, and the comparison of loss
and gradient.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit import plain_losses as plain
from scaletrain.config.schema import component_config
from scaletrain.core import Batch, Clock, DeferredState, Method, RunInfo

CLOCK = Clock(0, 10, 0, 10)
LARGE = ((4, 2),)  # (pixels, count) per crop size
MULTI = ((4, 3), (2, 2))


class Tiny(nn.Module):
    """A linear encoder of the first 2 x 2 pixels, which remembers its inputs."""

    features = 5

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(12, 5, bias=False)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return self.dense(x[..., :2, :2].flatten(1))  # type: ignore[no-any-return]


def make(name: str, rows: int, views: tuple[tuple[int, int], ...] = LARGE, **options: Any) -> Any:
    config = component_config("methods", name)(name=name, **options)
    torch.manual_seed(3)
    model: Method = importlib.import_module(f"scaletrain.methods.{name}").Model(
        config, Tiny, RunInfo(40, rows, 10, views)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # scales and shifts off their special values
                parameter.uniform_(0.3, 1.2)
    return model.double()


def make_batch(
    rows: int,
    views: tuple[tuple[int, int], ...] = LARGE,
    seed: int = 0,
    masks: Tensor | None = None,
) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = tuple(
        torch.randn(n, rows, 3, size, size, generator=draw, dtype=torch.float64)
        for size, n in views
    )
    pixels = torch.tensor([[-1.0, -2.0, -3.0], [1.0, 2.0, 5.0]], dtype=torch.float64)
    index = torch.arange(seed, seed + rows)
    return Batch(images, index, torch.arange(rows) * 7919 + seed, pixels, masks=masks)


def repeated(batch: Batch) -> Batch:
    """The same batch with one image in every place."""
    return Batch(
        tuple(v[:1, :1].expand_as(v) * 1 for v in batch.views),
        batch.index,
        batch.keys,
        batch.pixel_range,
    )


def encode(backbone: Tiny, views: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """[views][samples] of backbone features, one product at a time."""
    return [
        [backbone.dense.weight @ x[:, :2, :2].reshape(-1) for x in view]
        for size in views
        for view in size
    ]


def shared(layers: Any, views: plain.Views) -> list[list[Tensor]]:
    """A head whose statistics run over all views together."""
    rows = plain.head(layers, [x for view in views for x in view])
    return [rows[i : i + len(views[0])] for i in range(0, len(rows), len(views[0]))]


def agrees(model: Any, loss: Tensor, slow: Tensor) -> None:
    names = [n for n, _ in model.named_parameters() if not n.startswith("target_")]
    parameters = [model.get_parameter(n) for n in names]
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(slow.item(), rel=1e-11, abs=1e-13)
    total = slow + 0 * parameters[0].sum()  # a loss over no sample at all has no graph of its own
    fast, plainly = (
        torch.autograd.grad(x, parameters, allow_unused=True, materialize_grads=True)
        for x in (loss, total)
    )
    for name, a, b in zip(names, fast, plainly, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


def commit(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, DeferredState):
            module.commit()
