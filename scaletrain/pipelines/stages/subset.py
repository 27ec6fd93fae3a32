"""Writes a label subset of a folder of shards, `subset.json`, as `scaletrain shards subset`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from scaletrain.config.fields import Count, Frozen, Natural, Place
from scaletrain.config.recipe import shards as joined
from scaletrain.pipelines.context import StageContext


class Config(Frozen):
    shards: Annotated[Place, BeforeValidator(joined), Field(min_length=1)]
    """Folder, pattern or address of labelled shards."""

    share: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    """Per cent of all labelled samples: 1 or 10."""

    per_class: Count | None = None
    """Samples per class, instead of `share`."""

    seed: Natural = 0
    """Seed of the selection. With one seed, a smaller subset lies inside a larger one."""

    @model_validator(mode="after")
    def _one_rule(self) -> Config:
        if (self.share is None) == (self.per_class is None):
            raise ValueError("give exactly one of share and per_class")
        return self


def run(config: Config, context: StageContext) -> None:
    from scaletrain.data.reading import subset
    from scaletrain.data.reading.reader import Shards

    shards: Any = Shards(config.shards)
    if config.share is not None:
        chosen = subset.by_share(shards.labels(), config.share / 100, config.seed)
        rule = f"{config.share:g} % of all, seed {config.seed}"
    else:
        assert config.per_class is not None
        chosen = subset.per_class(shards.labels(), config.per_class, config.seed)
        rule = f"{config.per_class} of each class, seed {config.seed}"

    subset.save(context.output / "subset.json", shards, chosen, rule)
    context.say(f"{len(chosen):,} of {len(shards):,} samples: {rule}")
