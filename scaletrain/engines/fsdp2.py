"""torch's fully_shard (FSDP2): each rank keeps a share of the rows of every parameter, gradient,
target and optimizer state.

What is gathered and freed at a time ("a unit") is a stage of an encoder or a head, once for each
size of views. Stems, single layers and bare parameters stay with the root, which is whole from the
beginning of a forward to the end of its backward, so that a method may read them directly.
Elsewhere (in after_step) parameters are DTensors, on which operations along rows need no
communication. Batch norm's statistics and the memories are not sharded here: they are the method's
own business.

bf16 is autocast, as in the other engines, and not FSDP's MixedPrecisionPolicy: that would also
round the batch norms' scales, the inputs of the losses and the targets that forward reads, so that
this engine would no longer compute what the others do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from scaletrain import dist
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Natural
from scaletrain.core import MethodOutput
from scaletrain.engines import base
from scaletrain.engines.config import EngineConfig
from scaletrain.engines.placement import Shard
from scaletrain.nn.stages import channels_last_inputs, networks

P = ParamSpec("P")
T = TypeVar("T")


class Config(EngineConfig):
    reshard: bool = True
    """Free a unit's gathered parameters after its forward pass; false: keep them for backward."""

    replicate: Natural = 0
    """Copies of the sharded state; 0: one per node, where a node has several ranks."""

    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory, where the step runs."""

    @model_validator(mode="after")
    def _eager(self) -> Config:
        if self.compile:
            raise ValueError(
                "what is gathered stage by stage cannot be compiled in one: set compile=false, or "
                "engine.name=ddp"
            )

        return self


class Root(nn.Module):
    """The module that FSDP wraps: its forward runs any function of the method while the root's
    parameters are gathered.
    """

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[T, list[Tensor]]:
        """The result, and again the tensors that backward starts from, since not every torch looks
        for them in dataclasses.
        """
        result = function(*args, **kwargs)
        return result, list(result.losses.values()) if isinstance(result, MethodOutput) else []


class Engine(base.Engine):
    config: Config
    # None for a single process, which has nothing to shard.
    root: Root | None = None

    def use_channels_last(self) -> None:
        # fully_shard needs row-major parameters.
        channels_last_inputs(self.method)

    def wrap(self) -> None:
        if dist.world() == 1:
            return
        if scalars := [name for name, p in self.method.named_parameters() if not p.dim()]:
            raise ConfigError(
                f"engine.name=fsdp2 shards rows, and {scalars[0]} has none: give it shape [1], or "
                "use ddp"
            )

        self.sharded, self.copies = True, copies(self.config.replicate)
        self.shape = (self.copies, dist.world() // self.copies)
        if self.copies > 1:
            mesh = init_device_mesh(self.device.type, self.shape, mesh_dim_names=("copy", "shard"))
        else:
            mesh = init_device_mesh(self.device.type, self.shape[1:])

        offload = (
            CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if self.config.offload
            else OffloadPolicy()
        )
        # Several backward passes over one graph: the parameters that it was built with must stay.
        reshard = self.config.reshard and not self.method.separate_losses

        for unit in units(self.method):
            # A target has no backward pass that would free it.
            target = not any(p.requires_grad for p in unit.parameters())
            fully_shard(
                unit, mesh=mesh, reshard_after_forward=reshard or target, offload_policy=offload
            )

        self.root = Root(self.method)
        fully_shard(self.root, mesh=mesh, reshard_after_forward=False, offload_policy=offload)

    @torch.no_grad()
    def shard(self, name: str, parameter: nn.Parameter) -> Shard:
        if not isinstance(parameter, DTensor):
            return super().shard(name, parameter)

        copy, part = divmod(dist.rank(), self.shape[1])
        # as torch.chunk cuts: the last ranks may have fewer, or none
        rows = -(-len(parameter) // self.shape[1])
        start = min(part * rows, len(parameter)) * (parameter.numel() // len(parameter))
        return Shard(parameter.to_local(), start, tuple(parameter.shape), copy, self.copies)

    @contextmanager
    def synchronised(self, *, last: bool) -> Iterator[None]:
        if isinstance(self.root, FSDPModule):
            self.root.set_requires_gradient_sync(last)
            self.root.set_reshard_after_backward(last or not self.method.separate_losses)
        self.last = last
        yield

    def backward(self, out: MethodOutput, scale: float) -> None:
        if not self.method.separate_losses:
            super().backward(out, scale)
            return

        last = self.last
        for i, (name, loss) in enumerate(out.losses.items(), 1):
            with self.synchronised(last=last and i == len(out.losses)):
                super().backward(MethodOutput({name: loss}), scale)

    @torch.no_grad()
    def collect(self) -> None:
        for name, parameter in self.method.named_parameters():
            if isinstance(parameter, DTensor):
                grad, parameter.grad = parameter.grad, None
                self.shards[name].tensor.grad = (
                    grad.to_local() if isinstance(grad, DTensor) else None
                )

    def inside(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self.root is None:
            return super().inside(function, *args, **kwargs)

        result: T = self.root(function, *args, **kwargs)[0]
        # no backward comes that would free what was gathered
        if not torch.is_grad_enabled():
            for module in self.root.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

        return result

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """As in base.Engine; what a method computes of sharded parameters is a DTensor and is
        written where it lies.
        """
        if isinstance(value, DTensor):
            at = cast(DTensor, self.method.get_parameter(name)).placements
            self.shards[name].fill(value.redistribute(placements=at).to_local())
        else:
            super().write(name, value)


def copies(replicate: int) -> int:
    """How often the sharded state exists. Raises ConfigError where the ranks do not divide."""
    world, local = dist.world(), dist.local_world()
    # links within a node are the fast ones
    if not replicate:
        return world // local if local > 1 and world % local == 0 else 1
    if world % replicate or replicate == world > 1:
        raise ConfigError(
            f"engine.replicate={replicate} must divide the {world} ranks and leave several for "
            "each copy; 0: one copy per node"
        )

    return replicate


def units(method: nn.Module) -> list[nn.Module]:
    """What is gathered and freed as one: the stages of every encoder and the method's heads, which
    are nn.Sequential.
    """
    found = [stage for _, parts in networks(method) for stage in parts]

    for child in method.children():
        heads = child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else (child,)
        found += [
            head
            for head in heads
            if isinstance(head, nn.Sequential) and any(True for _ in head.parameters())
        ]

    return found
