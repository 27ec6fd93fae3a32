"""Write shards from a classification data set of torchvision."""

from __future__ import annotations

import inspect
import io
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from scaletrain.data.errors import DataError
from scaletrain.data.format.tar import MEMBER_BYTES
from scaletrain.data.transforms import image
from scaletrain.importers import command
from scaletrain.importers.sources import clutter, digest, one, plain
from scaletrain.importers.write import MAX_PIXELS, Entry, How, Source
from scaletrain.runtime import local_files

UNPICKLED = {"CIFAR10": "cifar10", "CIFAR100": "cifar100"}


@command.importer
def main(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="CLASS", help="As in torchvision.datasets: Food101, DTD, STL10, ..."
        ),
    ],
    root: Annotated[
        Path, typer.Argument(metavar="ROOT", help="The folder that torchvision calls root.")
    ],
    dest: command.Splits,
    how: How,
    split: Annotated[
        list[str] | None,
        typer.Option(help="May be repeated [train and test; data sets without splits: none]."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="For the class; may be repeated.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Let torchvision fetch the data set into ROOT first.")
    ] = False,
) -> None:
    """Write shards from a classification data set of torchvision: DEST/SPLIT for each split, or
    DEST if there are none.

    Image files are taken as they are, arrays become PNG. Samples whose target is not one whole
    number are refused; a target of -1, as of STL10's split `unlabeled`, is no label.
    """
    given = dict(_pair(text) for text in option or [])
    splits = {name: _Set(dataset, root, name, given, download) for name in _splits(dataset, split)}
    sources: dict[str, Source] = dict(splits)

    with _recorded():
        for source in splits.values():
            # a data set of another kind is refused before anything is written
            source.load(0)
        command.save(dest, sources, how, "" if "" not in splits else "train")


class _Set:
    """One split of a data set, used inside `_recorded`. Raises DataError."""

    labelled = True

    def __init__(
        self, name: str, root: Path, split: str, options: dict[str, Any], download: bool
    ) -> None:
        parameters = inspect.signature(_class(name)).parameters
        given = dict(options)
        if split:
            given |= {"train": split == "train"} if "train" in parameters else {"split": split}

        if download and "download" not in parameters:
            raise DataError(f"torchvision cannot download {name}; put it into {root} yourself")

        unknown = [key for key in given if key not in parameters]
        if unknown:
            raise DataError(f"{name} has no option '{unknown[0]}', only {', '.join(parameters)}")

        self.ignored: Counter[str] = Counter()
        self.text = f"{name} {split}".strip()
        self.key = repr((name, given))
        if download:
            given["download"] = True

        if "root" in parameters:
            given["root"] = str(root)

        try:
            self.dataset = _class(name)(**given)
        except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
            fix = "; fetch it with --download" if "download" in parameters and not download else ""
            raise DataError(f"{self.text} in {root}: {' '.join(str(error).split())}{fix}") from None

        self.classes = tuple(plain(str(name)) for name in getattr(self.dataset, "classes", ()))
        if odd := next((name for name in self.classes if clutter(name)), ""):
            raise DataError(
                f"{self.text} in {root}: torchvision takes the folder {odd} for a class; remove "
                "it, or use `scaletrain shards folder`"
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, number: int) -> str:
        return f"{self.text}, sample {number}"

    def load(self, number: int) -> Entry:
        _seen.files = []
        try:
            sample = self.dataset[number]
        except Exception as error:  # whatever the data set's own code raises
            raise DataError(f"cannot be read ({type(error).__name__}: {error})") from None
        finally:
            files, _seen.files = _seen.files, None

        if (
            not isinstance(sample, tuple)
            or len(sample) != 2
            or not isinstance(sample[0], Image.Image)
        ):
            raise DataError(f"{self.text} does not give pairs of image and label")

        label = self._label(sample[1])
        data = files[0] if len(files) == 1 else image.png(np.asarray(sample[0].convert("RGB")))
        name = "none" if label < 0 else self.classes[label] if self.classes else str(label)
        return Entry(name, data if image.kind(data) else _png(data), one(label))

    def digest(self) -> str:
        return digest(self.classes, [], self.key.encode())

    def _label(self, target: Any) -> int:
        try:
            # numpy's and torch's numbers
            label = target.item() if hasattr(target, "item") else target
        except (ValueError, RuntimeError):
            label = None

        if not isinstance(label, int):
            raise DataError(
                f"{self.text}: a target of type {type(target).__name__} is no single label; see "
                "--option"
            )
        if label < -1 or (self.classes and label >= len(self.classes)):
            raise DataError(
                f"{self.text}: label {label} is outside the {len(self.classes)} classes"
            )

        return label


class _Seen(threading.local):
    # of the sample that this thread loads
    files: list[bytes] | None = None


_seen = _Seen()


@contextmanager
def _recorded() -> Iterator[None]:
    """While a data set loads a sample, keep the bytes of the file that it opens as an image, and
    spare it the decoding.
    """
    real = Image.open

    def record(file: Any, *rest: Any, **named: Any) -> Image.Image:
        if _seen.files is None:
            return real(file, *rest, **named)

        _seen.files.append(
            file.read() if hasattr(file, "read") else local_files.read(file, MEMBER_BYTES)
        )
        return Image.new("RGB", (1, 1))

    Image.open = record  # type: ignore[assignment]
    try:
        yield
    finally:
        Image.open = real


def _png(data: bytes) -> bytes:
    """An image file that shards do not hold (PPM, BMP, GIF, TIFF), as PNG."""
    try:
        with Image.open(io.BytesIO(data), formats=("PPM", "BMP", "GIF", "TIFF")) as found:
            if found.width * found.height > MAX_PIXELS:
                raise DataError(f"{found.width} x {found.height} pixels are too many")
            return image.png(np.asarray(found.convert("RGB")))
    except OSError as error:
        raise DataError(f"the image is damaged ({error})") from None


def _class(name: str) -> Any:
    import torchvision

    found = getattr(torchvision.datasets, name, None)
    if name in UNPICKLED:
        raise DataError(
            f"torchvision unpickles {name}: take `scaletrain shards {UNPICKLED[name]}`, "
            "which reads the same files and runs nothing"
        )
    if not isinstance(found, type) or not issubclass(found, torchvision.datasets.VisionDataset):
        raise DataError(
            f"torchvision.datasets has no data set '{name}'; names are written as there: Food101, "
            "DTD, STL10"
        )

    return found


def _splits(name: str, wanted: list[str] | None) -> list[str]:
    parameters = inspect.signature(_class(name)).parameters
    if "train" not in parameters and "split" not in parameters:
        if wanted:
            raise DataError(f"{name} has no splits; leave --split out")
        return [""]

    chosen = wanted or ["train", "test"]
    if "train" in parameters and not set(chosen) <= {"train", "test"}:
        raise DataError(f"the splits of {name} are train and test")

    return chosen


def _pair(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise DataError(f"--option {text}: write NAME=VALUE")
    words: dict[str, Any] = {"true": True, "false": False}
    return name, words.get(value.lower(), int(value) if value.isdigit() else value)
