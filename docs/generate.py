"""Write the generated pages of docs/reference: config.md from the schema, cli.md from the commands,
methods.md from the methods and their recipes.

    python docs/generate.py [FOLDER]

Run it after a change of a configuration field, a command-line option, a method or a recipe;
tests/e2e/test_docs.py compares the committed pages with what it writes.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest import mock

import typer

from scaletrain.config import load
from scaletrain.config.schema import Frozen, components
from scaletrain.evals import benchmark, features
from scaletrain.evals.datasets import BenchmarkDataset
from scaletrain.evals.encoders.encoder import EncoderConfig
from scaletrain.pipelines import load as pipelines
from scaletrain.pipelines.schema import PipelineConfig
from scaletrain.report import catalogue

ROOT = Path(__file__).parents[1]
NOTE = "<!-- Written by `python docs/generate.py`; do not edit. -->\n"
CONFIG = """# Configuration

Every key of a recipe, with its type and default. In an override, `a.b` is the key `b` of the
section `a`: `optim.lr=0.45`, `data.views.1.size=96`, `method.tau=0.99`. `method=NAME`,
`engine=NAME` and `data=PATH` are short for `method.name`, `engine.name` and `data.path`. Each
method, engine and auxiliary objective has keys of its own, listed after the shared ones. How
recipes extend each other is described in [training](../guides/training.md#recipes-and-overrides).
"""
EVALUATION = """## Evaluation settings

They are set by `scaletrain eval --set KEY=VALUE`, see [evaluation](../guides/evaluation.md).
"""
DATASETS = """## Evaluation datasets

Keys of a descriptor in configs/datasets or of your own, see
[evaluation](../guides/evaluation.md#datasets).
"""
PIPELINES = """## Pipelines

Of a pipeline file, see [pipelines](../guides/pipelines.md): its keys, those of a stage, and the
options of each computation under `set`.
"""
METHODS = """# Methods

Every method with its paper, and the figures that were published for its recipes. **None of them was
reproduced here**; the head of each recipe has its command and the source of its values, and marks
what could not be verified. `scaletrain show methods` prints the same list with all lengths, widths
and depths. Rotation prediction, alone the method `rotation`, and SuNCEt (few labels) are
[auxiliary losses](../guides/training.md#auxiliary-losses) of other methods.

What was measured on two CPU cores is in [benchmarks/RESULTS.md](../../benchmarks/RESULTS.md), each
with its command; what one GPU computes, and how fast, in
[benchmarks/GPU.md](../../benchmarks/GPU.md). The controlled comparisons of the papers are
[studies](../guides/studies.md).

PIRL takes two views: the first is cut into nine patches, the other is the image. MoCo, DenseCL,
NNCLR, PIRL and PCL keep their queues and memories in the order of the global batch. With
`model.norm_group` set, MoCo, DenseCL and PCL use ShuffleBN ([batch norm](../explain/batchnorm.md)).
"""
CLI = """# Command line

`--help` prints the same text in a terminal. All commands share the
[exit codes](run-folder.md#exit-codes).
"""
# section of a recipe and the package that holds its kinds
KINDS = {"method": "methods", "engine": "engines", "auxiliaries": "auxiliaries"}
TYPES = {
    "integer": "integer",
    "number": "float",
    "string": "text",
    "boolean": "`true`, `false`",
    "object": "mapping",
    "null": "`null`",
}
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def main(folder: Path) -> None:
    """Write the pages into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages().items():
        (folder / name).write_text(page)


def pages() -> dict[str, str]:
    """The generated pages by file name."""
    return {"config.md": config_page(), "cli.md": cli_page(), "methods.md": methods_page()}


# --- configuration --------------------------------------------------------------------------------


def config_page() -> str:
    """Tables of all configuration keys, read from the JSON schema that editors use."""
    schema = load.schema()
    definitions = schema["$defs"]
    parts = [CONFIG, NOTE, *tables("", {**schema, "title": "Run"}, definitions, skip=KINDS)]

    for section, kind in KINDS.items():
        parts.append(f"## {kind.capitalize()}\n")
        for name in components(kind):
            model = definitions[f"{section}.{name}"]
            parts += tables(f"{section}.", model, definitions, level=3, skip=("name",))

    parts.append(EVALUATION)
    models: dict[str, type[Frozen]] = {
        "encoder": EncoderConfig,
        "features": features.FeatureConfig,
    }
    models |= {name: benchmark.load(name).Config for name in benchmark.names()}
    for name, config in models.items():
        found = {**config.model_json_schema(), "title": name}
        parts += tables(f"{name}.", found, found.get("$defs", {}), level=3)

    parts.append(DATASETS)
    found = {**BenchmarkDataset.model_json_schema(), "title": "dataset"}
    found["properties"]["name"]["default"] = "that of the file"
    parts += tables("", found, found.get("$defs", {}), level=3)

    parts.append(PIPELINES)
    models = {"pipeline": PipelineConfig}
    models |= {
        f"do: {name}": pipelines.computation(name).Config for name in pipelines.computations()
    }
    for name, config in models.items():
        found = {**config.model_json_schema(), "title": name}
        parts += tables("", found, found.get("$defs", {}), level=3)

    return "\n".join(parts)


def tables(
    prefix: str,
    model: Mapping[str, Any],
    definitions: Mapping[str, Any],
    *,
    level: int = 2,
    skip: Mapping[str, str] | tuple[str, ...] = (),
) -> list[str]:
    """A table of a model's fields, and one more for each model among their types."""
    lines, nested = [], {}
    for key, field in model.get("properties", {}).items():
        if key in skip or (key == "base" and not prefix):
            continue

        kind, inner = type_of(field, definitions)
        if inner:
            nested[key] = inner
        default = "" if inner else default_of(field)
        lines.append(
            f"| `{prefix}{key}` | {kind} | {default} | {cell(field.get('description', ''))} |"
        )

    about = " ".join(model.get("description", "").partition("\n\n")[0].split())
    result = [f"{'#' * level} {model['title']}\n"]
    result += [f"{about}\n"] if about else []
    if lines:
        result += ["| key | type | default | meaning |\n|---|---|---|---|", *lines, ""]
    else:
        result.append("No keys of its own.\n")

    for key, inner in nested.items():
        titled = {**inner, "title": f"{prefix}{key}"}
        result += tables(f"{prefix}{key}.", titled, definitions, level=level)

    return result


def type_of(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> tuple[str, Any]:
    """A field's type in words, and the model within it, if any."""
    if "$ref" in field:
        model = definitions[field["$ref"].rpartition("/")[2]]
        return "section", model

    if "anyOf" in field:
        found = [type_of(option, definitions) for option in field["anyOf"]]
        words = dict.fromkeys(word for word, _ in found)
        return " or ".join(words), next((model for _, model in found if model), None)

    if "enum" in field or "const" in field:
        values = field.get("enum", [field.get("const")])
        return ", ".join(code(value) for value in values), None

    if field.get("type") == "array":
        items = field.get("prefixItems", [field.get("items", {})])
        word, model = type_of(items[0], definitions)
        return f"{len(items) if 'prefixItems' in field else 'list'} of: {word}", model

    kind = field.get("type", "any")
    limits = [f"{word} {field[key]:,g}" for key, word in BOUNDS.items() if key in field]
    return f"{TYPES.get(kind, kind)} {' and '.join(limits)}".strip(), None


def default_of(field: Mapping[str, Any]) -> str:
    return code(field["default"]) if "default" in field else "required"


def code(value: Any) -> str:
    """A value as a recipe has it."""
    special = {"": '""', "True": "true", "False": "false", "None": "null"}
    return f"`{special.get(str(value), value)}`"


def cell(text: str) -> str:
    """Text of a table's cell."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", r"\<")


# --- methods --------------------------------------------------------------------------------------


def methods_page() -> str:
    """A table of the methods of each kind."""
    parts = [METHODS, NOTE]
    listed = catalogue.entries("methods")

    for kind in dict.fromkeys(entry.kind for entry in listed):
        parts.append(f"## {kind.capitalize()}\n\n| method | paper | recipe and published figure |")
        parts.append("|---|---|---|")
        for entry in (entry for entry in listed if entry.kind == kind):
            recipes = [
                f"[{name}](../../configs/{name}.yaml): {cell(figure)}"
                for name, figure in entry.recipes.items()
                if name.endswith(("_r50_in1k", "_r18_cifar10"))
            ]
            paper = re.sub(r"arXiv\s(\d+\.\d+)", r"[\1](https://arxiv.org/abs/\1)", entry.paper)
            parts.append(f"| `{entry.name}` | {cell(paper)} | {'<br>'.join(recipes)} |")
        parts.append("")

    return "\n".join(parts)


# --- command line ---------------------------------------------------------------------------------


def cli_page() -> str:
    """A section for every command of the program, and for every script that is more than a call
    of it.
    """
    return "\n".join([CLI, NOTE, *(section(*found) for found in commands())])


def commands() -> Iterator[tuple[str, Any]]:
    """Every command: how it is called, and its click command or, of another parser, its help."""
    program = captured(partial(runpy.run_module, "scaletrain", run_name="__main__"))
    yield from tree("scaletrain", typer.main.get_command(program))

    for path in sorted([*(ROOT / "shards").glob("*.py"), *(ROOT / "launchers").glob("*.py")]):
        script = captured(partial(runpy.run_path, str(path), run_name="__main__"))
        if script is not program:
            command = script if isinstance(script, str) else typer.main.get_command(script)
            yield f"python {path.relative_to(ROOT)}", command


class _Captured(BaseException):
    """Leaves a program where it would parse its arguments."""


def captured(start: Callable[[], Any]) -> Any:
    """The typer application that a program calls, or the help that it prints without one."""
    apps: list[typer.Typer] = []

    def leave(app: typer.Typer, *_: Any, **__: Any) -> None:
        apps.append(app)
        raise _Captured

    out = io.StringIO()
    with (
        mock.patch.object(typer.Typer, "__call__", leave),
        mock.patch.object(sys, "argv", ["", "--help"]),
        mock.patch.dict("os.environ", {"COLUMNS": "100"}),
        contextlib.redirect_stdout(out),
        contextlib.suppress(_Captured, SystemExit),
    ):
        start()

    return apps[0] if apps else out.getvalue()


def tree(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command and all below it."""
    yield name, command
    if hasattr(command, "list_commands"):
        context = command.context_class(command, info_name=name)
        for inner in command.list_commands(context):
            yield from tree(f"{name} {inner}", command.get_command(context, inner))


def section(name: str, command: Any) -> str:
    """Usage, description, arguments and options of a command."""
    if isinstance(command, str):
        return f"## {name}\n\n```text\n{command.strip()}\n```\n"

    context = command.context_class(command, info_name=name)
    about = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    found = [one for one in command.get_params(context) if one.name != "help"]
    options = ["[OPTIONS]"] if any(is_option(one) for one in found) else []
    needed = ["COMMAND"] if hasattr(command, "list_commands") else []
    needed += [value_of(one) for one in found if not is_option(one)]
    usage = " ".join([name, *needed, *options])
    parts = [f"## {name}\n\n```text\n{usage}\n```\n\n{about}\n"]

    hints = get_type_hints(inspect.unwrap(command.callback)) if command.callback else {}
    if found:
        parts.append("| argument or option | default | meaning |\n|---|---|---|")
        parts += [*(row(one, hints.get(one.name)) for one in found), ""]

    return "\n".join(parts)


def row(parameter: Any, hint: Any) -> str:
    """A line of a command's table; `hint` is the type of the function's parameter."""
    value = " or ".join(get_args(hint)) if get_origin(hint) is Literal else value_of(parameter)
    flag = getattr(parameter, "is_flag", False)
    called = value
    if is_option(parameter):
        called = ", ".join(parameter.opts) + ("" if flag else f" {value}")

    default = parameter.default
    if isinstance(default, Path) and default.is_absolute():
        default = default.relative_to(ROOT)
    unset = default is None or default is False or default in ((), []) or callable(default)
    shown = "required" if parameter.required else "" if unset else f"`{default}`"

    return f"| `{called.replace('|', ' or ')}` | {shown} | {cell(parameter.help or '')} |"


def is_option(parameter: Any) -> bool:
    return bool(parameter.opts[0].startswith("-"))


def value_of(parameter: Any) -> str:
    """What stands for the value of an argument or option."""
    return str(parameter.metavar or parameter.name.upper())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "reference")
