"""Write shards from ImageNet (ILSVRC): from folders, or straight from its tar archives."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from scaletrain.data.errors import DataError
from scaletrain.importers import command
from scaletrain.importers.sources import Files, clutter, inside, is_image, plain, tree
from scaletrain.importers.tar_source import Place, TarFiles, members
from scaletrain.importers.write import How, Source

WNID = re.compile(r"n\d{8}")
TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
FORMS = (
    "Kaggle's LOC_val_solution.csv, lines such as `ILSVRC2012_val_00000001.JPEG n01751748`, "
    "or "
    "50,000 lines of one wnid"
)


@command.importer
def main(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Folder that holds train and val, as folders or as tars."
        ),
    ],
    dest: command.Splits,
    how: How,
    classes: Annotated[
        Path | None, typer.Option(help="Keep the classes of this file only, one wnid a line.")
    ] = None,
    val_labels: Annotated[
        Path | None, typer.Option(help=f"Classes of a flat val: {FORMS}.")
    ] = None,
) -> None:
    """Write shards from ImageNet (ILSVRC): DEST/train and DEST/val, whichever of the two SRC has.

    SRC/train/WNID/*.JPEG or SRC/ILSVRC2012_img_train.tar (the tar of tars); SRC/val/WNID/*.JPEG, or
    SRC/val/*.JPEG or SRC/ILSVRC2012_img_val.tar with --val-labels. Tars are read where they are,
    and never unpacked. Kaggle's SRC is ILSVRC/Data/CLS-LOC. Classes are numbered by sorted wnid;
    --classes takes such a list as ImageNet-100's.
    """
    splits = {
        split: found for split in ("train", "val") if (found := find(source, split, val_labels))
    }

    if not splits:
        raise DataError(f"{source} has none of train/, val/, {', '.join(TARS.values())}")

    numbered = chosen(splits, classes)
    command.save(dest, {split: found.source(numbered) for split, found in splits.items()}, how)


@dataclass(frozen=True)
class Found:
    """The images of a split: of a folder (paths) or of a tar (places), with the class of each."""

    root: Path
    images: list[str] | list[Place]
    wnids: list[str]
    ignored: Counter[str]

    def source(self, classes: tuple[str, ...]) -> Source:
        numbers = {wnid: number for number, wnid in enumerate(classes)}
        kept = [
            (image, numbers[wnid])
            for image, wnid in zip(self.images, self.wnids, strict=True)
            if wnid in numbers
        ]

        if not kept:
            raise DataError(f"{self.root} holds no images of the chosen classes")

        labels = [label for _, label in kept]
        if self.root.is_dir():
            return Files(
                self.root, [str(image) for image, _ in kept], labels, classes, self.ignored
            )

        return TarFiles(
            self.root,
            [image for image, _ in kept if isinstance(image, Place)],
            labels,
            classes,
            self.ignored,
        )


def find(source: Path, split: str, val_labels: Path | None) -> Found | None:
    folder, archive, ignored = source / split, source / TARS[split], Counter[str]()
    if folder.is_dir():
        folders, flat = inside(folder, ignored)
        if split == "train" or folders:
            if flat:
                raise DataError(
                    f"{folder} has images outside the folders of their classes ({plain(flat[0])}); "
                    "move them away"
                )

            around = (os.path.realpath(folder),)
            paths = [
                path
                for wnid in folders
                for path in tree(folder, _wnid(wnid, folder), ignored, around)
            ]

            return Found(folder, paths, [path.partition("/")[0] for path in paths], ignored)

        return Found(folder, flat, truth(flat, folder, val_labels), ignored)

    if not archive.is_file():
        return None
    if split == "train":
        return nested(archive, ignored)

    places = [place for place in members(archive) if is_image(place.name, ignored)]
    return Found(
        archive, places, truth([place.name for place in places], archive, val_labels), ignored
    )


def nested(archive: Path, ignored: Counter[str]) -> Found:
    """The tar of a tar for each class."""
    places: list[Place] = []
    wnids: list[str] = []
    for outer in members(archive):
        if odd := next(filter(None, map(clutter, outer.name.split("/"))), ""):
            ignored[odd] += 1
            continue

        wnid = _wnid(Path(outer.name).stem, archive)
        inner = members(archive, outer.offset, outer.offset + outer.size)
        here = [
            place._replace(name=f"{wnid}/{place.name}")
            for place in inner
            if is_image(place.name, ignored)
        ]
        places += here
        wnids += [wnid] * len(here)

    return Found(archive, places, wnids, ignored)


def truth(names: list[str], origin: Path, file: Path | None) -> list[str]:
    """The wnid of each image of a flat val, from a file of one of FORMS."""
    if file is None:
        raise DataError(
            f"{origin} has no class folders: --val-labels FILE must say the classes ({FORMS})"
        )

    lines = [re.split(r"[\s,]+", line.strip()) for line in command.lines(file)]
    # Kaggle's; the class is followed by boxes
    if lines and lines[0][0] == "ImageId":
        lines = lines[1:]

    stems = sorted(Path(name).stem for name in names)
    if all(len(words) == 1 for words in lines):
        if len(lines) != len(stems):
            raise DataError(f"{file}: {len(lines)} lines for the {len(stems)} images of {origin}")
        lines = [[stem, *words] for stem, words in zip(stems, lines, strict=True)]

    table = {Path(words[0]).stem: words[1] for words in lines}
    for number, wnid in enumerate(table.values(), 1):
        if not WNID.fullmatch(wnid):
            fix = (
                "the numbers of the development kit do not follow the sorted wnids; "
                if wnid.isdigit()
                else ""
            )
            raise DataError(f"{file}, entry {number}: {wnid!r} is no wnid; {fix}take {FORMS}")

    missing = next((stem for stem in stems if stem not in table), None)
    if missing:
        raise DataError(f"{file} does not say the class of {missing} in {origin}")

    return [table[Path(name).stem] for name in names]


def chosen(splits: dict[str, Found], file: Path | None) -> tuple[str, ...]:
    """The classes by sorted wnid: those of `file`, or those of the training images."""
    first = splits.get("train") or splits["val"]
    there = set(first.wnids)
    if file is None:
        extra = sorted({wnid for found in splits.values() for wnid in found.wnids} - there)
        if extra:
            raise DataError(
                f"{splits['val'].root} has class {extra[0]}, which {first.root} has not; name the "
                "classes by --classes"
            )

        return tuple(sorted(there))

    listed = [_wnid(line.split()[0], file) for line in command.lines(file)]
    for wnid in listed:
        if wnid not in there or listed.count(wnid) > 1:
            raise DataError(
                f"{file}: {wnid} "
                f"{'is listed twice' if wnid in there else f'has no images in {first.root}'}"
            )

    return tuple(sorted(listed))


def _wnid(text: str, origin: Path) -> str:
    if not WNID.fullmatch(text):
        raise DataError(f"{origin}: '{text}' is no wnid such as n01440764")
    return text
