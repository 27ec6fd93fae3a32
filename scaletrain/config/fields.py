"""Building blocks of the configuration schema: the base model, number types and paths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from scaletrain.config.recipe import listed, shards

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Range = tuple[float, float]
# Keys whose value is a file or folder.
PATHS = ("path", "labels", "subset", "groups", "source")


def absolute(path: str) -> str:
    """The absolute form of a path, or of each path in a list; addresses stay as they are.

    A saved configuration must mean the same from any working directory.
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
    """Base of all configuration: immutable, without unknown keys, documented field by field."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
