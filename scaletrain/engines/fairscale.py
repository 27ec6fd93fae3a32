"""fairscale's OSS and ShardedDataParallel: each rank keeps the optimizer state, and gets the
gradients, of whole parameters.

Parameters, targets and buffers are replicas, as with ddp. Our optimizer has every parameter on
every rank, those of other ranks as empty stubs, so groups, names and trust ratios are the same on
all ranks. After a step OSS sends each parameter from its owner to the others. The last release of
fairscale is 0.4.13; what is used of it works with torch 2.14 without a warning, also in float64.
Two of its features are avoided:
- ShardedDataParallel's reduction buckets break when a gradient is set to None (frozen groups): they
  are off;
- OSS.step() and clip_grad_norm() copy our group keys each step and take norms in float32: the
  optimizer is called directly.
A parameter outside a step's graph has a zero gradient here, not none.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scaletrain import dist
from scaletrain.config.schema import OptimConfig
from scaletrain.core import Batch, Clock, MethodOutput
from scaletrain.engines import base
from scaletrain.engines.config import EngineConfig
from scaletrain.engines.placement import Shard, named_parameters
from scaletrain.nn.stages import channels_last_inputs
from scaletrain.optim import groups
from scaletrain.optim.lars import LARS
from scaletrain.runtime.versions import need


class Config(EngineConfig):
    pass


class Engine(base.Engine):
    # ShardedDataParallel, or None: one process, or losses that it cannot serve
    wrapped: Any = None

    def use_channels_last(self) -> None:
        # OSS makes parameters row-major views of one buffer for each rank
        channels_last_inputs(self.method)

    def build_optimizer(
        self, declared: list[groups.ParamGroup], optim: OptimConfig
    ) -> torch.optim.Optimizer:
        need("fairscale")
        if dist.world() == 1:
            return super().build_optimizer(declared, optim)

        from fairscale.nn.data_parallel import ShardedDataParallel
        from fairscale.optim import OSS

        def local(own: list[groups.ParamGroup]) -> torch.optim.Optimizer:
            mine = {id(p) for group in own for p in group["params"]}
            own_part = [
                g | {"params": [p if id(p) in mine else p.new_empty(0) for p in g["params"]]}
                for g in declared
            ]
            optimizer = super(Engine, self).build_optimizer(own_part, optim)

            if isinstance(optimizer, LARS):
                optimizer.total = self.total

            return optimizer

        oss = OSS([dict(group) for group in declared], optim=local)
        oss.optim.register_step_post_hook(lambda *_: oss._broadcast_params())
        # several backward passes: its hooks expect one
        if not self.method.separate_losses:
            self.wrapped = ShardedDataParallel(
                self.method,
                oss,
                # sharded banks are not rank 0's to overwrite
                broadcast_buffers=False,
                sync_models_at_startup=False,
                reduce_buffer_size=0,
                auto_refresh_trainable=False,
            )

        return oss.optim  # type: ignore[no-any-return]

    def total(self, x: Tensor) -> Tensor:
        return dist.sum_nograd(x)

    def synchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if self.wrapped is None or last else self.wrapped.no_sync()

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        return super().forward(batch, clock) if self.wrapped is None else self.wrapped(batch, clock)

    def collect(self) -> None:
        if dist.world() == 1:
            return

        for name, own_part in named_parameters(self.optimizer):
            parameter = self.method.get_parameter(name)
            if self.wrapped is None and parameter.grad is not None:
                parameter.grad = dist.sum_nograd(parameter.grad) / dist.world()

            if own_part is not parameter:
                parameter.grad = None

            if own_part.grad is None:
                own_part.grad = torch.zeros_like(own_part)

    def gradient_norm(self) -> Tensor:
        return self.total(super().gradient_norm().double().square()).sqrt()

    def placed(self) -> dict[str, Shard]:
        """As in other engines, but a parameter's optimizer state is on its owner only; AdamW's step
        counter is on all ranks.
        """
        return {
            name: replace(at, copy=0, copies=1)
            if name.startswith("optim.") and not name.endswith(".step")
            else at
            for name, at in super().placed().items()
        }
