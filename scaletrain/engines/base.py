"""The engine contract and the one algorithm of a step; engines differ in how gradients and state are spread over ranks.

A step is: forward and backward (of each micro-batch), agreement on finiteness, clipping, optimizer, moving average of the
targets, commit of what was staged. A step whose loss or gradient is not finite leaves no trace in any state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from scaletrain import dist
from scaletrain.config import ConfigError, Count, Leaf, Optim
from scaletrain.core import Batch, Clock, Method, Out, Piece, Result, Staged
from scaletrain.marks import BACKWARD, FORWARD, UPDATE, mark
from scaletrain.nn.norm import BatchNorm
from scaletrain.optim import groups
from scaletrain.optim.lars import LARS

log = logging.getLogger("scaletrain")
NAMED = 16  # samples of a rank and a bad step


class EngineConfig(Leaf):
    """What every engine understands."""

    precision: Literal["fp32", "bf16", "fp64"] = "fp32"  # bf16: autocast over fp32 parameters; fp64: for exactness checks
    channels_last: bool = True
    compile: bool = False  # torch.compile of the backbones and heads, never of Method.forward
    clip: Annotated[float, Field(ge=0.0)] = 0.0  # largest norm of the whole gradient; 0: no clipping
    accumulate: Count = 1  # micro-batches per step
    max_skipped: Count = 3  # stop after so many non-finite steps in a row


class TrainingError(ValueError):
    """Training cannot go on; the text says why and what to look at."""


class Saved(Protocol):
    """A checkpoint to restore from, whatever engine and world size wrote it."""

    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor: ...


class Engine:
    """Replicated parameters; subclasses override what their library does otherwise."""

    def __init__(self, method: Method, config: EngineConfig, optim: Optim, device: torch.device) -> None:
        if config.accumulate > 1 and method.global_loss:
            raise ConfigError(
                f"engine.accumulate={config.accumulate}: the loss of {type(method).__module__.rpartition('.')[2]} couples all "
                "samples of the global batch and changes when it is split; set engine.accumulate=1 and use more ranks or a "
                "smaller batch"
            )
        self.config, self.device = config, device
        self.method = method.to(device, torch.float64 if config.precision == "fp64" else None)
        if config.channels_last:
            self.method.to(memory_format=torch.channels_last)
        for target in method.targets:
            method.get_submodule(target).requires_grad_(False)
        if config.compile:
            for child in method.children():
                if not isinstance(child, (nn.ModuleList, Staged)):  # memories are not compiled
                    child.compile(dynamic=False)
        self.optimizer = groups.build(method, optim)
        self.staged = [m for m in method.modules() if isinstance(m, Staged)]
        self.skipped = 0
        self.sample_name: Callable[[int], str] = str  # what the data calls the sample of a number, to name the bad ones

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, clock: Clock, lr: float, base_lr: float) -> Result:
        """One optimizer step on this rank's slice of the global batch; every rank calls it together."""
        parts = self.micro_batches(batch)
        outs = []
        for i, part in enumerate(parts):
            with self.synchronised(last=i == len(parts) - 1), self.autocast(), mark(FORWARD):
                out = self.forward(part, clock)
            with self.synchronised(last=i == len(parts) - 1), mark(BACKWARD):
                self.backward(out, 1 / len(parts))
            outs.append(Out(_detached(out.losses), _detached(out.scalars), out.embedding))
        groups.drop_frozen(self.optimizer.param_groups, clock.step)
        norm = self.gradient_norm()
        loss, finite = self._agree(torch.stack([_total(o) for o in outs]).mean(), norm)
        if finite:
            with mark(UPDATE):
                self._apply(clock, norm, lr, base_lr)
        else:
            self._skip(batch, clock, outs)
        self.optimizer.zero_grad(set_to_none=True)
        trust = self._trust() if finite else {}
        shown = [{**({f"loss_{k}": v for k, v in o.losses.items()} if len(o.losses) > 1 else {}), **o.scalars} for o in outs]
        scalars = {name: torch.stack([s[name] for s in shown]).mean() for name in shown[0]}
        return Result(loss, scalars, norm, trust, outs[-1].embedding, skipped=not finite)

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """The parts that gradients are accumulated over. Raises ConfigError where that would change the normalisation."""
        batch = batch.double() if self.config.precision == "fp64" else batch
        parts = batch.split(self.config.accumulate) if self.config.accumulate > 1 else [batch]
        norms = [m.group for m in self.staged if isinstance(m, BatchNorm)]
        if len(parts) > 1 and any(not group or len(parts[0]) % group for group in norms):
            raise ConfigError(
                f"engine.accumulate={len(parts)} leaves {len(parts[0])} samples per rank and micro-batch, which would change "
                "the batch norm: set model.norm_group to a divisor of that, or engine.accumulate=1"
            )
        return parts

    def _apply(self, clock: Clock, norm: Tensor, lr: float, base_lr: float) -> None:
        if self.config.clip:
            torch.nn.utils.clip_grads_with_norm_(self.trained(), self.config.clip, norm)
        groups.set_rates(self.optimizer.param_groups, lr, base_lr)
        self.optimizer.step()
        self.move_targets(clock)
        for module in self.staged:
            module.commit(self.config.accumulate)
        self.method.after_step(clock, self.write)
        self.skipped = 0

    def _skip(self, batch: Batch, clock: Clock, outs: Sequence[Out]) -> None:
        for module in self.staged:
            module.discard()
        self.skipped += 1
        bad = ~torch.stack([_total(o) for o in outs]).isfinite().all()
        found = dist.gather_objects((bool(bad), self._suspects(batch, outs)))
        # Where every loss is finite the gradient is not, and averaging has spread it: any rank may be its origin.
        what = "loss" if any(is_bad for is_bad, _ in found) else "gradient"
        for rank, (is_bad, samples) in enumerate(found):
            if dist.main() and (is_bad or what == "gradient"):
                log.warning("step %d skipped: the %s of rank %d is not finite; samples %s", clock.step, what, rank, samples)
        if self.skipped >= self.config.max_skipped:
            raise TrainingError(
                f"{self.skipped} steps in a row up to step {clock.step} had a loss or gradient that is not finite "
                f"(engine.max_skipped={self.config.max_skipped}). Lower optim.lr, use engine.precision=fp32, or look at the "
                "samples named above; the last checkpoint is unharmed"
            )

    def _suspects(self, batch: Batch, outs: Sequence[Out]) -> str:
        """The samples whose pixels, or else whose embeddings, are not finite; all of them if that tells none apart.

        A bad sample spreads through batch norm to the embeddings of all, so pixels are asked first.
        """
        evidence = [torch.stack([v.flatten(2).isfinite().all(2).all(0) for v in batch.views]).all(0)]
        rows = [o.embedding for o in outs if o.embedding is not None]
        if rows:
            evidence.append(torch.cat(rows).flatten(1).isfinite().all(1))
        chosen = next(
            (batch.index[~fine] for fine in evidence if len(fine) == len(batch) and fine.any() and not fine.all()), batch.index
        )
        rest = f" and {len(chosen) - NAMED} more" if len(chosen) > NAMED else ""
        return ", ".join(map(self.sample_name, chosen[:NAMED].tolist())) + rest

    def _agree(self, loss: Tensor, norm: Tensor) -> tuple[float, bool]:
        """The global loss and whether all is finite everywhere: one small collective and the step's only device sync."""
        finite = (loss.isfinite() & norm.isfinite()).double()
        total, good = (dist.sum_nograd(torch.stack([loss.double(), finite])) / dist.world()).tolist()
        return total, good == 1.0

    # --- what engines override ----------------------------------------------------------------------------------------

    def synchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are summed over ranks only inside the last micro-batch."""
        return nullcontext()

    def forward(self, batch: Batch, clock: Clock) -> Out:
        return self.method(batch, clock)  # type: ignore[no-any-return]

    def backward(self, out: Out, scale: float) -> None:
        if not self.method.separate_losses:
            (_total(out) * scale).backward()
            return
        for name, loss in out.losses.items():
            own = [p for g in self.optimizer.param_groups if g["name"] == name for p in g["params"]]
            if not own:
                raise ValueError(f"the loss '{name}' names no parameter group of {type(self.method).__module__}")
            torch.autograd.backward(loss * scale, inputs=own, retain_graph=True)

    def gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.trained() if p.grad is not None])

    @torch.no_grad()
    def move_targets(self, clock: Clock) -> None:
        """target <- tau * target + (1 - tau) * online over parameters, with the online parameters of after the step."""
        for target, online in self.method.targets.items():
            old: list[Tensor] = list(self.method.get_submodule(target).parameters())
            new: list[Tensor] = list(self.method.get_submodule(online).parameters())
            torch._foreach_lerp_(old, new, 1 - self.method.ema(clock))

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        self.method.get_parameter(name).copy_(value)

    def state(self) -> dict[str, Piece]:
        """What this rank writes to a checkpoint; over all ranks the pieces tile every tensor exactly."""
        whole, pieces = {}, {}
        shards = self._shards()
        for name, tensor in self._tensors().items():
            if name in shards:
                start, rows = shards[name]
                width = tensor[0].numel() if len(tensor) else 1
                pieces[name] = Piece(tensor.detach().reshape(-1), start * width, (rows, *tensor.shape[1:]))
            else:
                whole[name] = tensor.detach()
        total, seen = sum(t.nbytes for t in whole.values()), 0
        for name, tensor in whole.items():  # replicas are written once, each by one rank, evenly by bytes
            if seen * dist.world() // max(1, total) == dist.rank():
                pieces[name] = Piece(tensor.reshape(-1), 0, tuple(tensor.shape))
            seen += tensor.nbytes
        return pieces

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """Take everything from a checkpoint of the same method, written by any engine at any world size."""
        self._create_optimizer_state(saved)  # only now is it known what the optimizer keeps
        shards, tensors, there = self._shards(), self._tensors(), set(saved.names())
        for name, tensor in tensors.items():
            start, rows = shards.get(name, (0, 0))
            shape = (rows, *tensor.shape[1:]) if name in shards else tuple(tensor.shape)
            if name not in there or tuple(saved.shape(name)) != shape:
                what = f"has shape {tuple(saved.shape(name))}" if name in there else "is missing"
                raise TrainingError(f"this checkpoint belongs to another model: {name} {what} and must have shape {shape}")
            offset = start * (tensor[0].numel() if tensor.dim() and len(tensor) else 1)
            tensor.copy_(saved.read(name, offset, offset + tensor.numel()).view(tensor.shape))
        if extra := sorted(there - set(tensors)):
            raise TrainingError(f"this checkpoint belongs to another model: it also holds {', '.join(extra[:3])}")

    def _create_optimizer_state(self, saved: Saved) -> None:
        kept = {"step", "exp_avg", "exp_avg_sq"} if isinstance(self.optimizer, torch.optim.AdamW) else {"momentum_buffer"}
        if other := {n.rpartition(".")[2] for n in saved.names() if n.startswith("optim.")} - kept:
            raise TrainingError(
                f"this checkpoint holds another optimizer's state ({', '.join(sorted(other))}): keep optim.name, or export the "
                "encoder and start a new run with --init"
            )
        for name, parameter in self._named():
            prefix = f"optim.{name}."
            self.optimizer.state[parameter].update(
                {
                    n.removeprefix(prefix): torch.empty_like(parameter)
                    if not n.endswith(".step")
                    else torch.empty((), dtype=torch.float32)  # AdamW's step counter lives on the CPU
                    for n in saved.names()
                    if n.startswith(prefix)
                }
            )

    def export(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.method.backbone.state_dict().items()}

    # --- parts ---------------------------------------------------------------------------------------------------------

    def rates(self) -> dict[str, float]:
        """The learning rate of each group in the last step."""
        return {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}

    def _trust(self) -> dict[str, Tensor]:
        if not isinstance(self.optimizer, LARS) or not len(self.optimizer.trust):
            return {}
        ratios = self.optimizer.trust
        return {"min": ratios.min(), "median": ratios.median(), "max": ratios.max()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def trained(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def features(self, batches: Iterator[Batch], embed: Callable[[Batch], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(index, embed(batch)) over the batches, without gradient and without a trace in running statistics."""
        for batch in batches:
            with self.autocast():
                out = embed(batch.double() if self.config.precision == "fp64" else batch)
            for module in self.staged:
                module.discard()
            yield batch.index, out

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.optimizer.param_groups:
            yield from zip(group["names"], group["params"], strict=True)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"method.{name}": t for name, t in self.method.state_dict(keep_vars=True).items()}
        for name, parameter in self._named():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"optim.{name}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        return tensors

    def _shards(self) -> Mapping[str, tuple[int, int]]:
        modules = ((n, m) for n, m in self.method.named_modules() if isinstance(m, Staged))
        return {f"method.{n}.{buffer}": where for n, m in modules for buffer, where in m.sharded().items()}


def _total(out: Out) -> Tensor:
    return torch.stack(list(out.losses.values())).sum()


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}
