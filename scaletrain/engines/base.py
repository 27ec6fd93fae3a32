"""The base class of all engines and the one algorithm of a training step.

A step is: forward and backward (of each micro-batch), agreement on finiteness, clipping, optimizer,
moving average of the targets, commit of the deferred state. A step whose loss or gradient is not
finite changes no state.

Engines differ in how gradients and state are spread over ranks. The optimizer, the moving averages
and the checkpoints use `Engine.shards` only: the part of each parameter on this rank. An engine
that shards sets `sharded`, hands the method to its library in `wrap`, returns this rank's part of a
parameter from `shard`, and puts the gradients there in `collect`. All ranks keep all names in the
same order, so that norms of shards add up in a single all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from scaletrain import dist
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import OptimConfig
from scaletrain.core import Batch, Clock, DeferredState, Method, MethodOutput, Piece, StepResult
from scaletrain.engines import gradient_cache, non_finite
from scaletrain.engines.config import EngineConfig
from scaletrain.engines.non_finite import total_loss
from scaletrain.engines.placement import (
    SavedTensors,
    Shard,
    TrainingError,
    create_optimizer_state,
    fill,
    freeze,
    method_shards,
    optimizer_shards,
    pieces,
    replica,
    whole,
)
from scaletrain.nn import stages
from scaletrain.nn.norm import BatchNorm
from scaletrain.optim import groups
from scaletrain.optim.lars import LARS
from scaletrain.runtime.timing import BACKWARD, FORWARD, UPDATE, span

__all__ = ["Engine", "TrainingError"]

P = ParamSpec("P")
T = TypeVar("T")


class Engine:
    """An engine with replicated parameters; subclasses override what their library does instead."""

    # Whether ranks have different parts of a parameter, so that sums over elements need all ranks.
    sharded = False
    # Number of ranks with the same part.
    copies = 1

    def __init__(
        self, method: Method, config: EngineConfig, optim: OptimConfig, device: torch.device
    ) -> None:
        gradient_cache.check_built(method, config.grad_accum_steps, config.gradient_cache)
        self.config, self.device = config, device
        self.method = method.to(device, torch.float64 if config.precision == "fp64" else None)
        if config.channels_last:
            self.use_channels_last()

        if config.activation_checkpointing:
            stages.recompute(method, config.activation_checkpointing)

        freeze(method)

        if config.compile:
            for child in method.children():
                # memories are not compiled
                if not isinstance(child, (nn.ModuleList, DeferredState)):
                    child.compile(dynamic=False)

        # Declared before wrapping, since a library may leave stubs of the parameters.
        declared = groups.parameter_groups(method, optim)
        self.wrap()
        self.shards = {
            name: self.shard(name, p) for name, p in method.named_parameters(remove_duplicate=False)
        }
        self.optimizer = self.build_optimizer(declared, optim)
        self.staged = [m for m in method.modules() if isinstance(m, DeferredState)]
        self.skipped = 0
        # Rate of the targets' moving average in this step; None without targets.
        self.ema: float | None = None
        # What the data calls a sample, to name bad ones.
        self.sample_name: Callable[[int], str] = str

    # --- one step ---------------------------------------------------------------------------------

    def step(self, batch: Batch, clock: Clock, lr: float, base_lr: float) -> StepResult:
        """One optimizer step on this rank's slice of the global batch; every rank calls it
        together.
        """
        parts = self.micro_batches(batch)
        self.ema = self.method.ema(clock) if self.method.targets else None

        if self.config.gradient_cache:
            outs = [_detached(gradient_cache.step(self, batch, parts, clock))]
        else:
            outs = self.accumulate(parts, clock, 1 / len(parts))

        self.collect()
        groups.drop_frozen(self.optimizer.param_groups, clock.step)
        norm = self.gradient_norm()
        loss, finite = self._agree(torch.stack([total_loss(o) for o in outs]).mean(), norm)

        if finite:
            with span(UPDATE):
                self._apply(clock, norm, lr, base_lr)
        else:
            self._skip(batch, clock, outs)

        self.optimizer.zero_grad(set_to_none=True)
        trust = self._trust() if finite else {}
        reported = [
            {
                **({f"loss_{k}": v for k, v in o.losses.items()} if len(o.losses) > 1 else {}),
                **o.scalars,
            }
            for o in outs
        ]

        scalars = {name: torch.stack([s[name] for s in reported]).mean() for name in reported[0]}
        return StepResult(loss, scalars, norm, trust, outs[-1].embedding, not finite, self.ema)

    def accumulate(self, parts: Sequence[Batch], clock: Clock, scale: float) -> list[MethodOutput]:
        """Forward and backward of each micro-batch, its losses times `scale`."""
        outs = []
        for i, part in enumerate(parts):
            with self.synchronised(last=i == len(parts) - 1), self.autocast(), span(FORWARD):
                out = self.forward(part, clock)
            with self.synchronised(last=i == len(parts) - 1), span(BACKWARD):
                self.backward(out, scale)
            outs.append(_detached(out))

        return outs

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """The micro-batches of a batch. Raises ConfigError if they would change the batch norm."""
        batch = batch.double() if self.config.precision == "fp64" else batch
        parts = (
            batch.split(self.config.grad_accum_steps)
            if self.config.grad_accum_steps > 1
            else [batch]
        )

        norms = [m.group for m in self.staged if isinstance(m, BatchNorm) and m.training]
        if len(parts) > 1 and any(not group or len(parts[0]) % group for group in norms):
            raise ConfigError(
                f"engine.grad_accum_steps={len(parts)} leaves {len(parts[0])} samples per rank and "
                "micro-batch, which would change "
                "the batch norm: set model.norm_group to a divisor of that, or "
                "engine.grad_accum_steps=1"
            )

        return parts

    def _apply(self, clock: Clock, norm: Tensor, lr: float, base_lr: float) -> None:
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.trained(), self.config.max_grad_norm, norm)

        groups.set_rates(self.optimizer.param_groups, lr, base_lr)
        self.optimizer.step()
        self.move_targets()
        for module in self.staged:
            module.commit(self.config.grad_accum_steps)

        self.method.after_step(clock, self.write)
        self.skipped = 0

    def _skip(self, batch: Batch, clock: Clock, outs: Sequence[MethodOutput]) -> None:
        for module in self.staged:
            module.discard()

        self.skipped += 1
        non_finite.report(batch, clock, outs, self.sample_name)

        if self.skipped >= self.config.max_skipped:
            raise TrainingError(
                f"{self.skipped} steps in a row up to step {clock.step} had a loss or gradient "
                f"that is not finite (engine.max_skipped={self.config.max_skipped}). Lower "
                "optim.lr, use engine.precision=fp32, or look at the samples named above; the last "
                "checkpoint is intact"
            )

    def _agree(self, loss: Tensor, norm: Tensor) -> tuple[float, bool]:
        """The global loss, and whether it and the gradient are finite on all ranks: one small
        collective and the step's only device sync.
        """
        finite = (loss.isfinite() & norm.isfinite()).double()
        total, good = (
            dist.sum_nograd(torch.stack([loss.double(), finite])) / dist.world()
        ).tolist()

        return total, good == 1.0

    # --- what engines override --------------------------------------------------------------------

    def use_channels_last(self) -> None:
        self.method.to(memory_format=torch.channels_last)

    def wrap(self) -> None:
        """Hand `self.method` to the library, once its parameter groups are declared."""

    def shard(self, name: str, parameter: nn.Parameter) -> Shard:
        """This rank's part of a parameter of the wrapped method, targets included."""
        return replica(parameter)

    def build_optimizer(
        self, declared: list[groups.ParamGroup], optim: OptimConfig
    ) -> torch.optim.Optimizer:
        """The optimizer over this rank's shards, with the groups and names of all ranks."""
        if self.sharded:
            declared = [
                g | {"params": [self.shards[name].tensor for name in g["names"]]} for g in declared
            ]

        optimizer = groups.build(declared, optim)
        if self.sharded and isinstance(optimizer, LARS):
            optimizer.total = self.total

        return optimizer

    def total(self, x: Tensor) -> Tensor:
        """Turn sums over the elements of shards into sums over parameters, in one all-reduce."""
        return dist.sum_nograd(x) / self.copies if self.sharded else x

    def collect(self) -> None:
        """After the last backward pass, set .grad of every tensor of the optimizer, empty ones too,
        to its part of the mean gradient; None on every rank if the parameter has no gradient.
        """

    def inside(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that uses the method's parameters, which are gathered for it."""
        return function(*args, **kwargs)

    def synchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        """Context of a micro-batch; gradients are reduced over ranks in the last one only."""
        return nullcontext()

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        return self.inside(self.method, batch, clock)  # type: ignore[no-any-return]

    def backward(self, out: MethodOutput, scale: float) -> None:
        if not self.method.separate_losses:
            (total_loss(out) * scale).backward()
            return

        for name, loss in out.losses.items():
            own = [
                self.method.get_parameter(p)
                for g in self.optimizer.param_groups
                if g["name"] == name
                for p in g["names"]
            ]

            if not own:
                raise ValueError(
                    f"the loss '{name}' names no parameter group of {type(self.method).__module__}"
                )

            torch.autograd.backward(loss * scale, inputs=own, retain_graph=True)

    def gradient_norm(self) -> Tensor:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained() if p.grad is not None])
        return self.total(norm.double().square()).sqrt() if self.sharded else norm

    @torch.no_grad()
    def move_targets(self) -> None:
        """target <- ema * target + (1 - ema) * online over parameters; online parameters are those
        after the step.
        """
        if self.ema is None:
            return

        for target, online in self.method.targets.items():
            torch._foreach_lerp_(self.averaged(target), self.averaged(online), 1 - self.ema)

    def averaged(self, module: str) -> list[Tensor]:
        """The tensors of a submodule that the moving average reads and writes, in the same order
        for a target and its online module.
        """
        return [
            self.shards[f"{module}.{name}"].tensor
            for name, _ in self.method.get_submodule(module).named_parameters()
        ]

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Set a parameter (masters and replicas too) or a buffer to the full tensor `value`."""
        shard = self.shards.get(name) or replica(self.method.get_buffer(name))
        shard.fill(value.reshape(-1)[shard.start : shard.stop])

    def state(self) -> dict[str, Piece]:
        """This rank's pieces of a checkpoint; those of all ranks tile every tensor exactly."""
        return pieces(self.placed())

    @torch.no_grad()
    def restore(self, saved: SavedTensors) -> None:
        """Restore all state from a checkpoint of the same method, of any engine and world size."""
        # Optimizers create their state in their first step, which has not happened yet.
        create_optimizer_state(self.optimizer, saved)
        fill(self.placed(), saved)

    @torch.no_grad()
    def export(self, module: str = "backbone") -> dict[str, Tensor]:
        """The full tensors of a submodule on every rank. All ranks call it together."""
        return {
            name: whole(shard) if self.sharded else shard.tensor.detach()
            for name, shard in self.parts_of(module).items()
        }

    def parts_of(self, module: str) -> dict[str, Shard]:
        """This rank's part of every parameter and buffer of a submodule, by its name there."""
        state = self.method.get_submodule(module).state_dict(keep_vars=True)
        return {
            name: self.shards.get(f"{module}.{name}") or replica(tensor)
            for name, tensor in state.items()
        }

    # --- parts ------------------------------------------------------------------------------------

    def rates(self) -> dict[str, float]:
        """The learning rate of each group in the last step."""
        return {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}

    def _trust(self) -> dict[str, Tensor]:
        if not isinstance(self.optimizer, LARS) or not len(self.optimizer.trust):
            return {}
        ratios = self.optimizer.trust
        return {"min": ratios.min(), "median": ratios.median(), "max": ratios.max()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    def trained(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def features(
        self, batches: Iterator[Batch], embed: Callable[[Batch], Tensor], *, training: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (index, embed(batch)) for each batch, without gradient and without changing running
        statistics, which replace those of the batch unless `training`.
        """
        for batch in batches:
            with self.autocast(), nullcontext() if training else _evaluating(self.method):
                out = self.inside(
                    embed, batch.double() if self.config.precision == "fp64" else batch
                )

            for module in self.staged:
                module.discard()

            yield batch.index, out

    def placed(self) -> dict[str, Shard]:
        """This rank's part of every tensor that is saved, by its name in a checkpoint; every rank
        has every name.
        """
        return {
            **method_shards(self.method, self.shards),
            **optimizer_shards(self.optimizer, self.shards),
        }


@contextmanager
def _evaluating(method: nn.Module) -> Iterator[None]:
    """A context in which all modules are in evaluation mode; it then restores each one's mode."""
    training = [module for module in method.modules() if module.training]
    method.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _detached(out: MethodOutput) -> MethodOutput:
    losses, scalars = (
        {name: value.detach() for name, value in values.items()}
        for values in (out.losses, out.scalars)
    )
    return MethodOutput(losses, scalars, out.embedding)
