"""Where the results of a run stand, from what is on disk and in the queue."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from scaletrain.evals import results
from scaletrain.evals.errors import EvalError
from scaletrain.launch.fleet import jobs
from scaletrain.launch.fleet.cells import Cell, Status
from scaletrain.launch.fleet.claims import Claim, Claims, Holder
from scaletrain.launch.fleet.pool import Pool
from scaletrain.launch.local import ASKED
from scaletrain.launch.slurm import queue
from scaletrain.launch.slurm.queue import Job
from scaletrain.report import scores

# Seconds in which sbatch, whose fleet was killed, may still bring its job into the queue.
SETTLE = 5.0


class Standing:
    """Of the cells of one run. pool: the own processes of the fleet, if it has any.

    retries: attempts after the first. `status` is for a fleet that plans alone, after `see_queue`.
    """

    def __init__(self, claims: Claims, pool: Pool | None, retries: int) -> None:
        self._claims, self._pool, self._retries = claims, pool, retries
        # of results, which never change
        self._values: dict[Path, Status] = {}
        # jobs that run or wait; None where the queue cannot be seen from here
        self._live: list[Job] | None = []
        # how often the own process of a result has ended on request
        self._stops = Counter[str]()
        # by launch: since when its jobs are looked for
        self._sought: dict[str, float] = {}

    @property
    def settling(self) -> bool:
        """Whether jobs are looked for that a killed fleet may have submitted."""
        return bool(self._sought)

    def see_queue(self) -> None:
        """Look at the queue, if there are claims at all; it need not be visible from here."""
        self._live = []
        if self._claims.names():
            try:
                self._live = queue.mine()
            except queue.UnavailableError:
                self._live = None

    def status(self, cell: Cell) -> Status:
        """Where a cell stands. Attempts that have ended without a result are counted."""
        if cell.result is None:
            return Status("failed", cell.problem)

        try:
            claim = self._claims.read(cell.name)
        except EvalError as error:
            return Status("failed", str(error))

        working = claim.holder and self._working(cell, claim, claim.holder)
        # Looked for after the job, which may just have written it.
        if cell.result.exists():
            self._claims.write(cell.name, Claim())
            if self._pool:
                self._pool.code(cell.log)
            return self._measured(cell.result)

        if working:
            return working
        if claim.holder:
            claim = self._ended(cell, claim, claim.holder)
            self._claims.write(cell.name, claim)

        if claim.refused or claim.attempts > self._retries:
            return Status("failed", claim.error, tried=True)

        waits = time.time() < claim.after
        return Status("pending" if waits else "missing", claim.error, tried=claim.attempts > 0)

    def _measured(self, path: Path) -> Status:
        if path not in self._values:
            try:
                result = results.parse(path)[0]
                self._values[path] = Status("measured", scores.written(result, result.main))
            except EvalError as error:
                return Status("failed", str(error))

        return self._values[path]

    def _working(self, cell: Cell, claim: Claim, holder: Holder) -> Status | None:
        """Of a holder that is at work or waits; None for one that has ended."""
        if not holder.launch:
            if holder.fleet == self._claims.fleet:
                mine = self._pool is not None and self._pool.running(cell.log)
                return Status("running") if mine else None
            other = Status("running", f"fleet {holder.fleet}")
            return other if self._claims.alive(holder.fleet) else None

        if self._live is None:
            return Status("pending", f"job {holder.job}, of a queue that is not visible from here")

        job = jobs.find(self._live, cell.run, holder)
        if job is None:
            return None if holder.job or self._has_settled(holder.launch) else Status("pending")

        self._sought.pop(holder.launch, None)
        if not holder.job:
            known = holder.model_copy(update={"job": job.id})
            self._claims.write(cell.name, claim.held_by(known))

        begun = job.state in ("RUNNING", "COMPLETING")
        return Status("running" if begun else "pending", f"job {job.id}")

    def _has_settled(self, launch: str) -> bool:
        """Whether a launch has been looked for long enough."""
        begun = self._sought.setdefault(launch, time.monotonic())
        if time.monotonic() < begun + SETTLE:
            return False
        del self._sought[launch]
        return True

    def _ended(self, cell: Cell, claim: Claim, holder: Holder) -> Claim:
        """A claim whose holder has ended without a result."""
        if holder.job:
            code, log = jobs.exit_code(cell.run, holder), jobs.log(cell.run, holder)
            worn_out = jobs.worn_out(cell.run, holder)
            return claim.failed(_complaint(code, log), code, give_up=worn_out)

        code = self._pool.code(cell.log) if self._pool else None
        # It ended with its fleet, or was never submitted.
        if holder.launch or code is None:
            return claim.held_by(None)
        if code in ASKED:
            self._stops[cell.name] += 1
            if self._stops[cell.name] <= jobs.STOPS:
                return claim.held_by(None)

        return claim.failed(_complaint(code, cell.log), code)


def _complaint(code: int | None, log: Path) -> str:
    """What an attempt said last, and where there is more."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []

    said = [line for line in lines if line.strip()] or ["it wrote nothing"]
    errors = [line for line in said if line.startswith("error: ")]
    last = (errors or said)[-1].removeprefix("error: ")
    how = "it was killed" if code is None or code < 0 else f"exit code {code}"
    return f"{how}; {last} ({log})"
