"""Bad samples under `data.on_bad: skip`: a log of the draws that were replaced, exact over ranks
and resumes, and the limit `data.max_bad`.

Samples that indexing left out have no substitutes, but count against the limit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from scaletrain import dist
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import DataConfig
from scaletrain.data.errors import DataError, printable
from scaletrain.data.format import index
from scaletrain.data.format.manifest import Loss
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.runtime import durable

log = logging.getLogger("scaletrain")
# bad samples that each rank reports on its console
SAID = 10
FOLDER = "skipped"


def left_out(losses: Sequence[Loss]) -> float:
    """The share of samples that indexing left out."""
    lost = sum(loss.samples for loss in losses)
    return lost / max(1, lost + sum(loss.present for loss in losses))


def admit(
    losses: Sequence[Loss], on_bad: str = "raise", max_bad: float = 0.0, section: str = "data."
) -> None:
    """Print how many samples indexing left out. Raises DataError if the policy, set by the keys of
    `section`, forbids it.
    """
    share = left_out(losses)
    if not share:
        return

    lost, present = sum(loss.samples for loss in losses), sum(loss.present for loss in losses)
    first = next(loss for loss in losses if loss.samples)
    text = (
        f"indexing left out about {lost:,} of {lost + present:,} samples, the first: "
        f"{first.folder}/{printable(first.fault)}"
    )
    mend = f"mend the shards and run scaletrain shards index --force {first.folder}"

    if on_bad == "raise":
        accept = f"{section}on_bad=skip {section}max_bad={math.ceil(1000 * share) / 1000:g}"
        raise DataError(f"{text}; {mend}, or go without these samples with {accept}")

    if share > max_bad:
        limit = f"a share of {share:.2g}, above max_bad={max_bad:g}"
        raise DataError(
            f"{text}; that is {limit}: {mend}, or set "
            f"{section}max_bad={math.ceil(1000 * share) / 1000:g}"
        )

    index.say(f"notice: {text}")


class ReplacementLog:
    """The draws that a run replaced. Every rank has one; RUN/skipped/rank-N.jsonl lists the
    replaced draws of that rank.

    `start`: the step at which this process starts or resumes; records from that step on are
    dropped, since the steps are repeated. `before`: draws replaced in all earlier steps, over all
    ranks. `missing`: the share of samples that indexing left out.
    """

    def __init__(
        self,
        run: Path,
        data: DataConfig,
        *,
        epoch: int,
        start: int,
        before: int,
        missing: float = 0.0,
    ) -> None:
        self.on = data.on_bad == "skip"
        self._limit, self._missing, self._epoch = data.max_bad, missing, epoch
        self._before, self._mine, self.total = before, 0, before
        self._folder = run / FOLDER
        self._log = durable.Records(self._folder / f"rank-{dist.rank()}.jsonl")

        if self.on and dist.main():
            for path in self._folder.glob("rank-*.jsonl"):
                durable.drop_records(path, start)

    def add(self, step: int, replaced: Sequence[Replaced]) -> None:
        """Record the draws that were replaced in one step on this rank."""
        if not replaced:
            return

        for item in replaced:
            self._log.add({"step": step, **item._asdict()})
            self._mine += 1
            if self._mine <= SAID:
                log.warning("replaced by sample %d: %s", item.used, item.fault)

    def agree(self, drawn: int) -> int:
        """How many of the run's first `drawn` draws were replaced, over all ranks; a collective
        call. Raises DataError above the limit.
        """
        self.total = self._before + int(dist.sum_nograd(torch.tensor(self._mine)))

        # relative to at least an epoch, since one bad sample in the first batch says little
        if self.total > (self._limit - self._missing) * max(drawn, self._epoch):
            indexed = (
                f" (in addition to a share of {self._missing:.2g} that indexing left out)"
                if self._missing
                else ""
            )
            raise DataError(
                f"{self.total} of {drawn} samples could not be used, more than "
                f"data.max_bad={self._limit:g} allows{indexed}; {self._folder} names them; mend "
                "the shards or raise data.max_bad"
            )

        return self.total

    def scalars(self) -> dict[str, float]:
        return {"data/skipped": float(self.total)} if self.on else {}

    def meta(self) -> dict[str, int]:
        """What the checkpoint stores and `count_of` reads."""
        return {"skipped": self.total} if self.on or self.total else {}

    def summary(self, drawn: int) -> str:
        share = self.total / max(1, drawn)
        named = f"; {self._folder} names them" if self.total else ""
        return f"{self.total:,} bad samples of {drawn:,} were replaced ({share:.2g}){named}"


def count_of(meta: Mapping[str, object]) -> int:
    """The number of replaced draws that a checkpoint stores."""
    count = meta.get("skipped", 0)
    if not isinstance(count, int) or count < 0:
        raise ConfigError(f"the checkpoint's count of skipped samples is {count!r}")
    return count
