"""The fleet: compares what is wanted with what is on disk, starts what is missing, and follows.

All that it knows is on disk or in the queue: results, claims, jobs. So it may be killed and started
again at any moment, several of them may work on one run, and none does what another one does.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from scaletrain.launch.fleet import jobs
from scaletrain.launch.fleet.cells import Cell, State, Status
from scaletrain.launch.fleet.claims import Claim, Claims, Holder
from scaletrain.launch.fleet.curves import Curves
from scaletrain.launch.fleet.jobs import Jobs
from scaletrain.launch.fleet.plan import Plan
from scaletrain.launch.fleet.pool import Pool
from scaletrain.launch.fleet.standing import Standing
from scaletrain.launch.slurm.queue import SlurmError, UnavailableError


class Fleet:
    """Context: a fleet of runs, with processes of this machine or jobs; without either it only
    collects. When it ends, its processes end and jobs continue.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        workers: Pool | Jobs | None,
        retries: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self.plans, self.workers, self._say = plans, workers, say
        pool = workers if isinstance(workers, Pool) else None
        self._claims = {plan.run: Claims(plan.run, say) for plan in plans}
        self._standing = {
            run: Standing(claims, pool, retries) for run, claims in self._claims.items()
        }
        self._curves = {plan.run: Curves(plan.run) for plan in plans}
        self._retries, self._until = retries, contextlib.ExitStack()
        # what sbatch said whenever it refused a cell, with the options of this fleet
        self._refusals: dict[Cell, list[str]] = {}
        self.statuses: dict[Cell, Status] = {}
        # what kept the last look from being complete
        self.problems: list[OSError | ValueError] = []

    def __enter__(self) -> Fleet:
        for claims in self._claims.values():
            self._until.enter_context(claims)

        if isinstance(self.workers, Pool):
            self._until.callback(self.workers.stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._until.close()

    def look(self) -> None:
        """Look once for new steps, results and failures, and start what is missing."""
        before, self.statuses, self.problems = self.statuses, {}, []
        self.sweep()

        for plan in self.plans:
            try:
                self._look(plan)
            except (OSError, ValueError) as error:
                # Of storage or the queue, which may be back at the next look.
                self.problems.append(error)
                kept = {cell: status for cell, status in before.items() if cell.run == plan.run}
                self.statuses = kept | self.statuses

        self._report(before)

    def _look(self, plan: Plan) -> None:
        plan.refresh()
        claims = self._claims[plan.run]

        with claims.alone():
            self._standing[plan.run].see_queue()
            self.statuses |= {cell: self._judge(cell) for cell in plan.cells}
            missing = [cell for cell in plan.cells if self.statuses[cell].state == "missing"]
            if isinstance(self.workers, Pool):
                self._start(self.workers, missing, claims)
            elif isinstance(self.workers, Jobs):
                self._submit(self.workers, missing, claims)

            self._curves[plan.run].refresh()

        plan.release(lambda cell: self.statuses[cell].state in ("measured", "failed"))

    def _judge(self, cell: Cell) -> Status:
        """Where a cell stands; what sbatch refuses is given up too."""
        status, refusals = self._standing[cell.run].status(cell), self._refusals.get(cell, [])
        given_up = status.state == "missing" and len(refusals) > self._retries
        return Status("failed", refusals[-1]) if given_up else status

    def sweep(self) -> bool:
        """Whether processes of this fleet have ended, which is noted."""
        return isinstance(self.workers, Pool) and self.workers.sweep()

    def forgive(self) -> None:
        """Forget all attempts that have failed."""
        for claims in self._claims.values():
            with claims.alone():
                for name in claims.names():
                    if claims.read(name).holder is None:
                        claims.write(name, Claim())

    def drawn(self, run: Path) -> int:
        """The number of results in the curves of a run."""
        return self._curves[run].results

    def cells(self, *states: State) -> list[Cell]:
        return [cell for cell, status in self.statuses.items() if status.state in states]

    def count(self, *states: State) -> int:
        """How many cells are in one of these states."""
        return len(self.cells(*states))

    @property
    def settling(self) -> bool:
        """Whether jobs are looked for that a killed fleet may have submitted."""
        return any(standing.settling for standing in self._standing.values())

    @property
    def idle(self) -> bool:
        """Whether nothing runs, waits, or could be started."""
        return not self.problems and not self.count("running", "pending", "missing")

    @property
    def over(self) -> bool:
        """Whether nothing is left to do, now or later."""
        return self.idle and all(plan.over for plan in self.plans)

    def _start(self, pool: Pool, missing: Sequence[Cell], claims: Claims) -> None:
        """Start as many processes as there is room for."""
        for cell in self._apart(missing)[: pool.room]:
            claims.write(cell.name, claims.read(cell.name).held_by(Holder(fleet=claims.fleet)))
            pool.start(cell.arguments, cell.log)
            self.statuses[cell] = Status("running")

    def _apart(self, missing: Sequence[Cell]) -> list[Cell]:
        """Those that would not only wait until another one has stored the features of the same
        step, unless that has failed.
        """

        def features(cell: Cell) -> tuple[Path, int, str]:
            return cell.run, cell.step, cell.dataset

        known = [(features(cell), one) for cell, one in self.statuses.items() if cell.shares]
        stored = {of for of, status in known if status.state == "measured" or status.tried}
        encoded = {of for of, status in known if status.state in ("running", "pending")}

        apart = []
        for cell in missing:
            if cell.shares and features(cell) not in stored:
                if features(cell) in encoded:
                    continue
                encoded.add(features(cell))
            apart.append(cell)

        return apart

    def _submit(self, workers: Jobs, missing: Sequence[Cell], claims: Claims) -> None:
        """Submit arrays. They are claimed before, so that a fleet that is killed meanwhile leaves
        word of them.
        """
        first = ""
        for batch in workers.batches(missing):
            launch = jobs.new_launch(batch[0].run)
            holders = [
                Holder(fleet=claims.fleet, launch=launch.name, element=element)
                for element in range(len(batch))
            ]
            held = [claims.read(cell.name) for cell in batch]
            for cell, claim, holder in zip(batch, held, holders, strict=True):
                claims.write(cell.name, claim.held_by(holder))

            shares = all(cell.shares for cell in batch)
            try:
                ids = workers.submit(launch, batch, after=first if shares else "")
            except SlurmError as error:
                # Of this array, which does not keep others from being submitted.
                self.problems.append(error)
                if not isinstance(error, UnavailableError):
                    for cell in batch:
                        self._refusals.setdefault(cell, []).append(str(error))
                continue

            for cell, claim, holder, job in zip(batch, held, holders, ids, strict=True):
                claims.write(cell.name, claim.held_by(holder.model_copy(update={"job": job})))
                self.statuses[cell] = Status("pending", f"job {job}")

            first = first or (ids[0].partition("_")[0] if shares else "")

    def _report(self, before: dict[Cell, Status]) -> None:
        """A line for each cell whose status has changed; the table has what was measured before."""
        for cell, status in self.statuses.items():
            known = before.get(cell, Status("measured", status.text))
            if known != status and (status.state != "missing" or status.text):
                what = f"{cell.run.name} step {cell.step} {cell.benchmark}@{cell.dataset}"
                text = f"{what}: {status.state} {status.text}".rstrip()
                self._say(f"{time.strftime('%H:%M:%S')} {text}")
