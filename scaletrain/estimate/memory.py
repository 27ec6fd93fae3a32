"""Memory of a rank with each engine, predicted from how the libraries shard state. Nothing is
allocated.

The estimate is for the moment between forward and backward, when activations are largest, with
gradients allocated. Temporaries come on top: a unit that is being gathered, workspace of
convolutions, activations of a recomputed stage. Where shares differ, it is for the largest one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from scaletrain.config.schema import Config, OptimConfig
from scaletrain.core import Method
from scaletrain.engines import deepspeed, fsdp2
from scaletrain.engines.config import EngineConfig
from scaletrain.estimate import comm, model
from scaletrain.optim import groups
from scaletrain.runtime import tables

KINDS = {
    "parameters": "trained parameters, their masters, and full copies of small ones",
    "gathered": "full parameters that are kept for backward",
    "gradients": "at the end of backward",
    "optimizer": "momentum and the like",
    "frozen": "moving averages and constant modules",
    "buckets": "in which gradients are collected to be sent",
    "buffers": "running statistics, queues and memories",
    "activations": "what autograd keeps of a micro-batch, the images included",
}
# do not depend on the engine
COMMON = ("buffers", "activations")
SHORT = {"parameters": "params", "gradients": "grads", "optimizer": "optim"}
# DeepSpeed's defaults, in elements
ZERO_3 = {"param_persistence_threshold": 1e5, "max_reuse_distance": 1e9}
Elements = dict[str, int]


class _Parameters:
    """The parameters of a method: trained ones in the optimizer's order, and frozen ones."""

    def __init__(self, method: Method, optim: OptimConfig) -> None:
        declared = groups.parameter_groups(method, optim)
        self.trained: list[Tensor] = [p for group in declared for p in group["params"]]
        self.frozen: list[Tensor] = [p for p in method.parameters() if not p.requires_grad]
        self.units = {id(p) for unit in fsdp2.units(method) for p in unit.parameters()}
        self.root = [p for p in method.parameters() if id(p) not in self.units]


def replicated(p: _Parameters) -> Elements:
    """ddp, and ZeRO 0."""
    n = _total(p.trained)
    return {"parameters": n, "gradients": n, "optimizer": n, "frozen": _total(p.frozen)}


def row_shards(p: _Parameters, shards: int, reshard: bool) -> Elements:
    """fsdp2: every parameter cut along its first dimension. Its root stays gathered until backward,
    units unless resharded.

    With engine.offload, parameters, gradients and optimizer state are in host memory.
    """

    def elements(x: Tensor) -> int:
        return -(-len(x) // shards) * (x.numel() // len(x))

    n = _total(p.trained, elements)
    kept = [*p.root, *(x for x in p.trained if id(x) in p.units and not reshard)]
    # padded to equal rows
    whole = shards * _total(kept, elements) if shards > 1 else 0
    return {
        "parameters": n,
        "gradients": n,
        "optimizer": n,
        "frozen": _total(p.frozen, elements),
        "gathered": whole,
    }


def flat_partition(p: _Parameters, ranks: int, stage: int, bucket: int) -> Elements:
    """ZeRO 1 and 2: one flat buffer, padded to 2 elements a rank; its parts are copied to masters.
    Frozen parameters are replicas.

    Stage 1 reduces the whole gradient after backward, stage 2 bucket by bucket into this rank's
    part.
    """
    n = math.ceil(_total(p.trained) / (2 * ranks)) * 2 * ranks
    part = n // ranks
    whole = _total(p.trained) if stage == 1 else part

    return {
        "parameters": n + part,
        "gradients": whole,
        "optimizer": min(part, _total(p.trained)),
        "frozen": _total(p.frozen),
        "buckets": bucket,
    }


def parameter_partition(
    p: _Parameters, ranks: int, small: int, reuse: int, bucket: int
) -> Elements:
    """ZeRO 3: every parameter in equal parts, with a master of the trained ones; up to `small`
    elements it stays whole too.

    Others stay whole from forward to backward if less than `reuse` elements are used in between.
    """

    def part(x: Tensor) -> int:
        return -(-x.numel() // ranks)

    def whole(parameters: list[Tensor]) -> int:
        return _total(x for x in parameters if x.numel() <= small) if ranks > 1 else 0

    n = _total(p.trained, part)
    return {
        "parameters": 2 * n + whole(p.trained),
        "gathered": _total(p.trained) - whole(p.trained)
        if ranks > 1 and reuse > 2 * _total(p.trained)
        else 0,
        "gradients": n,
        "optimizer": n,
        "frozen": _total(p.frozen, part) + whole(p.frozen),
        "buckets": bucket,
    }


def whole_parameters(p: _Parameters, ranks: int) -> Elements:
    """fairscale's OSS: each parameter goes to the rank that has least, which keeps its gradient and
    optimizer state.
    """
    load = [0] * ranks

    for x in p.trained:
        load[load.index(min(load))] += x.numel()

    return {
        "parameters": _total(p.trained),
        "gradients": max(load),
        "optimizer": max(load),
        "frozen": _total(p.frozen),
    }


def _total(parameters: Iterable[Tensor], elements: Callable[[Tensor], int] = Tensor.numel) -> int:
    return sum(map(elements, parameters))


def measure(config: Config, ranks: int) -> dict[str, Any]:
    """Bytes of a rank by engine and kind, as plain numbers, for the recipe's batch, precision,
    recomputation and optimizer.

    Options of an engine are the recipe's where it names that engine, and the defaults elsewhere.
    Raises ConfigError.
    """
    rows = comm.divided(config, ranks)
    engine = config.engine

    assert isinstance(engine, EngineConfig)
    # of unequal parts of a memory the last is largest
    with comm.mirrored(ranks, ranks - 1), model.fake(config) as method:
        _, activations = model.forward(
            method, model.fake_batch(config, rows // engine.grad_accum_steps), engine
        )
        buffers = sum(b.nbytes for b in method.buffers())
        p = _Parameters(method, config.optim)
        found = {
            name: _bytes(elements, config, len(p.trained))
            for name, elements in _engines(p, config, ranks)
        }

    common = dict(zip(COMMON, (buffers, activations), strict=True))
    return {
        "method": config.method.name,
        "model": config.model.name,
        "precision": engine.precision,
        "ranks": ranks,
        "batch": config.batch,
        "samples_per_rank": rows,
        "engines": {
            name: {kind: (elements | common).get(kind, 0) for kind in KINDS}
            for name, elements in found.items()
        },
    }


def _engines(p: _Parameters, config: Config, ranks: int) -> Iterator[tuple[str, Elements]]:
    engine = config.engine
    sharded = engine if isinstance(engine, fsdp2.Config) else fsdp2.Config(name="fsdp2")
    # without DeepSpeed's checks, one of which is that it is installed
    zero = (
        engine
        if isinstance(engine, deepspeed.Config)
        else deepspeed.Config.model_construct(name="deepspeed")
    )
    shards = ranks // fsdp2.copies(sharded.replicate)
    settings = zero.settings()["zero_optimization"]

    small, reuse = (int(settings.get(f"stage3_{key}", default)) for key, default in ZERO_3.items())
    bucket = settings["reduce_bucket_size"]
    yield "ddp", replicated(p)
    yield "fsdp2", row_shards(p, shards, reshard=True)
    yield "fsdp2 whole", row_shards(p, shards, reshard=False)

    if config.engine.precision != "fp64":  # type: ignore[attr-defined]
        yield "zero 0", replicated(p)
        yield "zero 1", flat_partition(p, ranks, 1, bucket)
        yield "zero 2", flat_partition(p, ranks, 2, bucket)
        yield "zero 3", parameter_partition(p, ranks, small, reuse, bucket)

    yield "fairscale", whole_parameters(p, ranks)


def _bytes(elements: Elements, config: Config, parameters: int) -> dict[str, int]:
    size, adamw = torch.get_default_dtype().itemsize, config.optim.name == "adamw"
    states = 2 if adamw else int(config.optim.momentum > 0)
    found = {
        kind: n * size * (states if kind == "optimizer" else 1) for kind, n in elements.items()
    }
    # a step counter for each, on every rank
    return found | {"optimizer": found["optimizer"] + 4 * parameters * adamw}


def show(found: dict[str, Any]) -> None:
    """Print what measure() found as a table."""
    about = ", ".join((found["method"], found["model"], found["precision"]))
    each = tables.plural(found["samples_per_rank"], "sample")
    common = next(iter(found["engines"].values()))
    own = [kind for kind in KINDS if kind not in COMMON]
    rows = [
        (
            name,
            *(f"{elements[kind] / 1e9:,.3f}" for kind in own),
            f"{sum(elements.values()) / 1e9:,.3f}",
        )
        for name, elements in found["engines"].items()
    ]

    tables.show(
        ("engine", *(SHORT.get(kind, kind) for kind in own), "all"),
        rows,
        title=f"{about}: GB of each of {tables.plural(found['ranks'], 'rank')}, {each} each",
        notes=(
            f"in all of them: {', '.join(f'{kind} {common[kind] / 1e9:,.3f}' for kind in COMMON)}",
            "fsdp2 whole is engine.reshard=false; zero 2 is engine.name=deepspeed engine.stage=2",
        ),
    )
