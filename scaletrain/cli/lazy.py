"""Groups of commands whose code is imported only when one of them runs: it needs NumPy, OpenCV and
more, and the help of the group does not.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup


class Command(NamedTuple):
    """Where the function of a command is, `module:function`, and the beginning of its help."""

    target: str
    help: str
    # options that it does not know are among its arguments
    passes_on: bool = False


GROUPS = {
    "shards": "Write shards of images, index and verify them, choose labels.",
    "launch": "Train or evaluate with several processes, on this machine or on a cluster.",
}
COMMANDS = {
    "shards": {
        "folder": Command(
            "scaletrain.importers.folder:main", "Write shards from a folder of images"
        ),
        "imagenet": Command("scaletrain.importers.imagenet:main", "Write shards from ImageNet"),
        "listing": Command(
            "scaletrain.importers.listing:main", "Write shards from a listing of images"
        ),
        "cifar10": Command("scaletrain.importers.cifar:cifar10", "Write shards from CIFAR-10"),
        "cifar100": Command("scaletrain.importers.cifar:cifar100", "Write shards from CIFAR-100"),
        "fashion-mnist": Command(
            "scaletrain.importers.fashion_mnist:main", "Write shards from Fashion-MNIST"
        ),
        "from-torchvision": Command(
            "scaletrain.importers.from_torchvision:main",
            "Write shards from a classification data set of torchvision",
        ),
        "subset": Command(
            "scaletrain.cli.shards:subset", "Write a subset of the samples of shards"
        ),
        "index": Command(
            "scaletrain.cli.shards:index", "Make the index of a folder of WebDataset tars"
        ),
        "verify": Command("scaletrain.cli.shards:verify", "Check every byte of shards"),
    },
    "launch": {
        "local": Command(
            "scaletrain.launch.local:main", "Train on this machine with several processes", True
        ),
        "slurm": Command("scaletrain.launch.slurm.command:main", "Train on a SLURM cluster"),
        "fleet": Command(
            "scaletrain.launch.fleet.command:main", "Evaluate the checkpoints of runs"
        ),
    },
}


class _Lazy(TyperGroup):
    """Holds placeholders with a line of help, and imports a command when it is asked for."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return load(str(self.name), cmd_name) if cmd_name in self.commands else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # launchers pass signals on
        if self.name != "launch":
            from scaletrain.runtime.signals import ending_at_once

            ctx.with_resource(ending_at_once())

        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.help or "") for name, one in self.commands.items()])


def group(name: str) -> typer.Typer:
    result = typer.Typer(cls=_Lazy, rich_markup_mode=None)
    for command, found in COMMANDS[name].items():
        result.command(command, help=f"{found.help}.")(lambda: None)

    return result


def load(group: str, name: str) -> Any:
    """A command, imported."""
    found = COMMANDS[group][name]
    module, _, function = found.target.partition(":")
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    settings = {"ignore_unknown_options": True} if found.passes_on else {}
    app.command(name, context_settings=settings)(getattr(importlib.import_module(module), function))

    return typer.main.get_command(app)
