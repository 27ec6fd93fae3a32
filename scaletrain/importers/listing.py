"""Write shards from a listing of images: CSV or Parquet with paths or web addresses and any number
of labels.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from scaletrain.data.storage.http import fetch
from scaletrain.importers import command
from scaletrain.importers.listing_source import IMAGES, LABELS, Columns, Listing
from scaletrain.importers.write import CLASSES, How


@command.importer
def main(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A .csv or .parquet file, or a folder of them.")
    ],
    dest: command.Dest,
    how: How,
    image: Annotated[
        str, typer.Option(help=f"Column of paths or addresses [{' or '.join(IMAGES)}].")
    ] = "",
    label: Annotated[
        str,
        typer.Option(help=f"Column of labels, numbers or names [{' or '.join(LABELS)}, if there]."),
    ] = "",
    separator: Annotated[
        str, typer.Option(help="Between the labels of one CSV cell; Parquet has lists.")
    ] = ";",
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Names of the classes by number, one a line, or the classes.json of another split "
            "[those listed]."
        ),
    ] = None,
    no_label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORD", help="Means that there is no label, as NA or ''; may be repeated."
        ),
    ] = None,
    names: Annotated[
        bool, typer.Option("--names", help="Labels are names, even where they look like numbers.")
    ] = False,
    root: Annotated[
        Path | None, typer.Option(help="Folder that paths are relative to [the listing's].")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Network timeout in seconds of each attempt.")
    ] = 10.0,
    tries: Annotated[
        int, typer.Option(min=1, help="Attempts per download, for transient errors.")
    ] = 3,
    keep_copies: Annotated[
        bool,
        typer.Option(
            "--keep-copies", help="Write images of equal bytes as often as they are listed [once]."
        ),
    ] = False,
    name: Annotated[str, typer.Option(help="First part of the shards' names.")] = "train",
) -> None:
    """Write shards from a listing of images: CSV (with a first line of names) or Parquet, one row
    an image.

    A row has a path or an http(s) address and no, one or many labels. One becomes KEY.cls; many
    become KEY.json with {"labels": [1, 5]}, and the sample trains as one without a label. Downloads
    want --workers 64 or more, and --max-bad 5%. Labels are all whole numbers or all names; -1 and a
    null are none, --no-label '' lets an empty cell be none too. Classes are numbered without gaps,
    and classes.json names them: give that of the training set as --classes to a set of the same
    classes. Of images whose files are equal byte by byte, one stays, with its labels; copies.jsonl
    lists the others.

    A table of the rows is kept in a temporary file next to DEST; memory is about 50 bytes a row.
    """
    given = tuple(command.lines(classes)) if classes else ()

    base = root or (source if source.is_dir() else source.parent)
    real = Path(os.path.realpath(dest))
    scratch = real if real.is_dir() else real.parent
    scratch.mkdir(parents=True, exist_ok=True)
    get = partial(fetch, timeout=timeout, tries=tries)
    columns = Columns(image, label, separator, tuple(no_label or ()), names)
    listed = Listing(source, columns, get, root=base, scratch=scratch, given=given)

    command.save(dest, {"": listed}, how, name, unique=not keep_copies)
    if listed.renumbered:
        print(
            "labels are renumbered, without gaps; give other splits these classes: --classes "
            f"{dest}/{CLASSES}"
        )
