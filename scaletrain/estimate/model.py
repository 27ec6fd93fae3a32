"""Statistics of a recipe's model: parameters, FLOPs and activation memory of one training step.

The step runs on fake tensors, which have a shape, type and device only, so nothing is computed or
allocated. FLOPs are those of convolutions and matrix products, two for each multiply-add
(torch.utils.flop_counter); norms, activations and pooling are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from scaletrain.config.schema import Config, DataConfig
from scaletrain.core import Batch, Clock, Method, RunInfo
from scaletrain.data.transforms.maps import foreground
from scaletrain.engines.config import EngineConfig
from scaletrain.engines.placement import freeze
from scaletrain.nn import stages
from scaletrain.runtime import tables
from scaletrain.train.build import build_method, run_info_of


class _Decide(TorchDispatchMode):
    """Replaces values that fake tensors do not have: a number is zero (a queue is not yet full), a
    mask selects all rows.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return 0
        # The rows that are sent to each rank.
        if func is aten.bincount.default:
            return torch.zeros(args[2] if len(args) > 2 else kwargs["minlength"], dtype=torch.int64)
        if func is aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64)

        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [row for index in args[1] for row in self._rows(index)], *args[2:])

        return func(*args, **(kwargs or {}))

    @staticmethod
    def _rows(index: Tensor | None) -> list[Tensor | None]:
        """Replace a mask by one index per dimension, with as many rows as the mask has elements."""
        if index is None or index.dtype is not torch.bool:
            return [index]
        return [torch.empty(index.numel(), dtype=torch.int64)] * index.dim()


def measure(config: Config) -> dict[str, Any]:
    """Statistics of a recipe's model, as plain numbers; those of the step are per sample, over all
    views and networks.

    `activations`: bytes that autograd keeps between forward and backward in the recipe's precision,
    including views but not parameters; those of a step divided by the batch.
    """
    engine = config.engine

    assert isinstance(engine, EngineConfig)
    with fake(config) as method:
        batch, views = fake_batch(config, config.batch), []
        for size, count in run_info(config).views:
            views.append(
                {"size": size, "count": count, "flops": _flops(partial(_encode, method, size))}
            )

        found: list[tuple[Tensor, int]] = []
        ahead = _flops(lambda: found.append(forward(method, batch, engine)))
        loss, memory = found[0]
        back = _flops(loss.backward)

    return {
        "method": config.method.name,
        "model": config.model.name,
        "precision": engine.precision,
        "batch": config.batch,
        "parameters": _parameters(method),
        "views": views,
        "step": {
            "forward": ahead // config.batch,
            "backward": back // config.batch,
            "activations": memory // config.batch,
        },
    }


def run_info(config: Config) -> RunInfo:
    samples = max(config.batch, config.data.synthetic_samples)
    return run_info_of(config, samples, max(1, samples // config.batch))


@contextmanager
def fake(config: Config) -> Iterator[Method]:
    """Context with the method of a recipe, as its engine prepares it, on fake tensors."""
    engine = config.engine
    assert isinstance(engine, EngineConfig)
    before = torch.get_default_dtype()

    torch.set_default_dtype(torch.float64 if engine.precision == "fp64" else torch.float32)
    try:
        with FakeTensorMode(), _Decide():  # type: ignore[no-untyped-call]
            method = build_method(config, run_info(config))
            if engine.activation_checkpointing:
                stages.recompute(method, engine.activation_checkpointing)

            freeze(method)
            yield method
    finally:
        torch.set_default_dtype(before)


def maps_of(data: DataConfig, views: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Masks and maps, of ones, for the largest views [V, B, 3, H, W] of a batch."""
    kinds = [item.kind for item in data.all_maps]
    ones = torch.ones_like(views[:, :, :1])
    found = tuple(ones.long() if kind == "classes" else ones for kind in kinds)
    return foreground(found, kinds), found


def fake_batch(config: Config, rows: int) -> Batch:
    """A batch of `rows` samples, with their share of the labelled samples; for use inside
    fake().
    """
    about = run_info(config)
    images = tuple(torch.empty(count, rows, 3, size, size) for size, count in about.views)
    masks, maps = maps_of(config.data, images[0])
    index = torch.empty(rows, dtype=torch.int64)

    batch = Batch(images, index, index, torch.empty(2, 3), labels=index, masks=masks, maps=maps)
    if not about.support:
        return batch

    size, labelled = (
        config.data.views[0].size,
        torch.empty(about.support * rows // config.batch, dtype=torch.int64),
    )
    views = (torch.empty(1, len(labelled), 3, size, size),)

    return replace(
        batch, support=Batch(views, labelled, labelled, batch.pixel_range, labels=labelled)
    )


def forward(method: Method, batch: Batch, engine: EngineConfig) -> tuple[Tensor, int]:
    """The loss, and the bytes that autograd keeps for backward, without parameters and buffers."""
    kept: dict[int, Any] = {}

    with _keeping(kept), torch.autocast("cpu", torch.bfloat16, enabled=engine.precision == "bf16"):
        losses = method(batch, Clock(0, 1, 0, 1)).losses.values()

    own = {t.untyped_storage()._cdata for t in (*method.parameters(), *method.buffers())}
    return torch.stack(list(losses)).sum(), sum(
        storage.nbytes() for key, storage in kept.items() if key not in own
    )


def _encode(method: Method, size: int) -> None:
    """Encode one image of a size."""
    method.backbone.eval()
    with torch.no_grad():
        method.backbone(torch.empty(1, 3, size, size))
    method.backbone.train()


def _flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@contextmanager
def _keeping(kept: dict[int, Any]) -> Iterator[None]:
    """Context that collects the storages that autograd keeps, each once."""

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _parameters(method: Method) -> dict[str, int]:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    targets, constant = (
        sum(count(method.get_submodule(name)) for name in names)
        for names in (method.targets, method.constant)
    )
    encoder = count(method.backbone)
    heads = count(method) - encoder - targets - constant

    return {
        "backbone": encoder,
        "heads": heads,
        "targets": targets,
        **({"constant": constant} if constant else {}),
    }


def show(stats: dict[str, Any]) -> None:
    """Print what measure() found as a table."""
    title = (
        f"{stats['method']}, {stats['model']}, {stats['precision']}, batch {stats['batch']}; "
        "the step is per sample"
    )
    step = stats["step"]
    views = [
        (
            f"encoder, {view['size']} px view",
            f"{view['flops'] / 1e9:,.2f} GFLOPs",
            f"{view['flops'] / 2e9:,.2f} G multiply-adds; x {view['count']}",
        )
        for view in stats["views"]
    ]

    rows = [
        *(
            (f"parameters, {name}", f"{number / 1e6:,.2f} M", "")
            for name, number in stats["parameters"].items()
        ),
        (),
        *views,
        (),
        ("step, forward", f"{step['forward'] / 1e9:,.2f} GFLOPs", "all views, online and target"),
        ("step, backward", f"{step['backward'] / 1e9:,.2f} GFLOPs", "counted, about twice online"),
        ("step, activations", f"{step['activations'] / 1e6:,.1f} MB", "kept for the backward pass"),
    ]

    tables.show(("", "", ""), rows, title=title)
