"""Configuration of the DeepSpeed engine, and what it passes on to DeepSpeed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from scaletrain.config.recipe import ConfigError, closest
from scaletrain.config.schema import Config as Run
from scaletrain.config.schema import Positive
from scaletrain.core import Method
from scaletrain.engines.config import EngineConfig

ZERO = "zero_optimization"
# Options of DeepSpeed that belong to the recipe, and the key that sets them.
RECIPE_KEYS = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "engine.grad_accum_steps",
    "gradient_clipping": "engine.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    f"{ZERO}.stage": "engine.stage",
    f"{ZERO}.reduce_bucket_size": "engine.bucket_mb",
    f"{ZERO}.offload_optimizer": "engine.name=fsdp2 with engine.offload",
    f"{ZERO}.offload_param": "engine.name=fsdp2 with engine.offload",
}
# Options that a DeepSpeed JSON may set: none changes results or the order within a partition.
_COMMUNICATION = """
allgather_bucket_size allgather_partitions contiguous_gradients enable_sanity_checks
log_trace_cache_warnings overlap_comm reduce_scatter stage3_max_live_parameters
stage3_max_reuse_distance stage3_param_persistence_threshold stage3_prefetch_bucket_size
use_multi_rank_bucket_allreduce
"""
_PROFILING = (
    "comms_logger dump_state flops_profiler memory_breakdown steps_per_print wall_clock_breakdown"
)
DEEPSPEED_KEYS = (*_PROFILING.split(), *(f"{ZERO}.{key}" for key in _COMMUNICATION.split()))


def _read(value: Any) -> Any:
    """The content of a DeepSpeed JSON, which is saved with the run in place of the file's path."""
    if not isinstance(value, str):
        return value

    try:
        return json.loads(Path(value).read_text()) if value else {}
    except OSError as error:
        raise ValueError(f"cannot read {value}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{value} is not JSON: {error}") from None


class Config(EngineConfig):
    stage: Literal[0, 1, 2, 3] = 2
    """Stage of ZeRO: 1 shards optimizer state, 2 gradients too, 3 parameters too; 0: nothing."""

    bucket_mb: Positive = 100.0
    """Size of the buckets in which gradients are reduced during the backward pass."""

    deepspeed: Annotated[dict[str, Any], BeforeValidator(_read)] = Field(default_factory=dict)
    """A DeepSpeed JSON or its path: options of communication and profiling only."""

    def fits(self, run: Run) -> None:
        super().fits(run)
        need_one_backward(importlib.import_module(f"scaletrain.methods.{run.method.name}").Model)

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.precision == "fp64":
            raise ValueError(
                "ZeRO keeps fp32 masters: set precision=fp32, or engine.name=ddp or fsdp2 for fp64"
            )
        if self.compile and self.stage == 3:
            raise ValueError(
                "ZeRO 3 gathers parameters by hooks that compiled modules skip: set compile=false "
                "or stage=2"
            )

        self._agree()
        return self

    def _agree(self) -> None:
        """Refuse options that contradict the recipe and those that are unknown or not exact."""
        same = {
            "gradient_accumulation_steps": self.grad_accum_steps,
            "gradient_clipping": self.max_grad_norm,
            f"{ZERO}.stage": self.stage,
        }

        for key, value in _flat(self.deepspeed):
            if key in same and value == same[key]:
                continue
            if key in RECIPE_KEYS:
                raise ValueError(
                    f"deepspeed.{key}={value!r} belongs to the recipe: remove it and set "
                    f"{RECIPE_KEYS[key]}"
                )
            if key not in DEEPSPEED_KEYS:
                raise ValueError(
                    f"deepspeed.{key} is not supported{closest(key, DEEPSPEED_KEYS)}; available: "
                    f"{', '.join(DEEPSPEED_KEYS)}"
                )

    @property
    def talk(self) -> bool:
        """Whether an option asks DeepSpeed for output in its log."""
        return any(
            value
            for key, value in _flat(self.deepspeed)
            if key in DEEPSPEED_KEYS and not key.startswith(f"{ZERO}.")
        )

    def settings(self) -> dict[str, Any]:
        """The complete configuration of DeepSpeed."""
        options = {key: value for key, value in _flat(self.deepspeed) if key in DEEPSPEED_KEYS}
        return {
            **{key: value for key, value in options.items() if not key.startswith(f"{ZERO}.")},
            # Used in its own messages only.
            "train_micro_batch_size_per_gpu": 1,
            # Engine.synchronised marks the end of a step.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "torch_autocast": {
                "enabled": self.precision == "bf16",
                "dtype": "bfloat16",
                # DeepSpeed would reduce the gradients of these modules in bfloat16.
                "lower_precision_safe_modules": [],
            },
            ZERO: {
                **{
                    key.removeprefix(f"{ZERO}."): value
                    for key, value in options.items()
                    if key.startswith(f"{ZERO}.")
                },
                "stage": self.stage,
                "reduce_bucket_size": max(1, int(self.bucket_mb * 2**20 / 4)),
                # base.Engine computes it; stages 0 and 3 have no such option.
                "compute_grad_norm": self.stage not in (1, 2),
                # A single group: parts of the gradient would else arrive one after the other.
                "sub_group_size": 10**15,
            },
        }


def _flat(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options by dotted key, without those that are disabled or "auto"."""
    zero = raw.get(ZERO)
    nested = (
        {f"{ZERO}.{key}": value for key, value in zero.items()} if isinstance(zero, Mapping) else {}
    )

    for key, value in {
        **{k: v for k, v in raw.items() if k != ZERO or not isinstance(v, Mapping)},
        **nested,
    }.items():
        off = isinstance(value, Mapping) and (
            value.get("enabled") is False or value.get("device") == "none"
        )
        if not off and value not in ("auto", None):
            yield key, value


def need_one_backward(method: Method | type[Method]) -> None:
    if method.separate_losses:
        raise ConfigError(
            "engine.name=deepspeed takes one backward pass per step, but the losses of this method "
            "train separate groups of parameters; use engine.name=ddp or fsdp2"
        )
