"""What the commands that write shards share: common options, a progress bar, and the writing."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scaletrain.data.errors import DataError
from scaletrain.importers import journal as partial
from scaletrain.importers import write
from scaletrain.importers.write import How, Source
from scaletrain.runtime import local_files
from scaletrain.runtime.tables import plural

Dest = Annotated[
    Path,
    typer.Argument(
        metavar="DEST", help="Folder to make: DEST/NAME-000000.tar ..., index, classes.json."
    ),
]
Splits = Annotated[
    Path,
    typer.Argument(
        metavar="DEST", help="Folder to make, with one folder of shards for each split."
    ),
]
NEXT = (
    "Rerun the same command to resume after a kill. The same input and options give the same bytes."
)
# kinds of ignored files that are named
KINDS = 20
# of lists of names
TEXT_BYTES = 64 << 20


def importer(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `how: How` appears on the command line as the options of How, after
    its own.
    """

    @wraps(command)
    def parsed(**given: Any) -> None:
        how = How(**{name: given.pop(name) for name in names})
        command(**given, how=how)

    hints, names = get_type_hints(How, include_extras=True), [f.name for f in fields(How)]
    own = [
        p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "how"
    ]
    shared = [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]
        )
        for f in fields(How)
    ]

    parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *shared]
    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parsed.__annotations__ = {p.name: p.annotation for p in parameters}
    parsed.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n\n{NEXT}"
    return parsed


def save(
    dest: Path, splits: Mapping[str, Source], how: How, name: str = "", unique: bool = False
) -> None:
    """Write DEST/SPLIT for each split, or DEST itself for the split "", whose shards then have
    `name`. `unique`: see write.
    """
    with partial.replacing(dest, write.head(splits, how, name, unique), how.force) as job:
        if job.resumed:
            print(f"resuming from {job.partial}")

        try:
            for split, source in splits.items():
                with progress(f"writing {split}".strip()) as shown:
                    folder = job.partial / split
                    journal = write.write(
                        source, folder, name=name or split, how=how, unique=unique, progress=shown
                    )

                print(f"{dest / split}: {_summary(source, journal)}")
                if source.ignored:
                    kinds = [f"{n:,} x {kind}" for kind, n in source.ignored.most_common(KINDS)]
                    more = (
                        f" and {len(source.ignored) - KINDS:,} kinds more"
                        if len(source.ignored) > KINDS
                        else ""
                    )

                    print(f"not images, ignored: {', '.join(kinds)}{more}")
        except BaseException:
            if job.kept:
                print(
                    f"complete shards stay in {job.partial}: rerun the same command to resume",
                    file=sys.stderr,
                )

            raise


def _summary(source: Source, journal: partial.Journal) -> str:
    classes = (
        f"in {plural(len(source.classes), 'class')}" if source.classes else "with numbers as labels"
    )
    samples = sum(line.shard["samples"] for line in journal.lines)
    shards = plural(len(journal.lines), "shard")
    unlabelled = journal.unlabelled() if source.labelled else samples
    text = (
        f"{plural(samples, 'image')} {classes if unlabelled < samples else 'without labels'}, "
        f"{shards}"
    )

    if 0 < unlabelled < samples:
        text += f"; without a label: {unlabelled:,}"

    if journal.copies:
        text += f"; left out as copies of others: {len(journal.copies):,}, see {partial.COPIES}"

    return text + (
        f"; left out as bad: {len(journal.bad)}, see {write.QUARANTINE}" if journal.bad else ""
    )


def lines(file: Path) -> list[str]:
    """The lines of a small text file that are not blank, stripped; of a .json file, the texts of
    its list. Raises DataError.
    """
    try:
        text = local_files.read(file, TEXT_BYTES).decode("utf-8-sig")
        if file.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        found = json.loads(text)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None

    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataError(f"{file} is no JSON list of texts, such as classes.json")

    return found


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; call the result with (done, total)."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
