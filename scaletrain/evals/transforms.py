"""The deterministic transform of an evaluation: from a decoded image to what an encoder sees,
before normalisation.

The images of a data set are decoded, their border is cut off, they are resized and cropped by one
of the papers' protocols, and then corrupted, if so configured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from scaletrain import rng
from scaletrain.config.schema import Frozen
from scaletrain.data.errors import ImageError
from scaletrain.data.transforms import crop
from scaletrain.data.transforms.image import Pixels

Resize = Literal["none", "byol", "tv", "simclr-transfer", "native"]
# A corruption of an image [S, S, 3] uint8 at a severity of 1 to 5; it draws all that is random
# from the generator, and returns an image of the same shape and type.
Corruption = Callable[[Pixels, int, np.random.Generator], Pixels]
# The corruptions by name.
CORRUPTIONS: dict[str, Corruption] = {}


def check(corruption: str, severity: int) -> None:
    """Raise ValueError unless there is such a corruption, or none."""
    if bool(corruption) != bool(severity):
        raise ValueError(
            "a corruption needs a severity of 1 to 5, and a severity belongs to a corruption"
        )
    if corruption and corruption not in CORRUPTIONS:
        known = ", ".join(sorted(CORRUPTIONS)) or "none"
        raise ValueError(f"unknown corruption '{corruption}'; available: {known}")


class Transform(Frozen):
    """From an image [H, W, 3] uint8 to the input of an encoder, [size, size, 3] uint8."""

    resize: Resize
    """A protocol of data/transforms/crop.py::evaluate."""

    size: Annotated[int, Field(ge=8, le=4096)]
    """Pixels of each side."""

    border: Annotated[int, Field(ge=0, le=1024)] = 0
    """Pixels that are cut off at each side of the image before the resize; ObjectNet's images have
    a red border of 2."""

    corruption: str = ""
    """Of the resized image, by its name in CORRUPTIONS; empty for none."""

    severity: Annotated[int, Field(ge=0, le=5)] = 0
    """Of the corruption, from 1; 0 without one."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of the corruption."""

    @model_validator(mode="after")
    def _possible(self) -> Transform:
        check(self.corruption, self.severity)
        return self

    @property
    def digest(self) -> str:
        """Of all options: two transforms with the same digest give the same pixels."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    def __call__(self, image: Pixels, sample: int) -> Pixels:
        """Transform one image; `sample` is its number in the shards. Raises ImageError."""
        height, width = image.shape[:2]
        if self.border:
            if min(height, width) <= 2 * self.border:
                raise ImageError(
                    f"{width} x {height} pixels: nothing is left without a border of {self.border}"
                )
            image = image[self.border : height - self.border, self.border : width - self.border]

        view = crop.evaluate(image, self.size, self.resize)
        if not self.corruption:
            return view

        key = int(rng.hash64(self.seed, sample, self.corruption, self.severity))
        generator = np.random.default_rng(key & (1 << 64) - 1)
        return CORRUPTIONS[self.corruption](view.copy(), self.severity, generator)
