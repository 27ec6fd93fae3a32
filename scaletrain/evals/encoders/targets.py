"""The encoder under evaluation: the trained encoder of a run or of an exported file, the same
network untrained, or raw pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scaletrain.checkpoint import files, reader
from scaletrain.config import load, renamed, schema
from scaletrain.config.recipe import closest
from scaletrain.evals.errors import EvalError
from scaletrain.nn import backbone

EncoderKind = Literal["trained", "untrained", "pixels"]
ENCODER = "backbone"
# Prefix of the encoder's tensors in a checkpoint.
BACKBONE = f"method.{ENCODER}."
# Image size of the raw-pixel baseline, unless the run's is smaller.
PIXELS = 32
# In the metadata of an exported file: the digest of the step's files that it was made from.
DIGEST = "checkpoint"


@dataclass(frozen=True)
class Encoder:
    """An encoder, where it comes from, and how its images must be prepared."""

    kind: EncoderKind
    module: nn.Module  # [N, 3, H, W] normalised -> [N, D], in eval mode
    # optimizer steps of its training; 0 for the two baselines
    step: int
    # of the run
    seed: int
    # pixels
    size: int
    data: schema.DataConfig
    # checkpoint folder, exported file, or run folder of a baseline
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

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the encoder in results. The normalisation of images belongs to it, since
        the encoder was trained with it.
        """
        network = None if self.kind == "pixels" else self.model.model_dump(mode="json")
        normalised = {"mean": self.data.mean, "std": self.data.std}

        return {
            "kind": self.kind,
            "step": self.step,
            "weights": self.weights,
            "model": network,
            **normalised,
        }

    @property
    def about(self) -> str:
        """A description for results."""
        return {
            "trained": "backbone in eval mode, running batch-norm statistics",
            "untrained": f"the same network with fresh weights of seed {self.seed}, batch-norm "
            "statistics as initialised "
            "(mean 0, variance 1), eval mode",
            "pixels": f"normalised pixels of the {self.size} px image, flattened and divided by "
            "the root of their number",
        }[self.kind]


class Pixels(nn.Module):
    """[N, 3, H, W] -> [N, 3 * H * W] of mean square 1 / (3 * H * W), so that a probe's learning
    rates suit any image size.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / math.sqrt(x.shape[1:].numel())


def describe(settings: schema.Config, step: int) -> dict[str, str]:
    """Metadata of an exported file, which `find` needs to evaluate it."""
    data = settings.data
    kept = data.model_dump(
        mode="json", include={"mean", "std", "path", "subset", "on_bad", "max_bad", "max_pixels"}
    )
    facts = {"size": _size(data), **kept}

    return {
        "model": settings.model.model_dump_json(),
        "data": json.dumps(facts),
        "step": str(step),
        "seed": str(settings.seed),
    }


def export(run: Path, saved: reader.SavedStep, module: str, path: Path) -> int:
    """Write a module of a saved step to one file; returns the number of its tensors. Raises
    EvalError, listing the modules, where there is none of this name.
    """
    prefix = f"method.{module}."
    names = {name.removeprefix(prefix): name for name in saved.names() if name.startswith(prefix)}
    if not names:
        parts = (name.split(".") for name in saved.names())
        known = dict.fromkeys(part[1] for part in parts if part[0] == "method" and len(part) > 2)
        raise EvalError(
            f"{saved.path} has no module '{module}'{closest(module, known)}; it has: "
            f"{', '.join(known)}"
        )

    settings = load.load(run / "config.yaml")
    if module == ENCODER:
        trained = json.dumps(_trained(saved))
        meta = describe(settings, saved.step) | {"trained": trained, DIGEST: saved.digest}
    else:
        meta = {
            "module": module,
            "method": settings.method.model_dump_json(),
            "step": str(saved.step),
            "seed": str(settings.seed),
        }

    tensors = {short: saved.read(name).view(saved.shape(name)) for short, name in names.items()}
    files.export(tensors, path, meta)
    return len(tensors)


# Shapes by name, and a function that reads a tensor.
Weights = tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]


# --- places of a run's steps and encoders ---------------------------------------------------------


def held(run: Path, step: int) -> Path:
    """The folder where a step is kept by links while it is evaluated."""
    return reader.folder_of(run / "evals" / "held", step)


def export_of(run: Path, step: int) -> Path:
    """The file with the encoder of a step, which its evaluations share."""
    return run / "evals" / "encoders" / f"{held(run, step).name}.safetensors"


def run_of(target: Path) -> Path:
    """The run folder of RUN, of a step in RUN/checkpoints or RUN/evals/held, or of a file in
    RUN/evals/encoders. Raises EvalError.
    """
    run = target.parents[1] if target.parent.name == "checkpoints" else target
    if target.parent.parts[-2:] in (("evals", "held"), ("evals", "encoders")):
        run = target.parents[2]

    if not (run / "config.yaml").is_file():
        raise EvalError(
            f"{target}: neither a run folder (no {run / 'config.yaml'}) nor an exported "
            ".safetensors file"
        )

    return run


def step_of(target: Path, prefix: str = "") -> reader.SavedStep:
    """The newest good checkpoint of RUN, or a step of it; of a file in RUN/evals/encoders, the step
    that it was made from. Raises EvalError or CheckpointError.

    prefix: as in reader.open_step.
    """
    run = run_of(target)
    if target.is_file():
        name = target.stem
        places = (run / "evals" / "held" / name, run / "checkpoints" / name)
        target = next((p for p in places if (p / reader.MANIFEST).is_file()), places[1])

    root = target / "checkpoints"
    saved = reader.latest(root, prefix) if run == target else reader.open_step(target, prefix)
    if saved is None:
        raise EvalError(
            f"{root}: no good checkpoint yet; let the run save one, or evaluate the untrained "
            "encoder"
        )

    return saved


# --- encoders -------------------------------------------------------------------------------------


def find(target: Path, kind: EncoderKind = "trained") -> Encoder:
    """The encoder of RUN, RUN/checkpoints/step-N or FILE.safetensors. Raises EvalError, ConfigError
    or CheckpointError.

    A file in RUN/evals/encoders is the same encoder as the step that it was made from.
    """
    # `cd RUN/checkpoints; scaletrain eval step-N` has no parent otherwise
    target = target.absolute()
    own = target.parent.parts[-2:] == ("evals", "encoders")
    encoder, weights = (
        _from_file(target) if target.is_file() and not own else _from_run(target, kind == "trained")
    )

    if kind == "trained":
        assert weights is not None, "both sources give weights when asked"
        _load(encoder.module, weights, str(encoder.source))
    elif kind == "untrained":
        encoder = replace(encoder, kind=kind, step=0)
    else:
        encoder = replace(
            encoder, kind=kind, step=0, module=Pixels().eval(), size=min(encoder.size, PIXELS)
        )

    return replace(encoder, weights=files.fingerprint(encoder.module.state_dict(), {}))


def _from_run(target: Path, trained: bool) -> tuple[Encoder, Weights | None]:
    run = run_of(target)
    settings = load.load(run / "config.yaml")
    fresh = _fresh(settings.model, settings.data, settings.seed)
    size, data, home = _size(settings.data), settings.data, run / "evals"
    encoder = Encoder(
        "trained", fresh, 0, settings.seed, size, data, run, home, run, settings.model
    )

    if not trained:
        return encoder, None
    if target.is_file():
        return _with_export(encoder, target)

    saved = step_of(target, BACKBONE)
    weights = (
        {name.removeprefix(BACKBONE): tuple(saved.shape(name)) for name in saved.names()},
        lambda short: saved.read(BACKBONE + short),
    )
    return replace(encoder, step=saved.step, source=saved.path, **_trained(saved)), weights


def _trained(saved: reader.SavedStep) -> dict[str, Any]:
    """How long a step was trained: samples and epochs, or None."""
    clock = saved.meta.get("clock", {})
    epochs = clock["step"] / clock["steps_per_epoch"] if clock.get("steps_per_epoch") else None
    return {"samples": saved.meta.get("samples"), "epochs": epochs}


def _with_export(encoder: Encoder, path: Path) -> tuple[Encoder, Weights]:
    """The encoder of a run with the weights of a file in RUN/evals/encoders."""
    tensors, meta = files.load_file(path)
    try:
        step, trained = int(meta["step"]), json.loads(meta["trained"])
        if DIGEST not in meta or path.name != export_of(path, step).name:
            raise ValueError("it was not made from this step")
        trained = {key: trained[key] for key in ("samples", "epochs")}
    except (KeyError, ValueError, TypeError) as error:
        raise EvalError(
            f"{path} is not the encoder of a step of {encoder.run} ({error}); move it to another "
            "folder to evaluate it, or delete it"
        ) from None

    return replace(encoder, step=step, source=path, **trained), _weights(tensors)


def _from_file(path: Path) -> tuple[Encoder, Weights]:
    tensors, meta = files.load_file(path)
    if module := meta.get("module"):
        raise EvalError(
            f"{path} holds the module '{module}' of a run and no encoder to evaluate; "
            "`scaletrain export RUN FILE` without --module writes the encoder"
        )

    try:
        # files that were exported earlier may have earlier keys
        saved = renamed.translated({"model": json.loads(meta["model"])})
        model = schema.ModelConfig.model_validate(saved["model"])
        facts = json.loads(meta["data"])
        size = schema.View.model_validate({"size": facts.pop("size")}).size
        step, seed = int(meta.get("step", "0")), int(meta.get("seed", "0"))
        data = schema.DataConfig.model_validate(facts)
    except (
        KeyError,
        ValueError,
        AttributeError,
    ) as error:  # pydantic's and json's errors are ValueErrors
        raise EvalError(
            f"{path}: its metadata does not describe the model and the images "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); make the file with "
            "`scaletrain export RUN FILE`"
        ) from None

    encoder = Encoder(
        "trained", _fresh(model, data, seed), step, seed, size, data, path, path.parent, None, model
    )
    return encoder, _weights(tensors)


def _weights(tensors: dict[str, Tensor]) -> Weights:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__


def _size(data: schema.DataConfig) -> int:
    """Size of the largest view in use, in pixels."""
    return max(view.size for view in data.views if view.count)


def _fresh(model: schema.ModelConfig, data: schema.DataConfig, seed: int) -> nn.Module:
    """An untrained network in eval mode, initialised from the seed; the caller's random generator
    is not touched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return backbone.build(model, data).eval().requires_grad_(False)


def _load(model: nn.Module, weights: Weights, source: str) -> None:
    """Load all tensors. Raises EvalError, before any is read, for the first that is missing, of
    another shape or unknown.
    """
    shapes, read = weights
    wanted = model.state_dict()

    for name, tensor in wanted.items():
        if name not in shapes:
            raise EvalError(
                f"{source}: does not fit the model: it has no tensor '{name}' {list(tensor.shape)}"
            )
        if shapes[name] != tuple(tensor.shape):
            raise EvalError(
                f"{source}: does not fit the model: '{name}' is {list(shapes[name])}, the model "
                f"has {list(tensor.shape)}"
            )

    if extra := [name for name in shapes if name not in wanted]:
        raise EvalError(
            f"{source}: does not fit the model, which has no tensor '{extra[0]}' "
            f"{list(shapes[extra[0]])}"
        )

    for name, tensor in wanted.items():
        tensor.copy_(read(name).view(tensor.shape))
