"""The `data` section of a configuration: shards, cache, loader, and the random views."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from scaletrain.config.fields import Count, Frozen, Natural, Place, Positive, Range, Share
from scaletrain.config.recipe import long, shards

Places = Annotated[Place, BeforeValidator(shards, json_schema_input_type=str | list[str])]
# largest area of a crop, in areas of its image
MOST_SCALE = 16


class View(Frozen):
    """One kind of random view. Colour parameters mean what torchvision's ColorJitter means
    by them.
    """

    size: Annotated[int, Field(ge=8, le=4096)] = 224
    """Pixels of the square view."""

    count: Natural = 1
    """Views of this kind per sample; 0 disables it, for studies of views."""

    scale: Range = (0.08, 1.0)
    """Range of the share of the image that a crop covers. With an upper bound above 1, a crop may
    extend beyond the image, which is filled with data.mean (random scaling with padding).
    """

    ratio: Range = (3 / 4, 4 / 3)
    crop: Share = 1.0
    """Probability of cropping at all; otherwise the whole image is resized."""

    interpolation: Literal["bilinear", "bicubic", "keys"] = "bicubic"
    """keys: TensorFlow's bicubic, which is never antialiased."""

    antialias: bool = True
    """Widen the filter when reducing an image, as Pillow does."""

    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.2
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    grayscale: Share = 0.2
    blur: Share = 0.5
    sigma: Range = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels at size 224; scaled with the view's size."""

    solarize: Share = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> View:
        for name in ("scale", "ratio", "sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} is a range (low, high) with 0 < low <= high, got ({low}, {high})"
                )

        if self.scale[1] > MOST_SCALE:
            raise ValueError(
                f"scale is a share of the image, at most {MOST_SCALE}, got {self.scale[1]}"
            )
        if self.interpolation == "keys" and self.antialias:
            raise ValueError(
                "interpolation keys is TensorFlow's bicubic without antialiasing: add antialias: "
                "false"
            )

        return self


class MixturePart(Frozen):
    """One of the data sets of a mixture."""

    path: Annotated[Place, Field(min_length=1)]
    """Folder of tar shards."""

    weight: Positive
    """Share of the samples drawn, relative to the other parts."""


class CacheConfig(Frozen):
    """Cache of whole remote shards (http://, https://, s3://) on the node's disk, shared by its
    ranks.
    """

    path: Place = ""
    """Folder on this node; "": the folder for temporary files."""

    bytes: Count = 100_000_000_000
    """Size of the cache; the oldest shards are deleted. A run prints how much it needs."""

    stage: bool = False
    """Copy shards of local folders too: for parallel file systems, where random reads are slow."""


class SupportConfig(Frozen):
    """Labelled samples that come with every batch, equally many per class, for auxiliaries that
    need them (suncet).
    """

    path: Place = ""
    """Folder of shards; "": data.path."""

    labels: Place = ""
    """File written by scaletrain shards subset: the samples whose labels may be used; "": all
    samples of `path`, which must be set.
    """

    classes: Count = 10
    """Classes per step; they alternate."""

    per_class: Annotated[int, Field(ge=2)] = 2
    """Samples per class and step."""

    epochs: Positive = 100.0
    """Epochs from the start in which steps have labelled samples."""


class ForegroundConfig(Frozen):
    """Foreground masks of the samples, and studies of them."""

    masks: bool = False
    """Crop a foreground mask with the large views: the first of data.maps of kind foreground, else
    the member `key.mask.png`.
    """

    good_crops: Share = 0.0
    """Share of samples whose large crops are drawn again until they contain foreground; needs
    masks.
    """

    good_cover: Share = 0.25
    """Share of the foreground that such a crop contains."""

    study: Literal["", "points", "rectangle", "centred", "add", "remove", "box"] = ""
    """Degrade the masks, see mask_ablations.py."""

    study_share: Share = 0.5
    """Size of the change that `study` makes."""


class MapConfig(Frozen):
    """A map of every sample: an image of the same height and width with a number for each pixel."""

    path: Places = ""
    """Folder of shards, or a list of folders, whose images are the maps: that of a sample has its
    whole key; "": the members `key.mask.png` of the samples themselves.
    """

    kind: Literal["foreground", "classes", "grey"] = "foreground"
    """foreground: 1 where the map is not black, else 0; classes: the grey value or palette index of
    a PNG of 8 bits, 255 is void; grey: the grey value, as a number in [0, 1].
    """

    on_missing: Literal["raise", "none"] = "raise"
    """What to do with samples without a map: stop, or use one that is all foreground or all void
    (kind classes).
    """

    on_foreign: Literal["raise", "ignore"] = "raise"
    """What to do with maps in `path` that belong to no sample of the data."""

    @model_validator(mode="after")
    def _neutral(self) -> MapConfig:
        if self.kind == "grey" and self.on_missing == "none":
            raise ValueError(
                "on_missing: none is for kinds foreground and classes; no grey value stands for a "
                "missing map"
            )

        return self


class DataConfig(Frozen):
    path: Places = ""
    """Folder of tar shards, local, http(s)://HOST/FOLDER or s3://BUCKET/FOLDER; FOLDER/*.tar; a
    list of these; or `synthetic`.
    """

    cache: CacheConfig = CacheConfig()
    mixture: tuple[MixturePart, ...] = ()
    """Instead of path: several folders that every batch draws from."""

    subset: Place = ""
    """File written by scaletrain shards subset: the only samples that are used; "": all samples."""

    groups: Place = ""
    """File with an integer for each sample in use, such as its cluster, which methods get as
    Batch.groups; "": none.
    """

    epoch_samples: Natural = 0
    """Samples per epoch; 0: as many as the data has."""

    lanes: Count = 64
    """Shuffle lanes: equal parts of an epoch's samples, each of which feeds every batch."""

    window: Count = 16
    """Shuffle window: number of shards within which a lane shuffles."""

    workers: Natural = 4
    """Loader processes per rank; 0 loads in the training process."""

    prefetch: Annotated[int, Field(ge=1, le=100)] = 2
    """Batches that each worker prepares ahead."""

    timeout: Positive = 300.0
    """Seconds without a batch before the run ends, with exit code 75."""

    liveness: Positive = 60.0
    """Seconds without progress (a new image, received bytes) of a worker before the run ends, with
    exit code 75.
    """

    foreground: ForegroundConfig = ForegroundConfig()
    maps: tuple[MapConfig, ...] = ()
    """Maps of every sample that are cropped, flipped and scaled with its large views."""

    on_bad: Literal["raise", "skip"] = "raise"
    """What to do with a sample that cannot be read: stop, or replace it by another and count it."""

    max_bad: Share = 0.001
    """Share of the samples that may be replaced before the run stops."""

    max_pixels: Count = 50_000_000
    """Larger images are refused before decoding."""

    synthetic_samples: Count = 1_281_167
    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)
    """Mean of pixels in [0, 1]; mean 0 and std 1 leave them unchanged."""

    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    augment: Literal["worker", "device"] = "worker"
    """Where color, blur and flips are computed; crops are always computed in the worker."""

    views: tuple[View, ...] = (View(count=2),)
    support: SupportConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return long("data", value)

    @model_validator(mode="after")
    def _some_views(self) -> DataConfig:
        if not any(view.count for view in self.views):
            raise ValueError("views is empty; a method needs at least one view")
        return self

    @model_validator(mode="after")
    def _foreground(self) -> DataConfig:
        for field in ("good_crops", "study"):
            if getattr(self.foreground, field) and not self.masked:
                raise ValueError(
                    f"foreground.{field} needs the foreground; add data.foreground.masks=true"
                )
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> DataConfig:
        if self.path and self.mixture:
            raise ValueError(
                "path and mixture exclude each other; clear one with data.path='' or "
                "data.mixture=[]"
            )

        return self

    @property
    def all_maps(self) -> tuple[MapConfig, ...]:
        """The maps that are read: `maps`, and the samples' own masks if `foreground` asks for masks
        and none of `maps` is one.
        """
        own = self.foreground.masks and all(item.kind != "foreground" for item in self.maps)
        return (*self.maps, MapConfig()) if own else self.maps

    @property
    def masked(self) -> bool:
        """Whether batches have foreground masks."""
        return any(item.kind == "foreground" for item in self.all_maps)

    def plain(self, **changes: Any) -> DataConfig:
        """This data with `changes`, without maps, studies of the foreground and labelled samples,
        which only training steps use.
        """
        off = {"maps": (), "foreground": ForegroundConfig(), "support": None}
        return self.model_copy(update={**off, **changes})
