"""Runs the stages of a pipeline one after another, or one of them; nothing is done twice.

Whatever ends the driver, even a kill, the next one finds what is finished, resumes a training run
from its newest good checkpoint, and does a computation that was not finished from the start.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scaletrain import environment, exit_codes
from scaletrain.config import load as recipes
from scaletrain.config.recipe import ConfigError
from scaletrain.pipelines import load, record
from scaletrain.pipelines.context import StageContext
from scaletrain.pipelines.load import Pipeline, Stage
from scaletrain.runtime import durable, locks

LOCK, EARLIER = ".lock", "earlier"
# Names of the stages that were set aside by the last commands, if none of them came to its end.
REDO = ".redo"
# Attempts to lock, a quarter of a second apart: a driver that is being killed may take a moment.
PATIENCE = 20

Start = Callable[[Sequence[str]], int]
"""Runs `scaletrain train` with these arguments in processes of its own; the exit code."""


class BusyError(ConfigError):
    """Another process works on the pipeline or the stage."""

    exit_code = exit_codes.RETRY


class StageError(Exception):
    """The processes of a stage have failed and said why."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"stage '{name}' ended with exit code {code}")
        self.code = code


class Driver:
    """Runs stages in this process, or trains with `start`. `say` prints a line."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        start: Start | None = None,
        umask: str | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._pipeline, self._start, self._umask = pipeline, start, umask
        self._say = say if environment.rank() == 0 else _silent

    def run(self, redo: Collection[str] = ()) -> None:
        """Run every stage that is not finished. redo: stages to set aside and do again."""
        if environment.world() > 1:
            raise ConfigError(
                "a pipeline is driven by one process; --procs N trains with several of them"
            )

        again, work = [self._pipeline.stage(name) for name in redo], self._pipeline.work
        with self._private(), _locked(work / LOCK, f"the pipeline in {work}"):
            # First, so that nothing is moved away for a command that is then refused.
            for stage in self._pipeline.stages:
                if stage in again or not self._done(stage):
                    _check(stage)

            left = [stage for stage in self._pipeline.stages if stage not in again]
            self.refuse_changed(one for one in left if not {*one.inputs} & {*redo})

            if not redo:
                (work / REDO).unlink(missing_ok=True)
            for stage in again:
                self._set_aside(stage)
            self.refuse_changed(left)

            for number, stage in enumerate(self._pipeline.stages):
                try:
                    self._run(stage)
                except BaseException:
                    for other in self._pipeline.stages[number + 1 :]:
                        waits = [one for one in other.after if not self._result(one)]
                        if waits and not self._done(other):
                            self._say(f"{other.name}: waits for {', '.join(waits)}")
                    raise

            (work / REDO).unlink(missing_ok=True)

    def run_one(self, name: str) -> None:
        """Run one stage, whose inputs must be finished: by every process of a job."""
        stage, work = self._pipeline.stage(name), self._pipeline.work
        if stage.recipe is None and environment.world() > 1:
            raise ConfigError(f"stage '{name}' is a computation, which takes one process")

        # Jobs of other stages run at the same time, a driver of all stages does not.
        with self._private(), _locked(work / LOCK, f"the pipeline in {work}", shared=True):
            if waits := [one for one in stage.after if not self._result(one)]:
                raise ConfigError(f"stage '{name}' waits for {', '.join(waits)}: run that first")

            self.refuse_changed(self._pipeline.upstream(name))
            (work / REDO).unlink(missing_ok=True)
            self._run(stage)

    def refuse_changed(self, stages: Iterable[Stage]) -> None:
        """Raise ConfigError where one of these stages is finished and was made from other options,
        inputs or files than those of the pipeline.
        """
        for stage in stages:
            # Where an input is to be made again, the stage is compared once that is there.
            if self._done(stage) and all(self._result(name) for name in stage.inputs):
                self._refuse_changed(stage)

    # --- one stage --------------------------------------------------------------------------------

    def _run(self, stage: Stage) -> None:
        if self._done(stage):
            # Again, for a stage that it uses may have been done since the start.
            self._refuse_changed(stage)
            self._say(f"{stage.name}: finished before")
            return

        _check(stage)
        try:
            if stage.recipe is not None:
                self._train(stage)
            else:
                self._compute(stage)
        except BaseException as error:
            self._say(f"{stage.name}: {_ending(error)}")
            raise

        self._say(f"{stage.name}: finished")

    def _train(self, stage: Stage) -> None:
        run, saved = stage.folder, record.newest(stage.folder)
        if saved is None:
            self._say(f"{stage.name}: starts in {run}")
        else:
            self._refuse_changed(stage)
            self._refuse_moved(stage)
            self._say(f"{stage.name}: resumed at step {saved.step} of {saved.total}")

        main = environment.rank() == 0
        made = self._present(stage)
        if main:
            run.mkdir(parents=True, exist_ok=True)
            record.write(run, made)

        # A run that has checkpoints of its own needs nothing of another.
        init = Path(stage.init) if stage.init and saved is None else None
        source = Path(stage.continues) if stage.continues and saved is None else None
        if self._start is None:
            from scaletrain.train.loop import train

            config = recipes.load(_recipe(stage), stage.overrides)
            train(config, run, init=init, continues=source, umask=self._umask)
        else:
            options = [("--init", init), ("--continue", source), ("--umask", self._umask)]
            given = [word for name, value in options if value for word in (name, str(value))]
            arguments = [str(_recipe(stage)), *stage.overrides, "--run", str(run), *given]
            if code := self._start(arguments):
                raise StageError(stage.name, code)

        # Other ranks do not wait until the first one has saved.
        if main:
            if not self._done(stage):
                raise ConfigError(
                    f"{run} has no checkpoint of its last step although its training has ended"
                )
            record.write(run, self._completed(made, stage))

    def _compute(self, stage: Stage) -> None:
        from scaletrain.runtime.signals import ending_at_once

        work = self._pipeline.work
        partial = work / f".{stage.name}.partial"
        with (
            _locked(work / f".{stage.name}.lock", f"stage '{stage.name}'"),
            ending_at_once(),
        ):
            if self._done(stage):
                return
            if stage.folder.exists():
                raise ConfigError(
                    f"{stage.folder} is there and is not a result of this stage: move it away"
                )
            if partial.exists():
                shutil.rmtree(partial)

            self._say(f"{stage.name}: starts")
            partial.mkdir()
            # Before it runs, so that inputs that change meanwhile are noticed.
            made = self._present(stage)
            context = StageContext(partial, lambda text: self._say(f"{stage.name}: {text}"))
            load.computation(stage.do).run(stage.config, context)

            made = self._completed(made, stage)
            record.write(partial, {**made, "output": record.seal(partial)})
            durable.sync(partial)
            partial.rename(stage.folder)
            durable.sync(work)

    def _refuse_changed(self, stage: Stage) -> None:
        """Raise ConfigError where a stage that has begun was made from other options, inputs or
        files.
        """
        before, now = record.read(stage), self._present(stage)
        own, others = (
            (["it has no record"], []) if before is None else record.differences(before, now)
        )

        if stage.recipe is not None and own:
            from scaletrain.train import run_folder

            # The same configuration may be written in several ways, such as a path.
            config = recipes.load(stage.recipe, stage.overrides)
            own = [f"{k}: {a} -> {b}" for k, a, b in run_folder.differences(stage.folder, config)]
        if before is not None and stage.recipe is None and (file := record.damaged(stage, before)):
            others = [*others, f"{file} is missing or was altered"]

        found = [*own, *others]
        if found:
            listed = "".join(f"\n  {line}" for line in found)
            raise ConfigError(
                f"stage '{stage.name}' in {stage.folder} does not fit the pipeline:{listed}\n"
                f"Restore what it was made from, or --redo {stage.name} does it again"
            )

    def _refuse_moved(self, stage: Stage) -> None:
        """Raise ConfigError where a training run that has begun reads a result of another stage,
        and the folder of the pipeline was at another place then.
        """
        from scaletrain.train import run_folder

        work = f"{self._pipeline.work}/"
        config = recipes.load(_recipe(stage), stage.overrides)
        for key, old, new in run_folder.differences(stage.folder, config):
            if work in str(new) and work not in str(old):
                raise ConfigError(
                    f"stage '{stage.name}' has begun with {key} {old}, which is {new} now: the "
                    "folder of a pipeline cannot be moved before such a stage is finished. Move it "
                    f"back, or --redo {stage.name} does the stage again"
                )

    # --- parts ------------------------------------------------------------------------------------

    def _done(self, stage: Stage) -> bool:
        return bool(record.result(stage))

    def _result(self, name: str) -> str:
        return record.result(self._pipeline.stage(name))

    def _present(self, stage: Stage) -> dict[str, Any]:
        results = {name: self._result(name) for name in stage.inputs}
        return record.present(stage, self._pipeline.work, results)

    def _completed(self, made: dict[str, Any], stage: Stage) -> dict[str, Any]:
        """A record with the files that the stage itself has made, the indices of shards."""
        known = {path: digest for path, digest in made["files"].items() if digest}
        return {**made, "files": {**self._present(stage)["files"], **known}}

    @contextlib.contextmanager
    def _private(self) -> Iterator[None]:
        """Make the folder of the pipeline. Until the end, new files are their owner's alone unless
        the umask, or the access to the folder that is there, says otherwise.
        """
        work, text = self._pipeline.work, self._umask
        mode = stat.S_IMODE(work.stat().st_mode) if work.is_dir() else 0o700
        try:
            mask = 0o777 & ~mode & 0o077 if text is None else int(text, 8) & 0o077
        except ValueError:
            raise ConfigError(f"--umask {text}: give an octal number, such as 027") from None

        before = os.umask(mask)
        try:
            work.mkdir(parents=True, exist_ok=True)
            yield
        finally:
            os.umask(before)

    def _set_aside(self, stage: Stage) -> None:
        """Move the folder of a stage away, so that it is done again. A command that is repeated
        after a kill leaves what it has made of the same options.
        """
        work = self._pipeline.work
        file, earlier = work / REDO, work / EARLIER
        begun = file.read_text().split() if file.is_file() else []
        if stage.folder.exists():
            if stage.name in begun and self._fits(stage):
                self._say(f"{stage.name}: was set aside before by a command that did not end")
                return

            earlier.mkdir(exist_ok=True)
            past = [path.name.rpartition(".")[0] for path in earlier.iterdir()]
            kept = earlier / f"{stage.name}.{1 + past.count(stage.name)}"
            stage.folder.rename(kept)
            self._say(f"{stage.name}: done again; what was there is in {kept}")

        # After the move: a kill between them must not keep the earlier result.
        if stage.name not in begun:
            durable.write(file, "\n".join([*begun, stage.name]) + "\n")

    def _fits(self, stage: Stage) -> bool:
        try:
            self._refuse_changed(stage)
        except ConfigError:
            return False
        return True


def status(pipeline: Pipeline) -> list[tuple[str, str, str]]:
    """Name, kind and state of every stage, as rows of a table."""
    rows = []
    for stage in pipeline.stages:
        waits = [one for one in stage.after if not record.result(pipeline.stage(one))]
        saved = record.newest(stage.folder) if stage.recipe is not None else None
        if record.result(stage):
            state = "finished" + (f", step {saved.step}" if saved else "")
        elif saved is not None:
            state = f"step {saved.step} of {saved.total}"
        else:
            state = f"waits for {', '.join(waits)}" if waits else "ready"

        kind = f"do {stage.do}" if stage.recipe is None else f"train {stage.recipe.stem}"
        rows.append((stage.name, kind, state))

    return rows


def _check(stage: Stage) -> None:
    """Refuse a recipe or a change of it before anything runs. Raises ConfigError."""
    if stage.recipe is not None:
        try:
            recipes.load(stage.recipe, stage.overrides)
        except ConfigError as error:
            raise ConfigError(f"stage '{stage.name}': {error}") from None


def _recipe(stage: Stage) -> Path:
    assert stage.recipe is not None
    return stage.recipe


def _ending(error: BaseException) -> str:
    """How a stage ended."""
    # Known without an import of torch.
    if type(error).__name__ == "Stopped":
        return str(error)

    code = getattr(error, "code", None)
    if isinstance(error, KeyboardInterrupt) or (isinstance(code, int) and code > 128):
        return "stopped; rerun the same command to resume"
    return "failed"


def _silent(_: str) -> None:
    """Says nothing: of several processes, the first one speaks."""


@contextlib.contextmanager
def _locked(path: Path, what: str, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock, of this process. Raises BusyError where another has it."""
    with path.open("a+") as file:
        for patience in range(PATIENCE, -1, -1):
            try:
                if locks.acquire(file.fileno(), wait=False, shared=shared, of_process=True):
                    break
            except OSError:
                # A file system without locks: run folders have another protection there.
                break

            if not patience:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                raise BusyError(f"{what} is being worked on by {holder}")
            time.sleep(0.25)

        if not shared:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()

        yield
