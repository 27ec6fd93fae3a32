"""The deterministic transform of an evaluation."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import Field

from scaletrain.config.schema import Frozen

Resize = Literal["none", "byol", "tv"]


class Transform(Frozen):
    """How an image becomes the input of an encoder, before normalisation."""

    resize: Resize
    size: Annotated[int, Field(ge=8, le=4096)]
    """Pixels of each side."""

    @property
    def digest(self) -> str:
        """Of all options: two transforms with the same digest give the same pixels."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]
