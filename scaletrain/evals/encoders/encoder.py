"""The encoder under evaluation, and how its weights are checked and loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from scaletrain.config import schema
from scaletrain.evals.errors import EvalError

EncoderKind = Literal["trained", "untrained", "pixels"]
# Image size of the raw-pixel baseline, unless the encoder's is smaller.
PIXELS = 32
# Shapes by name, and a function that reads a tensor.
Weights = tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]


class EncoderConfig(schema.Frozen):
    """How an encoder of another library is used; a run and an exported file say it themselves."""

    mean: tuple[schema.Share, schema.Share, schema.Share] | None = None
    """Mean of pixels in [0, 1]; null: that of the library."""

    std: tuple[schema.Positive, schema.Positive, schema.Positive] | None = None
    """Standard deviation of pixels; null: that of the library."""

    seed: schema.Natural = 0
    """Seed of the weights where no file of weights is given."""


@dataclass(frozen=True)
class Encoder:
    """An encoder, where it comes from, and how its images must be prepared."""

    kind: EncoderKind
    module: nn.Module  # [N, 3, H, W] normalised -> [N, D], in eval mode
    # optimizer steps of its training; 0 for the two baselines and where it is not known
    step: int
    # of its random weights
    seed: int
    # pixels
    size: int
    data: schema.DataConfig
    # checkpoint folder, file of weights, or run folder of a baseline
    source: Path
    # where results go
    home: Path
    # the run folder, if there is one
    run: Path | None
    model: schema.ModelConfig
    # sha256 of the loaded tensors: names, types, shapes, values
    weights: str = ""
    # drawn by its training, and how many epochs that was; None: not known
    samples: int | None = None
    epochs: float | None = None
    # sha256 of the datasets of its training and of what it started from, as far as they are known
    trained_on: tuple[str, ...] = ()
    # of an encoder that is not ours, e.g. tv or moco
    library: str = ""
    # what was done to load it
    notes: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the encoder in results. The normalisation of images belongs to it, since
        the encoder was trained with it; so does the library, whose network may differ from ours.
        """
        network = None if self.kind == "pixels" else self.model.model_dump(mode="json")
        normalised = {"mean": self.data.mean, "std": self.data.std}
        library = {"library": self.library} if self.library and self.kind != "pixels" else {}

        return {
            "kind": self.kind,
            "step": self.step,
            "weights": self.weights,
            "model": network,
            **normalised,
            **library,
        }

    @property
    def name(self) -> str:
        """The encoder in the names of files, where it belongs to no run."""
        parts = [self.library, self.source.stem]
        if self.model.name.partition("/")[0] == self.library:
            parts.insert(1, self.model.name.partition("/")[2])

        # without a file of weights the source is the name of the network
        name = re.sub(r"[^\w.-]", "-", "-".join(dict.fromkeys(filter(None, parts))))
        # a result is no hidden file
        return name.lstrip(".-") or "encoder"

    @property
    def about(self) -> str:
        """A description for results."""
        text = {
            "trained": "backbone in eval mode, running batch-norm statistics",
            "untrained": f"the same network with fresh weights of seed {self.seed}, batch-norm "
            "statistics as initialised "
            "(mean 0, variance 1), eval mode",
            "pixels": f"normalised pixels of the {self.size} px image, flattened and divided by "
            "the root of their number",
        }[self.kind]
        return f"{text}; {self.notes}" if self.notes and self.kind == "trained" else text


class Pixels(nn.Module):
    """[N, 3, H, W] -> [N, 3 * H * W] of mean square 1 / (3 * H * W), so that a probe's learning
    rates suit any image size.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / math.sqrt(x.shape[1:].numel())


def load(model: nn.Module, weights: Weights, source: str) -> None:
    """Load all tensors. Raises EvalError, before any is read, for the first that is missing, of
    another shape or unknown.
    """
    shapes, read = weights
    wanted = model.state_dict()
    check(shapes, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, source)

    for name, tensor in wanted.items():
        tensor.copy_(read(name).view(tensor.shape))


def check(
    shapes: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], source: str
) -> None:
    """Raise EvalError for the first tensor that is missing, of another shape or unknown."""
    for name, shape in wanted.items():
        if name not in shapes:
            raise EvalError(
                f"{source}: does not fit the model: it has no tensor '{name}' {list(shape)}"
            )
        if shapes[name] != shape:
            raise EvalError(
                f"{source}: does not fit the model: '{name}' is {list(shapes[name])}, the model "
                f"has {list(shape)}"
            )

    if extra := [name for name in shapes if name not in wanted]:
        raise EvalError(
            f"{source}: does not fit the model, which has no tensor '{extra[0]}' "
            f"{list(shapes[extra[0]])}"
        )
