"""Gradient caching (Gao et al., 2021, arXiv 2101.06983): the exact gradient of a loss over the
whole batch in the memory of a micro-batch.

1. Every micro-batch is embedded without gradient.
2. The loss of all embeddings, over all ranks, gives the gradient of each embedding.
3. Every micro-batch is embedded again, and these gradients are propagated to the parameters.

It costs a second forward pass. It is exact where a micro-batch is normalised by itself, which
`model.norm_group` must ensure.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config
from scaletrain.core import Batch, Clock, DeferredState, Method, MethodOutput
from scaletrain.runtime.timing import BACKWARD, FORWARD, span


class MicroBatchEngine(Protocol):
    """The part of an engine that gradient caching uses."""

    method: Method
    staged: list[DeferredState]

    def autocast(self) -> AbstractContextManager[Any]: ...

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput: ...

    def accumulate(self, parts: Sequence[Batch], clock: Clock, scale: float) -> object: ...


def check(run: Config, parts: int, cache: bool) -> None:
    """Raise ConfigError where a step of `parts` micro-batches would not compute what a step of the
    whole batch does.
    """
    if parts == 1 and cache:
        raise ConfigError(
            "engine.gradient_cache=true works on micro-batches: set engine.grad_accum_steps above "
            "1, or engine.gradient_cache=false"
        )
    if parts == 1:
        return

    name, group = run.method.name, run.model.norm_group
    method: type[Method] = importlib.import_module(f"scaletrain.methods.{name}").Model
    possible = method.embed is not Method.embed and not method.separate_losses
    if cache and not method.global_loss:
        raise ConfigError(
            f"engine.grad_accum_steps is exact for {name}, whose loss is a mean over samples: set "
            "engine.gradient_cache=false"
        )
    if cache and run.auxiliaries:
        raise ConfigError(
            "engine.gradient_cache=true computes the method's own loss only: remove the "
            "auxiliaries, or engine.gradient_cache"
        )

    if method.global_loss and not (cache and possible):
        hint = "set engine.gradient_cache=true (gradient caching), or " if possible else ""
        if cache:
            hint = (
                "engine.gradient_cache=true needs a method that separates embeddings and loss, "
                f"which {name} does not: "
            )

        raise _coupled(name, parts, hint)

    if not group or run.batch % (parts * group):
        raise ConfigError(
            f"engine.grad_accum_steps={parts} with model.norm_group={group} would change the batch "
            "norm: set model.norm_group to a "
            f"divisor of the samples per rank and micro-batch ({run.batch / parts:g} / ranks), or "
            "engine.grad_accum_steps=1"
        )


def check_built(method: Method, parts: int, cache: bool) -> None:
    """As check(), for modules that couple samples in some configurations only: a shuffled batch
    norm, an auxiliary.
    """
    if parts > 1 and method.global_loss and not cache:
        raise _coupled(type(method).__module__.rpartition(".")[2], parts, "")


def _coupled(name: str, parts: int, hint: str) -> ConfigError:
    return ConfigError(
        f"engine.grad_accum_steps={parts}: the loss of {name} couples all samples of the global "
        "batch and changes when it is "
        f"split; {hint}set engine.grad_accum_steps=1 and save memory by "
        "engine.activation_checkpointing=true, more ranks or a smaller batch"
    )


def step(engine: MicroBatchEngine, batch: Batch, parts: list[Batch], clock: Clock) -> MethodOutput:
    """Forward and backward of this rank's `batch` by its micro-batches; returns its losses. Running
    statistics are updated once.
    """
    method, first = engine.method, list[tuple[Tensor, ...]]()

    def keep(part: Batch, clock: Clock) -> MethodOutput:
        first.append(method.embed(part, clock))
        return MethodOutput({"all": first[-1][0].new_zeros(())})

    with _as_forward(method, keep), torch.no_grad(), engine.autocast(), span(FORWARD):
        for part in parts:
            engine.forward(part, clock)

    for module in engine.staged:
        module.discard()

    whole = tuple(
        torch.cat(pieces, 1).requires_grad_(pieces[0].is_floating_point())
        for pieces in zip(*first, strict=True)
    )

    with engine.autocast(), span(FORWARD):
        out = method.loss(whole, batch, clock)

    with span(BACKWARD):
        torch.stack(list(out.losses.values())).sum().backward()

    cached = zip(*(_cut(x.grad, len(parts)) for x in whole), strict=True)

    def pull(part: Batch, clock: Clock) -> MethodOutput:
        """A loss whose gradient with respect to the embeddings is what was cached."""
        pairs = zip(method.embed(part, clock), next(cached), strict=True)
        return MethodOutput(
            {
                "all": torch.stack(
                    [(x * g).sum() for x, g in pairs if g is not None and x.requires_grad]
                ).sum()
            }
        )

    with _as_forward(method, pull):
        engine.accumulate(parts, clock, 1.0)

    return out


def _cut(gradient: Tensor | None, parts: int) -> tuple[Tensor | None, ...]:
    """Split a gradient by samples; None for what the loss does not depend on."""
    return (None,) * parts if gradient is None else gradient.chunk(parts, 1)


@contextmanager
def _as_forward(method: Method, function: Any) -> Iterator[None]:
    """Context in which `function` is the method's forward, so that libraries that wrap the method
    run it as a forward pass.
    """
    method.forward = function  # type: ignore[method-assign]

    try:
        yield
    finally:
        del method.forward
