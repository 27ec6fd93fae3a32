"""Configuration as frozen data: the typed schema, nearest-name errors, exact save and reload.
recipe.py reads the text.

Leaves (methods, engines) keep their own `Config` in their own file; it is found by the leaf's file
name in a second pass, so this module imports none of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    model_validator,
)

from scaletrain.config.recipe import ConfigError as ConfigError
from scaletrain.config.recipe import brief, listed, long, nearest, shards

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Range = tuple[float, float]
# the keys that name a file or folder
PATHS = ("path", "labels")
# files beside methods, auxiliaries and engines that are none of them
_SHARED = ("base", "gradient_cache", "placement")


def absolute(path: str) -> str:
    """Of a file or folder: what a run saves must mean the same from any folder. An address stays as
    it is.
    """
    if len(parts := listed(path)) > 1:
        return str(shards([absolute(part) for part in parts]))

    return (
        path
        if path in ("", "synthetic") or "://" in path
        else str(Path(parts[0]).expanduser().absolute())
    )


Place = Annotated[str, AfterValidator(absolute)]


class Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ComponentConfig(Frozen):
    """Base of the `Config` that a method or engine file defines."""

    name: str

    miniature: ClassVar[Mapping[str, Any]] = {}
    """Options with which a step takes milliseconds on a CPU: the tests train with them."""

    def fits(self, run: Config) -> None:
        """Raise ValueError where this leaf cannot go with the rest of the recipe, which is read by
        then.
        """


ComponentT = TypeVar("ComponentT", bound=ComponentConfig)


class View(Frozen):
    """One kind of random view. Colour parameters mean what torchvision's ColorJitter means
    by them.
    """

    size: Annotated[int, Field(ge=8, le=4096)] = 224
    """Pixels of the square view."""

    count: Natural = 1
    """0 leaves it out, for studies of views."""

    scale: Range = (0.08, 1.0)
    """Share of the image that a crop covers."""

    ratio: Range = (3 / 4, 4 / 3)
    crop: Share = 1.0
    """Probability of cropping at all; otherwise the whole image is resized."""

    interpolation: Literal["bilinear", "bicubic", "keys"] = "bicubic"
    """Keys: TensorFlow's bicubic, never antialiased."""

    antialias: bool = True
    """Widen the filter with the reduction, as Pillow does."""

    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.2
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    grayscale: Share = 0.2
    blur: Share = 0.5
    sigma: Range = (0.1, 2.0)
    """Of the blur, in pixels at size 224; scaled with the view's size."""

    solarize: Share = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> View:
        for name in ("scale", "ratio", "sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} is a range (low, high) with 0 < low <= high, got ({low}, {high})"
                )

        if self.scale[1] > 1:
            raise ValueError(f"scale is a share of the image, at most 1, got {self.scale[1]}")
        if self.interpolation == "keys" and self.antialias:
            raise ValueError(
                "interpolation keys is TensorFlow's bicubic without antialiasing: add antialias: "
                "false"
            )

        return self


class Part(Frozen):
    """One of the data sets of a mixture."""

    path: Annotated[Place, Field(min_length=1)]
    """Folder of tar shards."""

    weight: Positive
    """Share of the draws, relative to the other parts."""


class Cache(Frozen):
    """Whole shards on this node's disk, shared by its ranks: those of http://, https:// and s3://
    addresses.
    """

    path: Place = ""
    """Folder of this node; "": the one for temporary files."""

    bytes: Count = 100_000_000_000
    """Oldest shards are deleted beyond; want twice the shards in use, which the run prints."""

    stage: bool = False
    """Copy the shards of local folders too: for parallel file systems, which random reads hurt."""


class Support(Frozen):
    """Labelled samples beside every batch, as many of each class, for the auxiliaries that want
    them (suncet).
    """

    path: Place = ""
    """Folder of shards; "": data.path."""

    labels: Place = ""
    """File of shards/subset.py, the samples whose labels may be used; "": all of a `path` of
    their own.
    """

    classes: Count = 10
    """Of a step; the classes take turns."""

    per_class: Annotated[int, Field(ge=2)] = 2
    """Samples of each of them."""

    epochs: Positive = 100.0
    """From the start; the steps of later ones have none."""


class Data(Frozen):
    path: Annotated[Place, BeforeValidator(shards, json_schema_input_type=str | list[str])] = ""
    """Folder of tar shards, local, http(s)://HOST/FOLDER or s3://BUCKET/FOLDER; FOLDER/*.tar; a
    list of these; or `synthetic`.
    """

    cache: Cache = Cache()
    mixture: tuple[Part, ...] = ()
    """In place of path: folders that every batch draws from."""

    epoch_samples: Natural = 0
    """Samples that count as an epoch; 0: as many as the data has."""

    lanes: Count = 64
    """Equal parts of the epoch's line of samples that feed every batch."""

    window: Count = 16
    """Shards among which a lane shuffles."""

    workers: Natural = 4
    """Loader processes per rank; 0 loads in the training process."""

    prefetch: Annotated[int, Field(ge=1, le=100)] = 2
    """Batches held ready by each worker."""

    timeout: Positive = 300.0
    """Seconds without a batch before the run ends, with exit code 75."""

    liveness: Positive = 60.0
    """Likewise, seconds in which a worker that owes a batch begins no image and receives no
    bytes.
    """

    masks: bool = False
    """Read `key.mask.png` members and crop them with the large views."""

    good_crops: Share = 0.0
    """Of the samples: large crops are drawn again until they hold foreground, a study that needs
    masks.
    """

    good_cover: Share = 0.25
    """Of the foreground that such a crop holds."""

    mask_study: Literal["", "points", "rectangle", "centred", "add", "remove", "box"] = ""
    """Worse masks, as altered.py says."""

    mask_share: Share = 0.5
    """Size of what mask_study puts in, takes out or adds."""

    on_bad: Literal["raise", "skip"] = "raise"
    """A sample that cannot be used: stop, or replace it by another and count it."""

    max_bad: Share = 0.001
    """Share of the samples that may be replaced before the run stops."""

    max_pixels: Count = 50_000_000
    """Images above this are refused before decoding."""

    synthetic_samples: Count = 1_281_167
    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)
    """Of pixels in [0, 1]; 0 and std 1 leave them so."""

    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    augment: Literal["worker", "device"] = "worker"
    """Where colours, blur and flips are computed; crops always in the worker."""

    views: tuple[View, ...] = (View(count=2),)
    support: Support | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return long("data", value)

    @model_validator(mode="after")
    def _some_views(self) -> Data:
        if not any(view.count for view in self.views):
            raise ValueError("views is empty; a method needs at least one view")
        return self

    @model_validator(mode="after")
    def _foreground(self) -> Data:
        for field in ("good_crops", "mask_study"):
            if getattr(self, field) and not self.masks:
                raise ValueError(f"{field} needs the foreground; add data.masks=true")
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> Data:
        if self.path and self.mixture:
            raise ValueError(
                "path and mixture exclude each other; clear one with data.path='' or "
                "data.mixture=[]"
            )

        return self


class Model(Frozen):
    name: str = "resnet50"
    """resnet18, 34, 50, 101, 152, 200, 295; timm/NAME: a network of the timm library."""

    width: Positive = 1.0
    """Multiplies every stage and the stem."""

    sk: bool = False
    """SimCLRv2's selective kernels, with ResNet-D's stem and shortcuts."""

    stem: Literal["imagenet", "cifar"] = "imagenet"
    """7x7 stride 2 and max-pool, or 3x3 stride 1."""

    sobel: bool = False
    """The network sees the image's two gradients in place of its colours (DeepCluster)."""

    zero_init: bool = False
    """Gamma of each residual branch's last norm starts at zero."""

    norm_group: Natural = 0
    """Samples of the global batch that share batch-norm statistics; 0: all of it."""


class Optim(Frozen):
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
    """Sgd only."""

    betas: tuple[Share, Share] = (0.9, 0.999)
    """Adamw only."""

    trust_coefficient: Positive = 1e-3
    """LARS eta."""

    trust_clip: bool = False
    """LARS: never above the plain learning rate (solo-learn's clip_lr)."""

    lars_momentum: Literal["outside", "inside"] = "outside"
    """Learning rate outside (BYOL) or inside (SimCLR) the buffer."""

    lars_norm: Literal["sum", "parts"] = "sum"
    """|g + wd p| (BYOL, SimCLR) or |g| + wd |p| (LARC)."""

    exclude: Literal["norm_bias", "ndim1", "none"] = "norm_bias"
    """From weight decay and adaptation."""


class Checkpoint(Frozen):
    every_steps: Natural = 0
    """0: at the end of each epoch."""

    keep_last: Count = 2
    keep_every: Natural = 0
    """Steps; multiples of it are never pruned."""


class Monitor(Frozen):
    every: Count = 20
    """Steps between scalars."""

    images_every: Natural = 1000
    """Steps between grids of the views; 0: never."""


class Config(Frozen):
    """A whole run. `batch` is global: the number of samples per optimizer step over all ranks."""

    seed: Natural = 0
    batch: Count = 4096
    epochs: Positive = 100.0
    steps: Natural = 0
    """Stop (and decay) after so many steps instead of `epochs`; 0: by epochs."""

    threads: Natural = 0
    """CPU threads per rank; 0: cores divided by local ranks."""

    data: Data = Data()
    model: Model = Model()
    method: SerializeAsAny[
        Annotated[ComponentConfig, BeforeValidator(lambda v: _component("methods", v))]
    ] = cast(ComponentConfig, {"name": "relicv2"})
    auxiliaries: tuple[
        SerializeAsAny[
            Annotated[ComponentConfig, BeforeValidator(lambda v: _component("auxiliaries", v))]
        ],
        ...,
    ] = ()
    optim: Optim = Optim()
    engine: SerializeAsAny[
        Annotated[ComponentConfig, BeforeValidator(lambda v: _component("engines", v))]
    ] = cast(ComponentConfig, {"name": "ddp"})
    checkpoint: Checkpoint = Checkpoint()
    monitor: Monitor = Monitor()
    published: str = ""
    """The figure that the source of this recipe reports, with the source. Training ignores it, a
    resumed run may have another text, and recipes that extend this one do not inherit it.
    """

    @model_validator(mode="after")
    def _fitting(self) -> Config:
        names = [leaf.name for leaf in self.auxiliaries]
        if len(set(names)) < len(names):
            raise ValueError(f"auxiliaries: each at most once, got {', '.join(names)}")

        self.method.fits(self)
        self.engine.fits(self)
        return self


def components(kind: str) -> tuple[str, ...]:
    """Names of the leaf files in `scaletrain/<kind>/` that define a Config."""
    package = importlib.import_module(f"scaletrain.{kind}")
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in _SHARED)
    )


def component_config(kind: str, name: str) -> type[ComponentConfig]:
    known = components(kind)
    if name not in known:
        raise ValueError(
            f"there is no '{brief(name)}' in {kind}{nearest(name, known)}; known: "
            f"{', '.join(known)}"
        )

    return cast(type[ComponentConfig], importlib.import_module(f"scaletrain.{kind}.{name}").Config)


def _component(kind: str, value: Any) -> ComponentConfig:
    if isinstance(value, ComponentConfig):
        return value

    raw = {"name": value} if isinstance(value, str) else value
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        raise ValueError(f"needs a `name`; known: {', '.join(components(kind))}")

    return component_config(kind, raw["name"]).model_validate(raw)
