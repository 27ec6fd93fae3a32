"""What can be evaluated: the trained encoder of a run or of a file, a network of another library,
the same networks untrained, or raw pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaletrain.checkpoint import files, reader
from scaletrain.config import load as configuration
from scaletrain.config import renamed, schema
from scaletrain.config.recipe import closest
from scaletrain.evals.encoders import checkpoints, libraries
from scaletrain.evals.encoders.encoder import PIXELS, EncoderConfig, Pixels, Weights, load
from scaletrain.evals.encoders.encoder import Encoder as Encoder
from scaletrain.evals.encoders.encoder import EncoderKind as EncoderKind
from scaletrain.evals.errors import EvalError
from scaletrain.nn import backbone
from scaletrain.train.weight_sources import data_of

ENCODER = "backbone"
# Prefix of the encoder's tensors in a checkpoint.
BACKBONE = f"method.{ENCODER}."
# In the metadata of an exported file: the digest of the step's files that it was made from.
DIGEST = "checkpoint"


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

    settings = configuration.load(run / "config.yaml")
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


def find(
    target: str | Path, kind: EncoderKind = "trained", config: EncoderConfig | None = None
) -> Encoder:
    """The encoder of a target. Raises EvalError, ConfigError, CheckpointError or DataError.

    - RUN, RUN/checkpoints/step-N, or a file of `scaletrain export`; a file in RUN/evals/encoders
      is the same encoder as the step that it was made from
    - tv/NAME[:FILE], timm/NAME[:FILE]: a network of torchvision or timm with the weights of a file,
      else with random ones
    - SOURCE:FILE: a checkpoint of another trainer; a source is a file in foreign/

    A text that begins like one of the latter two is not a path; ./tv/NAME is.
    """
    text = str(target)
    source, colon, file = text.partition(":")
    library = text.partition("/")[0] if "/" in text else ""

    if library in libraries.LIBRARIES and not _is_path(target):
        encoder = libraries.find(text, kind, config or EncoderConfig())
    elif colon and source in checkpoints.sources() and not _is_path(target):
        encoder = checkpoints.find(source, Path(file), kind, config or EncoderConfig())
    else:
        _check_path(target, source if colon else "", config)
        encoder = _own(Path(target).absolute(), kind)

    if kind == "untrained":
        encoder = replace(encoder, kind=kind, step=0)
    elif kind == "pixels":
        size = min(encoder.size, PIXELS)
        encoder = replace(encoder, kind=kind, step=0, module=Pixels().eval(), size=size)

    # Networks of other libraries may compute something else from the same tensors.
    state = encoder.module.state_dict()
    differs = {"library": encoder.library} if encoder.library and state else {}
    return replace(encoder, weights=files.fingerprint(state, differs))


def _is_path(target: str | Path) -> bool:
    """Whether a target that looks like another encoder is meant as a path: a Path that exists."""
    return isinstance(target, Path) and target.exists()


def _check_path(target: str | Path, source: str, config: EncoderConfig | None) -> None:
    """Raise EvalError for what is no path, and for settings that only other encoders have."""
    if source and not Path(target).exists():
        known = checkpoints.sources()
        raise EvalError(
            f"{target}: there is no such file, and '{source}' is no trainer whose checkpoints are "
            f"known{closest(source, known)}; known: {', '.join(known)}"
        )
    if config not in (None, EncoderConfig()):
        raise EvalError(
            f"{target}: the settings encoder.* are for encoders of other libraries; this one says "
            "itself how its images were prepared"
        )


def _own(target: Path, kind: EncoderKind) -> Encoder:
    """The encoder of a run, a step or an exported file."""
    of_run = target.parent.parts[-2:] == ("evals", "encoders")
    encoder, weights = (
        _from_file(target)
        if target.is_file() and not of_run
        else _from_run(target, kind == "trained")
    )
    if kind == "trained":
        assert weights is not None, "both sources give weights when asked"
        load(encoder.module, weights, str(encoder.source))

    return encoder


def _from_run(target: Path, trained: bool) -> tuple[Encoder, Weights | None]:
    run = run_of(target)
    settings = configuration.load(run / "config.yaml")
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
    """How long a step was trained, samples and epochs or None, and on which datasets."""
    clock = saved.meta.get("clock", {})
    epochs = clock["step"] / clock["steps_per_epoch"] if clock.get("steps_per_epoch") else None
    return {
        "samples": saved.meta.get("samples"),
        "epochs": epochs,
        "trained_on": data_of(saved.meta),
    }


def _with_export(encoder: Encoder, path: Path) -> tuple[Encoder, Weights]:
    """The encoder of a run with the weights of a file in RUN/evals/encoders."""
    tensors, meta = files.load_file(path)
    try:
        step, trained = int(meta["step"]), _recorded(meta)
        if DIGEST not in meta or path.name != export_of(path, step).name:
            raise ValueError("it was not made from this step")
    except (KeyError, ValueError, AttributeError) as error:
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
        trained = _recorded(meta)
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
    return replace(encoder, **trained), _weights(tensors)


def _recorded(meta: Mapping[str, str]) -> dict[str, Any]:
    """The training of an exported encoder, as `_trained`; files of earlier versions say nothing."""
    said = json.loads(meta.get("trained", "{}"))
    samples, epochs = said.get("samples"), said.get("epochs")
    if not isinstance(samples, int | None) or not isinstance(epochs, int | float | None):
        raise ValueError("`samples` and `epochs` are no numbers")

    listed = said.get("trained_on", [])
    if not isinstance(listed, list) or not all(isinstance(sha256, str) for sha256 in listed):
        raise ValueError("`trained_on` is no list of checksums")

    return {"samples": samples, "epochs": epochs, "trained_on": tuple(listed)}


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
