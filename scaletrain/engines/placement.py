"""The part of each named tensor that lies on this rank, and how checkpoints are written from these
parts and read back, whatever the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from scaletrain import dist
from scaletrain.core import DeferredState, Method, Piece

# How the names of the online probe's tensors in a checkpoint begin. They are no part of the state
# of a method or an engine, which is restored with and without them.
PROBE = "probe."


class TrainingError(ValueError):
    """Training cannot continue; the text says why and what to look at."""


class SavedTensors(Protocol):
    """A checkpoint to restore from, whatever engine and world size wrote it."""

    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Shard:
    """This rank's part of a named tensor: elements [start, start + numel) of the whole in row-major
    order.

    `tensor` may have any shape and memory layout, and is empty where no element lies on this rank.
    The same range lies on `copies` ranks, of which this one is number `copy`; one of them writes it
    to a checkpoint.
    """

    tensor: Tensor
    start: int
    # Shape of the whole tensor.
    shape: tuple[int, ...]
    copy: int = 0
    copies: int = 1

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()

    @torch.no_grad()
    def fill(self, part: Tensor) -> None:
        """Write this rank's elements, given in their order."""
        self.tensor.copy_(part.view(self.tensor.shape))


def replica(tensor: Tensor) -> Shard:
    """The shard of a tensor that lies in full on every rank."""
    return Shard(tensor, 0, tuple(tensor.shape), dist.rank(), dist.world())


def rows_of(tensor: Tensor, start: int, rows: int) -> Shard:
    """The shard of a tensor that is rows [start, start + len(tensor)) of a whole of `rows` rows."""
    width = tensor[0].numel() if len(tensor) else 1
    return Shard(tensor, start * width, (rows, *tensor.shape[1:]))


@torch.no_grad()
def whole(shard: Shard) -> Tensor:
    """The whole tensor on every rank. All ranks call it together."""
    flat = shard.tensor.new_zeros(torch.Size(shard.shape).numel())
    # All other ranks add zeros there, so the sum is exact.
    if shard.copy == 0:
        flat[shard.start : shard.stop] = shard.tensor.reshape(-1)

    return dist.sum_nograd(flat).view(shard.shape)


def pieces(placed: Mapping[str, Shard]) -> dict[str, Piece]:
    """This rank's pieces of a checkpoint; over all ranks the pieces tile every tensor exactly."""
    size = {
        name: torch.Size(shard.shape).numel() * shard.tensor.itemsize
        for name, shard in placed.items()
    }
    total, seen, result = max(1, sum(size.values())), 0, {}

    # Each tensor with copies is written by one rank; the bytes are spread evenly over ranks.
    for name, shard in placed.items():
        if seen * shard.copies // total == shard.copy:
            result[name] = Piece(shard.tensor.detach().reshape(-1), shard.start, shard.shape)
        seen += size[name]

    return result


def fill(placed: Mapping[str, Shard], saved: SavedTensors, prefix: str = "") -> None:
    """Read all tensors from a checkpoint. Raises TrainingError where names or shapes differ.

    prefix: only tensors with such names are asked for, and others in the checkpoint are ignored, as
    those of the online probe always are.
    """
    names = (name for name in saved.names() if not name.startswith(PROBE))
    available = {name for name in names if name.startswith(prefix)}

    for name, shard in placed.items():
        if name not in available or tuple(saved.shape(name)) != shard.shape:
            what = f"has shape {tuple(saved.shape(name))}" if name in available else "is missing"
            raise TrainingError(
                f"this checkpoint belongs to another model: {name} {what} and must have shape "
                f"{shard.shape}"
            )

        if shard.tensor.numel():
            shard.fill(saved.read(name, shard.start, shard.stop))

    if extra := sorted(available - set(placed)):
        raise TrainingError(
            f"this checkpoint belongs to another model: it also has {', '.join(extra[:3])}"
        )


def freeze(method: Method) -> None:
    """Exclude targets and constant modules from the optimisation, and set the latter to evaluation
    mode.
    """
    for name in (*method.targets, *method.constant):
        method.get_submodule(name).requires_grad_(False)

    method.train(method.training)


# --- which tensors are saved ----------------------------------------------------------------------


def method_shards(method: Method, shards: Mapping[str, Shard]) -> dict[str, Shard]:
    """The shards of a method's parameters and buffers by their names in a checkpoint, without
    constant modules.

    shards: those of the parameters; what is not in it lies in full on every rank, except the rows
    that a DeferredState declares as sharded.
    """
    modules = ((n, m) for n, m in method.named_modules() if isinstance(m, DeferredState))
    rows = {f"{n}.{buffer}": where for n, m in modules for buffer, where in m.sharded().items()}
    constant = tuple(f"{name}." for name in method.constant)
    result = {}

    for name, tensor in method.state_dict(keep_vars=True).items():
        if not name.startswith(constant):
            plain = rows_of(tensor, *rows[name]) if name in rows else replica(tensor)
            result[f"method.{name}"] = shards.get(name, plain)

    return result


def optimizer_shards(
    optimizer: torch.optim.Optimizer, shards: Mapping[str, Shard]
) -> dict[str, Shard]:
    """The shards of an optimizer's state, by their names in a checkpoint."""
    result = {}

    for name, parameter in named_parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                # AdamW's step counter is a single number for each parameter.
                shard = replica(value) if key == "step" else replace(shards[name], tensor=value)
                result[f"optim.{name}.{key}"] = shard

    return result


def create_optimizer_state(optimizer: torch.optim.Optimizer, saved: SavedTensors) -> None:
    """Make room in the optimizer for the state in a checkpoint. Raises TrainingError where that is
    another optimizer's.
    """
    kept = (
        {"step", "exp_avg", "exp_avg_sq"}
        if isinstance(optimizer, torch.optim.AdamW)
        else {"momentum_buffer"}
    )
    if other := {n.rpartition(".")[2] for n in saved.names() if n.startswith("optim.")} - kept:
        raise TrainingError(
            f"this checkpoint has the state of another optimizer ({', '.join(sorted(other))}): "
            "keep optim.name, or export the encoder and start a new run with --init"
        )

    for name, parameter in named_parameters(optimizer):
        prefix = f"optim.{name}."
        optimizer.state[parameter].update(
            {
                key.removeprefix(prefix): _empty_state(key, parameter)
                for key in saved.names()
                if key.startswith(prefix)
            }
        )


def _empty_state(key: str, parameter: Tensor) -> Tensor:
    # AdamW keeps its step counter on the CPU.
    return (
        torch.empty((), dtype=torch.float32)
        if key.endswith(".step")
        else torch.empty_like(parameter)
    )


def named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)
