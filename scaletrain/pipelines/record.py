"""How far a stage is, and of what its results were made: nothing here needs torch.

A training run is finished when its newest good checkpoint is that of its last step and has the
result of the method's work after it, a computation when its folder is there, since that is renamed
into place. `stage.json` in the folder records the options, the results of other stages and the
files that were used, so that a change is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain.config import recipe
from scaletrain.config.fields import PATHS, absolute
from scaletrain.config.recipe import ConfigError
from scaletrain.pipelines import load
from scaletrain.pipelines.load import Stage
from scaletrain.runtime import durable

FILE = "stage.json"
FORMAT = 1
# In the place of the pipeline's folder, which may be moved.
WORK = "${work}"
# Name of the index of a folder of shards, which identifies its content.
INDEX = "scaletrain-index.json"
# Larger files among the options are identified by their size.
_BYTES = 64 << 20


@dataclass(frozen=True)
class Checkpoint:
    """The newest good checkpoint of a run."""

    # Step of the schedule, of `total`.
    step: int
    total: int
    # Of the content of its files.
    sha256: str
    # False where the method still has work to do after the last step (on_end).
    finished: bool = True

    @property
    def last(self) -> bool:
        return self.step == self.total and self.finished


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint whose manifest is intact and whose files have their sizes. Content is
    verified by those who read it.
    """
    folders = sorted((run / "checkpoints").glob("step-*"), key=_number, reverse=True)
    return next((found for folder in folders if (found := _checkpoint(folder))), None)


def _checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder of one step; None where it is not a good one."""
    try:
        raw = (folder / "manifest.json").read_bytes()
        body = raw.partition(b'","body":')[2][:-2]
        if hashlib.sha256(body).hexdigest() != json.loads(raw)["sha256"]:
            return None

        manifest = json.loads(body)
        meta, files = manifest["meta"], manifest["files"]
        if any((folder / name).stat().st_size != one["bytes"] for name, one in files.items()):
            return None

        digest = _digest(sorted(one["sha256"] for one in files.values()))
        step, total = meta["clock"]["step"], meta["clock"]["total"]
        return Checkpoint(step, total, digest, meta.get("finished", True))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _number(folder: Path) -> int:
    text = folder.name.removeprefix("step-")
    return int(text) if text.isdecimal() else -1


# --- records --------------------------------------------------------------------------------------


def read(stage: Stage) -> dict[str, Any] | None:
    """The record of a stage; None where there is none. Raises ConfigError for a damaged one."""
    path = stage.folder / FILE
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise ValueError
        return dict(found)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} is not a record of this version of scaletrain: --redo {stage.name}, or delete "
            "the file if it is that of a training run"
        ) from None


def result(stage: Stage) -> str:
    """Digest of the result of a finished stage; "" of any other."""
    if stage.recipe is not None:
        found = newest(stage.folder)
        return found.sha256 if found and found.last else ""

    record = read(stage)
    return "" if record is None else _digest(record["output"])


def present(stage: Stage, work: Path, results: Mapping[str, str]) -> dict[str, Any]:
    """What the record of a stage is if it is made now. results: by stage, as of `result`."""
    if stage.recipe is not None:
        raw = dict(recipe.apply(recipe.read(stage.recipe), stage.overrides))
        raw.pop("published", None)
        made = {"recipe": _absolute(raw), "init": stage.init, "continue": stage.continues}
    else:
        assert stage.config is not None
        made = {"do": stage.do, "options": stage.config.model_dump(mode="json")}

    return {
        "format": FORMAT,
        "stage": _portable(made, str(work)),
        "inputs": {name: results[name] for name in stage.inputs},
        "files": _identified(made, work) | _sources(stage),
    }


def write(folder: Path, record: Mapping[str, Any]) -> None:
    durable.write(folder / FILE, json.dumps(record, indent=1, default=str) + "\n")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """In what a record differs from the present state, a line each: in the recipe or the options of
    a computation, and in what else was used.
    """
    old, new = (recipe.flat(_plain(side["stage"])) for side in (before, now))
    changed = {
        key: f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    }
    inputs = [
        f"it was made from another result of stage '{name}'"
        for name, digest in now["inputs"].items()
        if before["inputs"].get(name, digest) != digest
    ]
    files = [
        f"{path} has changed since"
        for path, digest in now["files"].items()
        if (known := before["files"].get(path)) and known != digest
    ]

    own = [line for key, line in changed.items() if key.startswith(("recipe.", "options."))]
    others = [line for line in changed.values() if line not in own]
    return own, [*others, *inputs, *files]


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _absolute(value: Any, key: str = "") -> Any:
    """A recipe whose paths do not depend on the working directory."""
    if isinstance(value, Mapping):
        return {inner: _absolute(one, inner) for inner, one in value.items()}
    if isinstance(value, list | tuple):
        return [_absolute(one, key) for one in value]
    # `none` is a value of method.source.
    return absolute(value) if key in PATHS and isinstance(value, str) and value != "none" else value


def _portable(value: Any, work: str) -> Any:
    """A value in which paths below the folder of the pipeline do not depend on its place."""
    if isinstance(value, Mapping):
        return {key: _portable(inner, work) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(inner, work) for inner in value]
    if isinstance(value, str) and (value == work or value.startswith(f"{work}/")):
        return WORK + value.removeprefix(work)
    return value


def _identified(made: Any, work: Path) -> dict[str, str]:
    """Digests of the files, the folders of shards and the runs that options name and no stage has
    made.
    """
    found = {}
    for value in _texts(made):
        for text in recipe.listed(value) if "/" in value else ():
            # Not every text with a slash is a path that the system takes.
            with contextlib.suppress(OSError, ValueError):
                path = Path(text).expanduser().absolute()
                if not path.is_relative_to(work):
                    found.update(_identity(path))

    return found


def _sources(stage: Stage) -> dict[str, str]:
    """Digests of the folders of shards that a computation finds by itself, by what they are."""
    found = dict[str, str]()
    if stage.do and (sources := getattr(load.computation(stage.do), "sources", None)):
        # What cannot be read yet is refused when the stage runs.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for name, folder in sources(stage.config).items():
                if Path(folder).is_dir():
                    found[name] = _shards(Path(folder))

    return found


def _identity(path: Path) -> dict[str, str]:
    """Digest of a file, of a folder of shards, of the newest checkpoint of a run, or of one step of
    its checkpoints.
    """
    if path.is_dir():
        if (path / INDEX).is_file():
            # Not the folder's own name, under which earlier records have the digest of its index.
            return {f"{path}/*.tar": _shards(path)}
        if saved := _checkpoint(path) or newest(path):
            return {str(path): saved.sha256}
        return {f"{path}/*.tar": ""} if next(path.glob("*.tar"), None) else {}

    if not path.is_file():
        return {}

    size = path.stat().st_size
    content = path.read_bytes() if size <= _BYTES else str(size).encode()
    return {str(path): hashlib.sha256(content).hexdigest()}


def _shards(folder: Path) -> str:
    """Digest of the content of a folder's shards, whatever wrote its index; "" without an index:
    not known yet, or known to have changed where it had one.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        listed = json.loads((folder / INDEX).read_bytes())["shards"]
        return _digest([[shard["name"], shard["sha256"]] for shard in listed])

    return ""


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


# --- results of a computation ---------------------------------------------------------------------


def seal(folder: Path) -> dict[str, list[Any]]:
    """Size and sha256 of every file below a folder, by its relative path, once all are on disk."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(place) / name
            with path.open("rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(folder))] = [path.stat().st_size, digest]
        durable.sync(Path(place))

    return dict(sorted(found.items()))


def damaged(stage: Stage, record: Mapping[str, Any]) -> str:
    """A file of a finished computation that is missing or has another size; "" where all are
    there.
    """
    for name, (size, _) in record["output"].items():
        path = stage.folder / name
        if not path.is_file() or path.stat().st_size != size:
            return str(path)

    return ""
