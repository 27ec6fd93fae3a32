"""What a run is to be evaluated with: a cell for each of its steps, datasets and benchmarks, found
from what is on disk.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from scaletrain import exit_codes
from scaletrain.checkpoint import reader
from scaletrain.checkpoint.files import CheckpointError
from scaletrain.evals import benchmark, request
from scaletrain.evals.encoders import exports, targets
from scaletrain.evals.request import Request
from scaletrain.evals.run import Evaluation
from scaletrain.launch.fleet.cells import Cell
from scaletrain.train import run_folder, status


def due(steps: Iterable[int], every: float, per_epoch: int, last: int) -> list[int]:
    """The steps to evaluate: of each `every` epochs the first that was saved, and the last step of
    the run; all of them where `every` is 0.
    """
    if not every:
        return sorted(steps)

    first: dict[int, int] = {}
    for step in sorted(steps):
        # An epoch need not be a whole number in binary.
        window = math.floor(step / (per_epoch * every) + 1e-9)
        if window or step == last:
            first.setdefault(-1 if step == last else window, step)

    return sorted(first.values())


class Plan:
    """The cells of one run. `every`: epochs from one evaluated step to the next, or 0.

    requests: one for each dataset, all with the same benchmarks.
    """

    def __init__(
        self,
        run: Path,
        requests: Sequence[Request],
        every: float = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.run, self.cells = run, list[Cell]()
        # or whether results are only collected
        self.measures = bool(requests)
        self._requests, self._every, self._say = requests, every, say
        # by step: when it was saved, and its cells
        self._known: dict[int, tuple[float, list[Cell]]] = {}
        # the last step of the run, 0 before one was saved
        self._total = 0

    def refresh(self) -> None:
        """Look for steps that were saved since the last call, keep those that are due, and set
        `cells`, ascending by step.
        """
        if not (self.run / run_folder.CONFIG).is_file():
            return

        wanted = self._due()
        if not self._requests:
            self._known = {step: (at, []) for step, at in wanted.items()}
            return

        fresh = {step: at for step, at in wanted.items() if self._is_new(step, at)}
        if len(fresh) > 1:
            self._say(f"{self.run.name}: {len(fresh):,} steps are opened")

        for step in fresh:
            # At once, since training may delete any of them while the first are exported.
            with contextlib.suppress(ValueError):
                exports.hold(self.run, step)

        for step, at in fresh.items():
            if (cells := self._open(step)) is not None:
                self._known[step] = at, cells
                if not any(cell.network for cell in cells):
                    exports.release(self.run, step)

        self.cells = [cell for step in sorted(self._known) for cell in self._known[step][1]]

    def release(self, finished: Callable[[Cell], bool]) -> None:
        """Let go of the steps whose evaluations have all finished."""
        for step, (_, cells) in self._known.items():
            network = [cell for cell in cells if cell.network]
            if network and all(map(finished, network)):
                exports.release(self.run, step)

    @property
    def over(self) -> bool:
        """Whether the run has saved its last step, and that was looked at."""
        return self._total > 0 and self._total in self._known

    def training(self) -> str:
        """How far the run is, for people; "" where it does not say."""
        try:
            # Before the status, which the end of the run changes.
            alive = status.alive(self.run)
            progress = status.read(self.run)
        except OSError:
            return ""
        if progress is None:
            return ""

        dead = progress.state == "running" and not alive
        state = "not running" if dead else progress.state
        job = f", job {progress.job}" if progress.job and state == "running" else ""
        return f"step {progress.step:,} of {progress.total:,}, {state}{job}"

    # --- steps ------------------------------------------------------------------------------------

    def _due(self) -> dict[int, float]:
        """The steps to evaluate, and when each was saved; 0 for one that is only kept for its
        evaluation.
        """
        root = self.run / "checkpoints"
        saved = {}
        for step, committed in reader.steps(root).items():
            # Training may delete it meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if committed:
                    manifest = reader.folder_of(root, step) / reader.MANIFEST
                    saved[step] = manifest.stat().st_mtime

        per_epoch = self._clock(saved)
        kept = dict.fromkeys(_kept(self.run), 0.0)
        return {
            step: saved.get(step, 0.0)
            for step in due(kept | saved, self._every, per_epoch, self._total)
        }

    def _clock(self, saved: Iterable[int]) -> int:
        """Steps per epoch, by the newest step that can be read; also notes the last step of the
        run.
        """
        for step in sorted(saved, reverse=True):
            with contextlib.suppress(CheckpointError, OSError):
                folder = reader.folder_of(self.run / "checkpoints", step)
                clock = reader.read_manifest(folder / reader.MANIFEST).meta.get("clock", {})
                # The schedule counts other steps than the run once the batch or the data changed.
                self._total = step + int(clock.get("total", 0)) - int(clock.get("step", 0))
                return max(1, int(clock.get("steps_per_epoch", 1)))

        return 1

    def _is_new(self, step: int, at: float) -> bool:
        """Whether a step is not known, or was saved again; one that was deleted stays known."""
        return step not in self._known or at not in (0.0, self._known[step][0])

    def _open(self, step: int) -> list[Cell] | None:
        """The cells of a step; None where storage failed, so that it has to be tried again."""
        try:
            target = exports.exported(self.run, step)
            return [cell for wanted in self._requests for cell in self._of(step, target, wanted)]
        except (ValueError, OSError) as error:
            self._say(f"{self.run.name} step {step}: {error}")
            # One that was deleted before it could be kept has no cells.
            return None if exit_codes.passing(error) else []

    def _of(self, step: int, target: Path, wanted: Request) -> list[Cell]:
        """The cells of a step and a dataset. What is not possible under one benchmark does not keep
        the others from being measured. Raises an error that may pass.
        """
        impossible = Cell(self.run, step, "", wanted.dataset, (), None)
        try:
            evaluation = Evaluation(target, wanted)
        except ValueError as error:
            return [
                replace(impossible, benchmark=name, problem=_lasting(error))
                for name in wanted.benchmarks
            ]

        settings = request.settings(wanted.benchmarks, wanted.overrides)
        context, cells = evaluation.context, []
        for name in wanted.benchmarks:
            arguments = ("eval", str(target), *wanted.arguments([name]))
            try:
                needs = benchmark.load(name).needs(settings[name], context.encoder)
                place, dataset = evaluation.path(name), context.dataset.name
            except ValueError as error:
                cells.append(replace(impossible, benchmark=name, problem=_lasting(error)))
            else:
                cells.append(
                    Cell(
                        self.run,
                        step,
                        name,
                        dataset,
                        arguments,
                        place,
                        needs.gpus,
                        needs.network,
                        shares=bool(needs.splits) and not needs.augmented,
                    )
                )

        return cells


def _lasting(error: ValueError) -> str:
    """What an error says; one that may pass is raised."""
    if exit_codes.passing(error):
        raise error
    return str(error)


def _kept(run: Path) -> list[int]:
    """The steps whose encoders, or links, are kept for evaluations."""
    exported, held = targets.export_of(run, 0).parent, targets.held(run, 0).parent
    places = (*exported.glob("step-*.safetensors"), *held.glob("step-*"))
    names = (re.fullmatch(r"step-(\d{8,})", path.stem) for path in places)
    return [int(name[1]) for name in names if name]
