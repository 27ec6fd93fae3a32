"""Configuration that all engines share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scaletrain.config.schema import ComponentConfig, Config, Count
from scaletrain.engines import gradient_cache


class EngineConfig(ComponentConfig):
    """What every engine understands."""

    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """bf16: autocast over fp32 parameters; fp64: for exactness checks."""

    channels_last: bool = True
    compile: bool = False
    """torch.compile of the backbones and heads, never of Method.forward."""

    max_grad_norm: Annotated[float, Field(ge=0.0)] = 0.0
    """Largest norm of the whole gradient; 0: no clipping."""

    grad_accum_steps: Count = 1
    """Micro-batches per step."""

    gradient_cache: bool = False
    """Embed the micro-batches twice, so that a loss which couples samples stays exact (gradient
    caching).
    """

    max_skipped: Count = 3
    """Stop after this many non-finite steps in a row."""

    activation_checkpointing: bool | tuple[Count, ...] = False
    """Stages of the backbones (1 is the first) that are recomputed in backward to save memory."""

    def fits(self, run: Config) -> None:
        gradient_cache.check(run, self.grad_accum_steps, self.gradient_cache)

    @model_validator(mode="after")
    def _recompute_is_eager(self) -> EngineConfig:
        if self.activation_checkpointing and self.compile:
            raise ValueError(
                "activation_checkpointing and compile exclude each other; set compile=false or "
                "activation_checkpointing=false"
            )

        return self
