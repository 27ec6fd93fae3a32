"""A pipeline file to stages that can be run: options, `foreach`, references and order."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scaletrain.config import recipe
from scaletrain.config.fields import Frozen
from scaletrain.config.recipe import ConfigError, brief, closest, nearest
from scaletrain.config.validation import explain
from scaletrain.pipelines import stages as package
from scaletrain.pipelines.references import substitute, written
from scaletrain.pipelines.schema import PipelineConfig, StageConfig, StageResources

# Most stages of a pipeline, those of every `foreach` counted.
STAGES = 1000
# What a stage offers to others: the word in a reference, whether of a run, whether of all.
OFFERS = {
    "run": (True, False),
    "runs": (True, True),
    "output": (False, False),
    "outputs": (False, True),
}


@dataclass(frozen=True)
class Stage:
    """A stage with everything resolved; of a `foreach`, one of its stages."""

    name: str
    folder: Path
    # Recipe to train; None for a computation.
    recipe: Path | None
    # Computation and its options; "" and None for training.
    do: str
    config: Frozen | None
    # Changes of the recipe, as on a command line.
    overrides: tuple[str, ...]
    init: str
    continues: str
    # Stages whose results it uses, ...
    inputs: tuple[str, ...]
    # ... and all that must be finished before it.
    after: tuple[str, ...]
    resources: StageResources


@dataclass(frozen=True)
class Pipeline:
    """The stages of a pipeline in an order in which they can be run."""

    file: Path
    work: Path
    # Changes of the command line.
    words: tuple[str, ...]
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        """Raises ConfigError for an unknown name."""
        known = {stage.name: stage for stage in self.stages}
        if name not in known:
            raise ConfigError(f"{self.file}: {_unknown(name, known)}")
        return known[name]

    def upstream(self, name: str) -> tuple[Stage, ...]:
        """The stages that must be finished before a stage, those of them before these included."""
        needed = set(self.stage(name).after)
        for stage in reversed(self.stages):
            if stage.name in needed:
                needed.update(stage.after)

        return tuple(stage for stage in self.stages if stage.name in needed)


def load(name: str | Path, work: Path, words: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline, the file or name of configs/pipelines, with changes such as `data=FOLDER` of
    an option or `pretrain.epochs=2` of a stage. Raises ConfigError for anything that cannot be run.
    """
    file, work = find(name), work.expanduser().absolute()
    raw = recipe.document(file)
    try:
        config = PipelineConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{file}: {explain(error, _hint)}") from None

    try:
        stages = _Resolver(config, file, work, words).stages()
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None

    return Pipeline(file, work, tuple(words), tuple(stages))


def find(name: str | Path) -> Path:
    """The file of a pipeline, given as a path or as the name of a file of configs/pipelines."""
    path = Path(name)
    known = {
        key.removeprefix("pipelines/"): file
        for key, file in recipe.shipped().items()
        if key.startswith("pipelines/")
    }
    short = str(name).removesuffix(".yaml").removeprefix("pipelines/")
    if path.is_file() or short not in known:
        if not path.exists() and not path.suffix:
            raise ConfigError(
                f"there is neither a file nor a pipeline named '{brief(str(name))}'; available: "
                f"{', '.join(known)}"
            )

        return path.absolute()

    return known[short]


def computations() -> tuple[str, ...]:
    """Names of all computations."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


def computation(name: str) -> Any:
    """The module of a computation."""
    return importlib.import_module(f"{package.__name__}.{name}")


class _Resolver:
    """Resolves the references of a pipeline."""

    def __init__(
        self, config: PipelineConfig, file: Path, work: Path, words: Iterable[str]
    ) -> None:
        self._file, self._work = file, work
        self._options, changes = _changed(config, words)
        known = {key: value for key, value in self._options.items() if value is not None}
        if missing := [key for key in self._options if key not in known]:
            raise ConfigError(f"the option '{missing[0]}' has no value: add {missing[0]}=VALUE")

        self._configs: dict[str, StageConfig] = {}
        for stage in config.stages:
            merged = {**stage.set, **changes.get(stage.name, {})}
            given = substitute(
                {
                    **stage.model_dump(by_alias=True, exclude={"resources"}, exclude_unset=True),
                    "set": merged,
                },
                lambda text: known.get(text, written(text)),
            )
            try:
                self._configs[stage.name] = StageConfig.model_validate(
                    {**given, "resources": stage.resources}
                )
            except ValidationError as error:
                raise ConfigError(f"stage '{stage.name}': {explain(error, _hint)}") from None

        self._items = {name: _items(stage) for name, stage in self._configs.items()}
        if sum(len(items) for items in self._items.values()) > STAGES:
            raise ConfigError(f"it has more than {STAGES} stages")

    def stages(self) -> list[Stage]:
        found = [
            self._stage(name, number, item)
            for name, items in self._items.items()
            for number, item in enumerate(items)
        ]

        return _ordered(found)

    def _stage(self, name: str, number: int, item: Any) -> Stage:
        config, inputs = self._configs[name], list[str]()

        def resolve(text: str) -> Any:
            if text == "item" and config.foreach is not None:
                return item
            value, used = self._value(text, name, number)
            inputs.extend(used)
            return value

        try:
            given = substitute(
                {"set": config.set, "init": config.init, "continue": config.continue_}, resolve
            )
            after = [other for one in config.after for other in self._all(one)]
            overrides = tuple(f"{key}={json.dumps(value)}" for key, value in given["set"].items())
            path = None if config.do else self._recipe(config.train)
            return Stage(
                name=self._instance(name, number),
                folder=self._work / self._instance(name, number),
                recipe=path,
                do=config.do,
                config=_options(config.do, overrides) if config.do else None,
                overrides=overrides,
                init=_path(given["init"]),
                continues=_path(given["continue"]),
                inputs=tuple(dict.fromkeys(inputs)),
                after=tuple(dict.fromkeys([*inputs, *after])),
                resources=config.resources,
            )
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"stage '{name}': {error}") from None

    def _recipe(self, name: str) -> Path:
        """The file of a recipe, which must be readable."""
        path = recipe.find(name, self._file.parent)
        recipe.read(path)
        return path.absolute()

    def _value(self, text: str, user: str, number: int) -> tuple[Any, list[str]]:
        """What a reference to a stage stands for in the stage `user` with this number, and the
        stages that it refers to.
        """
        name, dot, word = text.partition(".")
        what = f"the reference {brief(written(text))}"
        if not dot:
            hint = nearest(name, self._options) or (
                f"; options are {', '.join(self._options)}" if self._options else ""
            )
            item = "; ${item} needs `foreach`" if name == "item" else ""
            raise ConfigError(f"{what} names no option{item or hint}")
        if word not in OFFERS:
            raise ConfigError(
                f"{what} ends in '{brief(word)}'; a stage has {', '.join(OFFERS)}"
                f"{nearest(word, OFFERS)}"
            )

        of_run, of_all = OFFERS[word]
        base = name.partition("-")[0]
        if (base in self._configs) and of_run == bool(self._configs[base].do):
            other = "output" if of_run else "run"
            raise ConfigError(
                f"{what}: stage '{base}' has no {word}; {written(f'{name}.{other}')} is its folder"
            )

        stages = self._all(name, what)
        paths = [str(self._work / stage) for stage in stages]
        if of_all:
            return paths, stages
        if name == base and self._configs[base].foreach is not None:
            if self._configs[user].foreach is None or len(stages) != len(self._items[user]):
                raise ConfigError(
                    f"{what}: '{name}' has {len(stages)} stages; "
                    f"{written(f'{name}.{word}s')} is the list of all, and "
                    f"{written(f'{name}-0.{word}')} is one of them"
                )
            return paths[number], [stages[number]]

        return paths[0], stages

    def _all(self, name: str, what: str = "`after`") -> list[str]:
        """The stages of a name: of a `foreach`, all of them or, by NAME-0, one."""
        base = name.partition("-")[0]
        names = [self._instance(base, n) for n in range(len(self._items.get(base, ())))]
        if name == base and names:
            return names
        if name in names:
            return [name]

        known = [*self._configs, *names]
        raise ConfigError(f"{what}: {_unknown(name, known)}")

    def _instance(self, name: str, number: int) -> str:
        return name if self._configs[name].foreach is None else f"{name}-{number}"


def _unknown(name: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"unknown stage '{brief(name)}'{closest(name, known)}; available: {', '.join(known)}"


def _hint(loc: tuple[int | str, ...]) -> str:
    """What to say of an unknown key."""
    model: type[Frozen] = StageConfig if loc[0] == "stages" else PipelineConfig
    model = StageResources if "resources" in loc[:-1] else model
    known = [field.alias or name for name, field in model.model_fields.items()]
    return nearest(str(loc[-1]), known) or f"; available: {', '.join(known)}"


def _changed(
    config: PipelineConfig, words: Iterable[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The options, and by stage the changes of its `set`, with those of the command line."""
    options, changes = dict(config.options), dict[str, dict[str, Any]]()
    stages = [stage.name for stage in config.stages]

    for word in words:
        # Raises ConfigError for a word of another form.
        recipe.apply({}, [word])
        key, _, text = word.partition("=")
        name, dot, inner = key.partition(".")
        value = recipe.parse(text)
        if not dot and name in options:
            options[name] = value
        elif dot and name in stages:
            # The last change of a key counts.
            changes.setdefault(name, {}).pop(inner, None)
            changes[name][inner] = value
        else:
            known = [*options, *(f"{stage}.KEY" for stage in stages)]
            raise ConfigError(
                f"'{brief(word)}' changes no option and no stage"
                f"{nearest(name, [*options, *stages])}; available: {', '.join(known)}"
            )

    return options, changes


def _items(stage: StageConfig) -> list[Any]:
    """The values of a `foreach`; a single None without one."""
    if stage.foreach is None:
        return [None]
    if isinstance(stage.foreach, int):
        items: list[Any] = list(range(min(stage.foreach, STAGES + 1)))
    else:
        items = [] if isinstance(stage.foreach, str) else list(stage.foreach)

    if not items:
        raise ConfigError(
            f"stage '{stage.name}': foreach is a number of at least 1 or a list of values, not "
            f"{brief(repr(stage.foreach))}"
        )

    return items


def _options(name: str, overrides: Iterable[str]) -> Frozen:
    """The validated options of a computation."""
    known = computations()
    if name not in known:
        raise ConfigError(
            f"unknown computation '{brief(name)}'{closest(name, known)}; available: "
            f"{', '.join(known)}"
        )

    model: type[Frozen] = computation(name).Config
    fields = model.model_fields

    def hint(loc: tuple[int | str, ...]) -> str:
        return nearest(str(loc[-1]), fields) or f"; available: {', '.join(fields)}"

    try:
        return model.model_validate(recipe.apply({}, overrides))
    except ValidationError as error:
        raise ConfigError(explain(error, hint, "set")) from None


def _path(value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"a path is needed, not {brief(repr(value))}")
    return str(Path(value).expanduser().absolute()) if value else ""


def _ordered(stages: Sequence[Stage]) -> list[Stage]:
    """The stages, each after those that it needs, otherwise in their order. Raises ConfigError."""
    left, result = {stage.name: stage for stage in stages}, list[Stage]()

    while left:
        ready = next(
            (stage for stage in left.values() if not any(one in left for one in stage.after)), None
        )
        if ready is None:
            raise ConfigError(f"stages need each other: {' -> '.join(_circle(left))}")
        result.append(left.pop(ready.name))

    return result


def _circle(stages: Mapping[str, Stage]) -> list[str]:
    """Stages of which each needs the next one, and the first one again; each needs one of them."""
    path = [next(iter(stages))]
    while path[-1] not in path[:-1]:
        path.append(next(one for one in stages[path[-1]].after if one in stages))

    return path[path.index(path[-1]) :]
