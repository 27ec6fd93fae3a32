"""Where a run resumes: its place in the schedule, and whether its data is still the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config

# Digits of a sha256 in messages.
SHOWN = 12


@dataclass(frozen=True)
class Start:
    """The progress of a run."""

    # Next step of the schedule and of the data.
    step: int = 0
    # Optimizer steps so far; differs from `step` once the batch or the data has changed.
    updates: int = 0
    # Training samples drawn so far.
    samples: int = 0

    @property
    def offset(self) -> int:
        """Optimizer steps minus the step of the schedule."""
        return self.updates - self.step

    def after(self, step: int, batch: int) -> int:
        """Samples drawn by the end of a step of the schedule."""
        return self.samples + (step + 1 - self.step) * batch

    def meta(self, step: int, total: int, steps_per_epoch: int, batch: int) -> dict[str, Any]:
        """Metadata of a checkpoint after a step of the schedule, which `start_of` reads."""
        clock = {"step": step + 1, "total": total, "steps_per_epoch": steps_per_epoch}
        return {"clock": clock, "samples": self.after(step, batch)}


BEGINNING = Start()


def start_of(
    updates: int, meta: Mapping[str, Any], config: Config, epoch: int, changed: bool
) -> tuple[Start, str]:
    """Where training resumes from a checkpoint under `config`, and a sentence if its place in the
    schedule was converted.

    updates: optimizer steps of the checkpoint. epoch: samples per epoch. changed: epochs differ
    from those of the checkpoint. Conversion keeps the number of samples: those of the current epoch
    or, where epochs differ, all since the start.
    """
    clock, batch = meta["clock"], meta["config"]["batch"]
    step, steps_per_epoch = clock["step"], clock.get("steps_per_epoch") or epoch // batch

    samples = meta.get("samples", updates * batch)
    now = epoch // config.batch
    if (batch, steps_per_epoch) == (config.batch, now):
        return Start(step, updates, samples), ""

    if changed:
        seen, place = step * batch, step * batch // config.batch
    else:
        epochs, within = divmod(step, steps_per_epoch)
        seen, place = within * batch, epochs * now + within * batch // config.batch

    again = seen % config.batch
    text = (
        f"{step:,} steps of {batch:,} samples, {steps_per_epoch:,} an epoch, "
        f"count as {place:,} steps of {config.batch:,}, {now:,} an epoch"
    )

    return Start(place, updates, samples), text + (
        f"; {again:,} samples come again" if again else ""
    )


def check_end(start: Start, total: int) -> None:
    """Raise ConfigError where a changed schedule ends before the step that the run has reached."""
    if start.step > total:
        raise ConfigError(
            f"this run has made {start.step:,} steps already, and the changed schedule ends after "
            f"{total:,}: "
            "raise epochs or steps"
        )


# --- identity of the data -------------------------------------------------------------------------


def other_data(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """The differences between the data of a checkpoint and the present data, a line each; none
    where the checkpoint does not record its data.
    """
    if before is None:
        return []

    lines = []
    for name in ("sources", "support"):
        lines += _differences(
            before.get(name) or (),
            now.get(name) or (),
            "labelled samples: " if name == "support" else "",
        )

    for name in ("subset", "groups"):
        old, new = before.get(name), now.get(name)
        if (old or {}).get("sha256") != (new or {}).get("sha256"):
            lines.append(f"data.{name}: {_described(old)} -> {_described(new)}")

    return lines + _differences(_maps(before), _maps(now), "maps: ")


def _maps(data: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The maps of the data; earlier versions recorded whether there were masks."""
    masks: list[dict[str, Any]] = [{"kind": "foreground", "path": "key.mask.png"}]
    found: Sequence[Mapping[str, Any]] = data.get("maps", masks if data.get("masks") else [])
    return found


def _differences(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], what: str
) -> list[str]:
    lines = []
    for n in range(max(len(before), len(now))):
        old, new = (side[n] if n < len(side) else None for side in (before, now))
        if (
            old is None
            or new is None
            or any(
                old.get(key) != new.get(key)
                for key in ("sha256", "samples", "weight", "labels", "kind")
            )
        ):
            lines.append(f"{what}{_described(old)} -> {_described(new)}")

    return lines


def _described(source: Mapping[str, Any] | None) -> str:
    if source is None:
        return "nothing"

    samples = f"{source['samples']:,} samples" if "samples" in source else "of each sample"
    kind = f", kind {source['kind']}" if "kind" in source else ""
    sha256 = f", sha256 {source['sha256'][:SHOWN]}" if source.get("sha256") else ""
    weight = f", weight {source['weight']:g}" if source.get("weight") is not None else ""
    labels = f", label subset {source['labels'][:SHOWN]}" if source.get("labels") else ""
    return f"{source['path']} ({samples}{kind}{sha256}{weight}{labels})"
