"""The schema of a run's configuration: typed, immutable data.

Methods, auxiliaries and engines define their own `Config` in their own file. It is found by the
file's name when a configuration is validated, so this module imports none of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from scaletrain.config.data import CacheConfig as CacheConfig
from scaletrain.config.data import DataConfig as DataConfig
from scaletrain.config.data import ForegroundConfig as ForegroundConfig
from scaletrain.config.data import MapConfig as MapConfig
from scaletrain.config.data import SupportConfig as SupportConfig
from scaletrain.config.data import View as View
from scaletrain.config.fields import Count as Count
from scaletrain.config.fields import Frozen as Frozen
from scaletrain.config.fields import Natural as Natural
from scaletrain.config.fields import Positive as Positive
from scaletrain.config.fields import Share as Share
from scaletrain.config.fields import absolute as absolute
from scaletrain.config.recipe import ConfigError as ConfigError
from scaletrain.config.recipe import brief, closest

# Modules in methods, auxiliaries and engines that define no component.
_SHARED = ("base", "config", "deepspeed_config", "gradient_cache", "non_finite", "placement")


class ComponentConfig(Frozen):
    """Base of the `Config` that a method, auxiliary or engine defines."""

    name: str

    miniature: ClassVar[Mapping[str, Any]] = {}
    """Options with which a step takes milliseconds on a CPU: the tests train with them."""

    def fits(self, run: Config) -> None:
        """Raise ValueError where this component does not fit the rest of the run, which has been
        validated.
        """


_SINGULAR = {"methods": "method", "auxiliaries": "auxiliary", "engines": "engine"}
ComponentT = TypeVar("ComponentT", bound=ComponentConfig)


class ModelConfig(Frozen):
    name: str = "resnet50"
    """resnet10, 18, 34, 50, 101, 152, 200, 295; timm/NAME: a network of the timm library."""

    width: Positive = 1.0
    """Factor for the width of the stem and all stages."""

    sk: bool = False
    """SimCLRv2's selective kernels, with ResNet-D's stem and shortcuts."""

    stem: Literal["imagenet", "cifar"] = "imagenet"
    """7x7 stride 2 and max-pool, or 3x3 stride 1."""

    input: Literal["rgb", "sobel", "lightness"] = "rgb"
    """What the network sees of an image: its colors, the two gradients of the gray image
    (DeepCluster), or L of Lab (colorization).
    """

    output_stride: Literal[32, 16, 8] = 32
    """Stride of the last feature map; below 32 by dilated convolutions. With the cifar stem it is
    always 8.
    """

    zero_init: bool = False
    """Initialise gamma of each residual branch's last norm with zero."""

    norm_group: Natural = 0
    """Samples of the global batch that share batch-norm statistics; 0: all of it."""

    norm_momentum: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of a step's statistics in the running ones, for the encoder's batch norms; null: 0.1,
    and in timm's networks what they have.
    """


class OptimConfig(Frozen):
    name: Literal["lars", "sgd", "adamw"] = "lars"
    lr: Positive = 0.3
    """Per `lr_reference_batch` samples of the global batch."""

    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    lr_reference_batch: Count = 256
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 10.0
    warmup_start: Share = 0.0
    """Share of the base learning rate at step 0."""

    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    min_lr_ratio: Share = 0.0
    """Share of the base learning rate at the end of the cosine."""

    milestones: tuple[Positive, ...] = ()
    """Steps only: epochs, each of which multiplies the learning rate by gamma."""

    gamma: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0.0)] = 1.5e-6
    momentum: Share = 0.9
    nesterov: bool = False
    """SGD only."""

    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW only."""

    trust_coefficient: Positive = 1e-3
    """LARS eta."""

    trust_clip: bool = False
    """LARS: never above the plain learning rate (solo-learn's clip_lr)."""

    lars_momentum: Literal["outside", "inside"] = "outside"
    """Learning rate outside (BYOL) or inside (SimCLR) the buffer."""

    lars_norm: Literal["sum", "parts"] = "sum"
    """|g + wd p| (BYOL, SimCLR) or |g| + wd |p| (LARC)."""

    exclude: Literal["norm_bias", "ndim1", "none"] = "norm_bias"
    """Parameters excluded from weight decay and adaptation."""


class CheckpointConfig(Frozen):
    every_steps: Natural = 0
    """0: at the end of each epoch."""

    keep_last: Count = 2
    keep_every: Natural = 0
    """Steps that are multiples of it are never deleted; 0: none."""


class MonitorConfig(Frozen):
    every: Count = 20
    """Steps between scalars."""

    images_every: Natural = 1000
    """Steps between grids of the views; 0: never."""

    probe: bool = False
    """Train a linear classifier on the online network's features while it learns, and record its
    accuracy. It has no influence on the training; the data must have labels.
    """


class Config(Frozen):
    """A whole run. `batch` is global: the number of samples per optimizer step over all ranks."""

    seed: Natural = 0
    batch: Count = 4096
    epochs: Positive = 100.0
    steps: Natural = 0
    """Length of the run and its schedule in steps, instead of `epochs`; 0: use `epochs`."""

    threads: Natural = 0
    """CPU threads per rank; 0: cores divided by local ranks."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    method: SerializeAsAny[
        Annotated[ComponentConfig, BeforeValidator(lambda v: _component("methods", v))]
    ] = cast(ComponentConfig, {"name": "relicv2"})
    auxiliaries: tuple[
        SerializeAsAny[
            Annotated[ComponentConfig, BeforeValidator(lambda v: _component("auxiliaries", v))]
        ],
        ...,
    ] = ()
    optim: OptimConfig = OptimConfig()
    engine: SerializeAsAny[
        Annotated[ComponentConfig, BeforeValidator(lambda v: _component("engines", v))]
    ] = cast(ComponentConfig, {"name": "ddp"})
    published: str = ""
    """The figure that the source of this recipe reports, with the source. Training ignores it, a
    resumed run may have another text, and recipes that extend this one do not inherit it.
    """
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def _fitting(self) -> Config:
        names = [auxiliary.name for auxiliary in self.auxiliaries]
        if len(set(names)) < len(names):
            raise ValueError(f"auxiliaries: each at most once, got {', '.join(names)}")

        self.method.fits(self)
        self.engine.fits(self)
        return self


def components(kind: str) -> tuple[str, ...]:
    """Names of the components of a kind: the modules of `scaletrain/<kind>/`."""
    package = importlib.import_module(f"scaletrain.{kind}")
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in _SHARED)
    )


def component_config(kind: str, name: str) -> type[ComponentConfig]:
    """The `Config` of a component; ValueError for an unknown name."""
    known = components(kind)
    if name not in known:
        raise ValueError(
            f"unknown {_SINGULAR[kind]} '{brief(name)}'{closest(name, known)}; available: "
            f"{', '.join(known)}"
        )

    return cast(type[ComponentConfig], importlib.import_module(f"scaletrain.{kind}.{name}").Config)


def _component(kind: str, value: Any) -> ComponentConfig:
    if isinstance(value, ComponentConfig):
        return value

    raw = {"name": value} if isinstance(value, str) else value
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        raise ValueError(f"needs a `name`; available: {', '.join(components(kind))}")

    return component_config(kind, raw["name"]).model_validate(raw)
