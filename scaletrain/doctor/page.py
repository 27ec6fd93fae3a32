"""Findings, and how those of all ranks are merged into a report for a bug tracker."""

from __future__ import annotations

import getpass
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from scaletrain import dist
from scaletrain.runtime import tables
from scaletrain.train.progress import number

REPORT = "see the message; where it gives no clue, report it with this page"


class Finding(NamedTuple):
    """A line of the report. `text` has no numbers that differ from rank to rank, so that equal
    findings can be merged; see `measured`.
    """

    status: Literal["ok", "warn", "fail", "skip"]
    name: str
    text: str
    fix: str = ""


def limit(bad: bool, name: str, text: str, fix: str) -> Finding:
    """A warning with its fix if `bad`, else a finding that all is well."""
    return Finding("warn", name, text, fix) if bad else Finding("ok", name, text)


def guarded(name: str, check: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """The findings of a check; an exception becomes a finding too, so that it does not hide the
    others.
    """
    try:
        return list(check())
    except Exception as error:
        return [_failure(name, error, REPORT)]


def _failure(name: str, error: Exception, fix: str) -> Finding:
    return Finding(
        "fail", name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", fix
    )


def measured(
    name: str, measure: Callable[[], Mapping[str, float]], fix: str = REPORT
) -> tuple[dict[str, list[float]], list[Finding]]:
    """Measurements of all ranks, on every rank: {name: values of the ranks that have it}. All ranks
    call it together.

    A rank whose measurement raises contributes a finding instead.
    """
    own: dict[str, float] = {}
    failed: list[Finding] = []

    try:
        own = dict(measure())
    except Exception as error:
        failed = [_failure(name, error, fix)]

    values: dict[str, list[float]] = {}
    for numbers in dist.gather_objects(own):
        for what, value in numbers.items():
            values.setdefault(what, []).append(value)

    return values, merged(failed)


def spread(values: Sequence[float], unit: str) -> str:
    """One number, or the range and median of several."""
    if len(values) == 1:
        return f"{number(values[0])} {unit}"

    return (
        f"{number(statistics.median(values))} {unit} ({number(min(values))} to "
        f"{number(max(values))} over {len(values)})"
    )


def merged(own: Sequence[Finding]) -> list[Finding]:
    """The findings of all ranks, on every rank; equal ones once, and where only some ranks have
    one, with these ranks.
    """
    everyone = dist.gather_objects([tuple(finding) for finding in own])
    owners: dict[Finding, list[int]] = {}

    for rank, findings in enumerate(everyone):
        for finding in dict.fromkeys(findings):
            owners.setdefault(Finding(*finding), []).append(rank)

    order = {name: at for at, name in enumerate(dict.fromkeys(finding.name for finding in owners))}
    return [
        finding
        if len(ranks) == len(everyone)
        else finding._replace(text=f"{finding.text} [{spans(ranks)}]")
        for finding, ranks in sorted(owners.items(), key=lambda item: order[item[0].name])
    ]


def spans(ranks: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` -> `ranks 0-2, 5`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])

    shown = ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def lines(findings: Sequence[Finding]) -> str:
    """The text of the page, without the user's name."""
    shown, width = [], tables.width()
    for status, name, text, fix in findings:
        shown.append(tables.wrap(discreet(f"{status:4}  {name:11}  {text}"), width, 19))
        if fix:
            shown.append(tables.wrap(discreet(f"{'':19}fix: {fix}"), width, 19))

    return "\n".join(shown)


def discreet(text: str) -> str:
    """`text` without the home folder and the user's name in paths: the page is meant for
    strangers.
    """
    home = str(Path.home())

    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?=\W|$)", "~", text)

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for this user
        return text

    return re.sub(rf"(?<=/){re.escape(user)}(?=\W|$)", "USER", text)
