"""DeepSpeed's ZeRO: 0 replicates, 1 shards optimizer state and fp32 masters, 2 gradients too, 3
parameters and targets too.

DeepSpeed communicates gradients and parameters and updates none: its optimizer does nothing. Our
optimizer updates the part of each parameter in this rank's partition; then DeepSpeed sends the
changed partitions to where they are used. Gradients are means over ranks, as in all engines. A
parameter outside the graph of a step has a zero gradient here, not none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as c10d
from torch import Tensor, nn

from scaletrain import dist
from scaletrain.config.schema import OptimConfig
from scaletrain.core import Batch, Clock, Method, MethodOutput
from scaletrain.engines import base
from scaletrain.engines.deepspeed_config import Config as Config
from scaletrain.engines.deepspeed_config import need_one_backward
from scaletrain.engines.placement import SavedTensors, Shard, replica
from scaletrain.nn.stages import channels_last_inputs
from scaletrain.optim import groups
from scaletrain.runtime.versions import need

P = ParamSpec("P")
T = TypeVar("T")


class Engine(base.Engine):
    config: Config

    def __init__(
        self, method: Method, config: Config, optim: OptimConfig, device: torch.device
    ) -> None:
        need_one_backward(method)
        super().__init__(method, config, optim, device)

    def use_channels_last(self) -> None:
        # partitions are flat and row-major
        channels_last_inputs(self.method)

    def wrap(self) -> None:
        need("deepspeed")
        self.sharded = self.config.stage > 0
        # before DeepSpeed's hooks
        self.method.register_forward_hook(_with_losses)
        # DeepSpeed's optimizer, which holds the partitions
        self.zero: Any
        self.library, self.zero, *_ = _library(self.device, talk=self.config.talk).initialize(
            # by itself it takes LOCAL_RANK, whatever is visible
            args=SimpleNamespace(device_rank=self.device.index or 0),
            model=self.method,
            optimizer=_Idle([p for p in self.method.parameters() if p.requires_grad], {"lr": 0.0}),
            config=self.config.settings(),
            dist_init_required=False,
        )

    def shard(self, name: str, parameter: Any) -> Shard:
        if self.config.stage == 3:
            part = (
                self.zero.get_local_fp32_param(parameter)
                if parameter.requires_grad
                else parameter.ds_tensor
            )
            start = min(parameter.ds_numel, dist.rank() * len(part))

            # the rest is padding
            return Shard(
                part.detach()[: parameter.ds_numel - start], start, tuple(parameter.ds_shape)
            )

        if not self.sharded or not parameter.requires_grad:
            return replica(parameter)

        at = parameter._hp_mapping
        if at is None:
            return Shard(parameter.new_empty(0), 0, tuple(parameter.shape))

        return Shard(at.hp_fragment.detach(), at.lp_fragment_address.start, tuple(parameter.shape))

    def build_optimizer(
        self, declared: list[groups.ParamGroup], optim: OptimConfig
    ) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(declared, optim)
        optimizer.register_step_post_hook(lambda *_: self.publish())
        return optimizer

    def publish(self) -> None:
        """Run DeepSpeed's step, which sends the partitions that our optimizer changed and drops
        the gradients.
        """
        self.library.step()

        # a parameter outside the next graph would find its last gradient there
        if self.config.stage == 3:
            self.zero.grad_partitions_flat_buffer.zero_()

    def synchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        self.library.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        return self.library(batch, clock)[1]  # type: ignore[no-any-return]

    def backward(self, out: MethodOutput, scale: float) -> None:
        self.library.backward(
            torch.stack(list(out.losses.values())).sum() * scale, scale_wrt_gas=False
        )

    def collect(self) -> None:
        if not self.sharded:
            return

        # DeepSpeed keeps the gradient in pieces, in the order of the partition
        found, at = {}, 0
        for piece in self.zero.averaged_gradients[0]:
            found[at] = piece.reshape(-1)
            at += piece.numel()

        stage_3 = self.config.stage == 3
        flat = (
            self.zero.fp32_partitioned_groups_flat
            if stage_3
            else self.zero.single_partition_of_fp32_groups
        )[0]

        for part in self.trained():
            if part.numel():
                part.grad = found[part.storage_offset() - flat.storage_offset()][: part.numel()]
            else:
                part.grad = torch.zeros_like(part)

    def _apply(self, clock: Clock, norm: Tensor, lr: float, base_lr: float) -> None:
        # for Method.after_step
        with self._gathering():
            super()._apply(clock, norm, lr, base_lr)

    def _skip(self, batch: Batch, clock: Clock, outs: Sequence[MethodOutput]) -> None:
        # nothing has changed: it only drops the gradients
        self.publish()
        super()._skip(batch, clock, outs)

    def inside(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        with self._gathering():
            return function(*args, **kwargs)

    @contextmanager
    def _gathering(self) -> Iterator[None]:
        """Context in which ZeRO 3 gathers parameters when they are read; otherwise it gathers those
        of a module when that is called.
        """
        modules = list(self.method.modules()) if self.config.stage == 3 else []

        for module in modules:
            module._parameters._in_forward = True  # type: ignore[attr-defined]

        try:
            yield
        finally:
            for module in modules:
                module._parameters._in_forward = False  # type: ignore[attr-defined]
            for p in self.method.parameters() if modules else ():
                if _gathered(p) and not p.ds_persist:  # type: ignore[attr-defined]
                    p.partition()  # type: ignore[attr-defined]

    def move_targets(self) -> None:
        super().move_targets()
        if self.config.stage == 3:
            _renew(
                p
                for target in self.method.targets
                for p in self.method.get_submodule(target).parameters()
            )

    def averaged(self, module: str) -> list[Tensor]:
        if self.config.stage == 3:
            return super().averaged(module)
        # online replicas are new, targets are replicas only
        return list(self.method.get_submodule(module).parameters())

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        super().write(name, value)
        if self.sharded and name in self.shards:
            parameter = self.method.get_parameter(name)
            if self.config.stage == 3:
                self._copy_master(name, parameter)
            if self.config.stage < 3 or _gathered(parameter):
                parameter.copy_(value)

    @torch.no_grad()
    def restore(self, saved: SavedTensors) -> None:
        super().restore(saved)
        if self.config.stage == 3:
            for name, parameter in self.method.named_parameters():
                self._copy_master(name, parameter)
            _renew(self.method.parameters())
        elif self.sharded:
            self.zero.update_lp_params()

    def _copy_master(self, name: str, parameter: Any) -> None:
        """Copy a master to the partition that ZeRO 3 gathers."""
        master = self.shards[name].tensor
        parameter.ds_tensor[: len(master)].copy_(master)


class _Idle(torch.optim.Optimizer):
    """The optimizer that DeepSpeed is given, which does nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: our optimizer has made its step."""


def _library(device: torch.device, *, talk: bool) -> Any:
    """Import DeepSpeed for the present process group, without MPI and without compilation."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Required even for a single process.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string("info" if talk else "error")
    # Avoids a minute of C++ compilation on a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not c10d.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        c10d.init_process_group(backend, store=c10d.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]

    comm.init_distributed(dist_init_required=False, verbose=False)
    # torch 2.14 warns at the names that DeepSpeed uses
    comm.cdb.all_gather_function = dist._all_gather
    comm.cdb.reduce_scatter_function = dist._reduce_scatter
    return deepspeed


def _renew(parameters: Iterable[Any]) -> None:
    """Gather again the small parameters that ZeRO 3 keeps gathered."""
    small = [p for p in parameters if p.ds_persist]
    for p in small:
        p.partition()

    if small:
        small[0].all_gather(small)


def _gathered(parameter: nn.Parameter) -> bool:
    return bool(parameter.ds_status.name == "AVAILABLE")  # type: ignore[attr-defined]


def _with_losses(module: nn.Module, args: Any, out: MethodOutput) -> list[Any]:
    """Expose the losses to DeepSpeed, which looks for the roots of backward in lists and dicts and
    changes them in place, so also within `out`.
    """
    return [out.losses, out]
