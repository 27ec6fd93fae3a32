"""One process, or torch's DistributedDataParallel over several: replicated parameters, averaged
gradients.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from scaletrain import dist
from scaletrain.config.schema import OptimConfig, Positive
from scaletrain.core import Batch, Clock, Method, MethodOutput, StepResult
from scaletrain.engines import base
from scaletrain.engines.config import EngineConfig


class Config(EngineConfig):
    bucket_mb: Positive = 25.0
    """Size of the buckets in which gradients are reduced during the backward pass."""


class Engine(base.Engine):
    def __init__(
        self, method: Method, config: Config, optim: OptimConfig, device: torch.device
    ) -> None:
        super().__init__(method, config, optim, device)
        self.wrapped: DistributedDataParallel | None = None
        if dist.world() > 1 and not method.separate_losses:
            # Parameters start equal: they are drawn from the seed. Buffers are not rank 0's to
            # overwrite (sharded banks).
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                method, [n for n, _ in method.named_buffers()]
            )
            self.wrapped = DistributedDataParallel(
                method,
                init_sync=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=config.bucket_mb,
            )

        self.warmed_up = self.wrapped is None

    def step(self, batch: Batch, clock: Clock, lr: float, base_lr: float) -> StepResult:
        if not self.warmed_up:
            self.warm_up(batch, clock)
        return super().step(batch, clock, lr, base_lr)

    def warm_up(self, batch: Batch, clock: Clock) -> None:
        """Run a backward pass that changes no state, before the first step of this process.

        DDP rearranges its buckets after its first backward pass, and their layout determines the
        order in which three or more ranks are summed: without this, the first step after a resume
        would round differently.
        """
        with self.autocast():
            out = self.forward(self.micro_batches(batch)[0], clock)

        self.backward(out, 1.0)
        for module in self.staged:
            module.discard()

        self.optimizer.zero_grad(set_to_none=True)
        self.warmed_up = True

    def synchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if self.wrapped is None or last else self.wrapped.no_sync()

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        return super().forward(batch, clock) if self.wrapped is None else self.wrapped(batch, clock)

    def backward(self, out: MethodOutput, scale: float) -> None:
        super().backward(out, scale)
        # several backward passes: DDP's hooks expect one
        if dist.world() > 1 and self.method.separate_losses:
            for parameter in self.trained():
                if parameter.grad is not None:
                    parameter.grad.copy_(dist.sum_nograd(parameter.grad) / dist.world())
