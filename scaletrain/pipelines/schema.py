"""The schema of a pipeline file: its options and its stages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from scaletrain.config.fields import Count, Frozen, Natural
from scaletrain.config.recipe import brief

# Words that have a meaning of their own in references.
RESERVED = ("item", "work")


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", text) or text in RESERVED:
        raise ValueError(
            f"'{brief(text)}' is not a name: use small letters, digits and _, and none of "
            f"{', '.join(RESERVED)}"
        )

    return text


Name = Annotated[str, AfterValidator(_name)]


class StageResources(Frozen):
    """What the SLURM job of a stage asks for in place of the command line's options."""

    nodes: Count | None = None
    """A computation has one node and one process."""

    tasks_per_node: Count | None = None
    gpus_per_node: Natural | None = None
    cpus_per_task: Count | None = None
    time: str | None = None
    """Limit, such as 2:00:00."""

    mem: str | None = None
    """Per node, such as 480G."""


class StageConfig(Frozen):
    """A training run or a computation; exactly one of `train` and `do` is given."""

    name: Name
    """Folder of the stage below the pipeline's, and its name in references."""

    train: str = ""
    """Recipe to train, a name or a file relative to this one: the folder becomes its run folder."""

    do: str = ""
    """Computation, a file of scaletrain/pipelines/stages: `subset` or `evaluate`. It writes into
    the folder.
    """

    set: Mapping[str, Any] = Field({})
    """Changes of the recipe by (dotted) key, or the options of the computation."""

    init: str = ""
    """Training only: as `--init`, what the backbone of the run starts from."""

    continue_: str = Field("", alias="continue")
    """Training only: a run or step whose whole state the run starts from, with a schedule of its
    own.
    """

    after: tuple[str, ...] = ()
    """Stages that must be finished first, besides those that are referred to."""

    foreach: int | tuple[str | int | float | bool, ...] | str | None = None
    """A number N, or a list of values: one stage NAME-0, NAME-1, ... for each of 0 to N-1 or each
    value, which is `${item}` in it.
    """

    resources: StageResources = StageResources()
    """Of the stage's SLURM job."""

    @model_validator(mode="after")
    def _one_kind(self) -> StageConfig:
        if bool(self.train) == bool(self.do):
            raise ValueError("give exactly one of `train` and `do`")
        if self.do and (self.init or self.continue_):
            raise ValueError("`init` and `continue` belong to a stage with `train`")
        if self.init and self.continue_:
            raise ValueError("`init` and `continue` exclude each other")
        return self


class PipelineConfig(Frozen):
    """Runs and computations that build on each other."""

    options: Mapping[Name, Any] = Field({})
    """Values for `${NAME}`, which `NAME=VALUE` changes; one that is `null` must be given."""

    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> PipelineConfig:
        counts = Counter([*self.options, *(stage.name for stage in self.stages)])
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"'{twice[0]}' names two stages or options")
        return self
