"""The command line. Heavy modules are imported inside the commands, so that --help is quick.

Expected failures are one `error:` text on stderr, with the exit codes of exit_codes.py; a defect of
this program keeps its traceback.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from scaletrain import exit_codes

if TYPE_CHECKING:
    from scaletrain.config.schema import Config

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="e.g. optim.lr=0.45 data.views.1.size=96"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")]
Ranks = Annotated[int, typer.Option(min=1, help="Processes of the run, one per device.")]
Recipe = Annotated[Path, typer.Argument(help="YAML file, e.g. one of configs/")]


class _Guarded(TyperGroup):
    """Turns exceptions into messages and exit codes, and lets one rank speak for all."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError as error:
            # nobody reads the output any more, as with head
            if error.filename is None and ctx.invoked_subcommand != "train":
                os._exit(141)
            raise
        except Exception as error:
            self._report(ctx, error)

    def _report(self, ctx: Any, error: Exception) -> None:
        # typer's own
        usage = (
            hasattr(error, "exit_code") and type(error).__module__.partition(".")[0] != "scaletrain"
        )
        text, own = _explained(error) or ("", int(getattr(error, "exit_code", exit_codes.DEFECT)))
        code = exit_codes.claim(own)
        if code is not None:
            raise typer.Exit(code) from None
        if usage or not text or ctx.params["debug"]:
            raise error

        with contextlib.suppress(OSError):
            typer.echo(f"error: {text}", err=True)

        raise typer.Exit(own) from None


app = typer.Typer(
    cls=_Guarded,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
show = typer.Typer(no_args_is_help=True, help="Print what there is to configure.")
app.add_typer(show, name="show")


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", envvar="SCALETRAIN_DEBUG", help="Show the traceback of every error."
        ),
    ] = False,
) -> None:
    """Self-supervised image pretraining: train, eval, export."""
    # which saves first
    if context.invoked_subcommand != "train":
        from scaletrain.runtime.signals import ending_at_once

        context.with_resource(ending_at_once())


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Run folder; default runs/<recipe name>. An earlier run is resumed."),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="safetensors file whose backbone starts a new run.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a trace of a few steps to RUN/profile.")
    ] = False,
    change: Annotated[
        bool,
        typer.Option(
            "--change",
            help="Resume although the configuration or the data differ from those of RUN.",
        ),
    ] = False,
    umask: Annotated[
        str | None,
        typer.Option(
            help="Access to RUN, e.g. 027 for your group to read; default: yours alone (077)."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Short for data.path=DATA; `synthetic`: measure speed and memory without data."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Short for steps=STEPS; a throughput check has no warm-up.")
    ] = None,
) -> None:
    """Train by a recipe, or resume; launchers/local.py starts it on several processes."""
    from scaletrain.config import load

    short = [
        f"{key}={value}"
        for key, value in (("data.path", data), ("steps", steps))
        if value is not None
    ]
    # a throughput check is shorter than the warm-up of any recipe
    first = ["optim.warmup_epochs=0"] if data == "synthetic" and steps is not None else []
    config = load.load(recipe, [*first, *(overrides or ()), *short])
    run = run or Path("runs") / recipe.stem

    if os.environ.get("RANK", "0") == "0":
        _print_changes(recipe, load.load(recipe), config)

    from scaletrain.runtime.signals import Stopped
    from scaletrain.train.loop import train as start

    try:
        start(config, run, init=init, trace=profile, change=change, umask=umask)
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            # the terminal whose end was the signal
            with contextlib.suppress(OSError):
                typer.echo(str(stop))
        raise typer.Exit(128 + stop.number) from None


@app.command("eval")
def evaluate(
    target: Annotated[
        Path, typer.Argument(help="Run folder, one step of its checkpoints, or exported file.")
    ],
    benchmarks: Annotated[list[str], typer.Argument(help="e.g. knn linear")],
    train_data: Annotated[
        str | None,
        typer.Option(
            "--train", help="Labelled shards, a folder or address; default: the run's own."
        ),
    ] = None,
    test_data: Annotated[
        str | None, typer.Option("--test", help="Default: `test` or `val` beside them.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="e.g. linear.epochs=20; may be repeated.")
    ] = None,
    encoder: Annotated[
        Literal["trained", "untrained", "pixels"], typer.Option(help="Which encoder to evaluate.")
    ] = "trained",
    labels: Annotated[
        Path | None,
        typer.Option(help="Train on this label subset only, a file of shards/subset.py."),
    ] = None,
    same_numbers: Annotated[
        bool,
        typer.Option(
            "--same-numbers",
            help="Both sets number their classes alike, whatever their classes.json say.",
        ),
    ] = False,
) -> None:
    """Evaluate a frozen encoder; results go to RUN/evals and to the run's TensorBoard."""
    from scaletrain.evals import run as evals
    from scaletrain.report import cards

    results = evals.run(
        target,
        benchmarks,
        train=train_data,
        test=test_data,
        overrides=settings or (),
        encoder=encoder,
        labels=labels,
        same_numbers=same_numbers,
    )

    typer.echo("\n".join(cards.report(results)))


@app.command("compare")
def compare_runs(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN...", help="Run folders whose checkpoints were evaluated."),
    ],
    metric: Annotated[
        str | None,
        typer.Option(help="e.g. linear or knn_20; default: the first that all runs have."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Which settings and data, by the digest that is shown where there are several."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON in place of the tables.")
    ] = False,
) -> None:
    """Accuracy of several runs against epochs, images and time, and when each reaches the other's
    final one.
    """
    from scaletrain.report import compare
    from scaletrain.runtime import tables

    found = compare.compare(runs, metric, protocol)
    typer.echo(
        json.dumps(found, indent=1) if as_json else "\n".join(compare.show(found, tables.width()))
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    file: Annotated[
        Path, typer.Argument(help="safetensors file to write, with torchvision's ResNet names.")
    ],
    step: Annotated[
        int | None, typer.Option(help="Checkpoint to take; default: the newest good one.")
    ] = None,
) -> None:
    """Write the trained backbone to one file that torchvision, timm and `train --init` load."""
    from scaletrain.checkpoint import files, reader
    from scaletrain.config import load
    from scaletrain.evals import targets

    root = run / "checkpoints"
    source = reader.latest(root) if step is None else reader.open_step(reader.folder_of(root, step))
    if source is None:
        raise files.CheckpointError(f"{root}: no checkpoint to export; is {run} a run folder?")

    names = [name for name in source.names() if name.startswith(targets.BACKBONE)]
    tensors = {
        name.removeprefix(targets.BACKBONE): source.read(name).view(source.shape(name))
        for name in names
    }
    files.export(tensors, file, targets.describe(load.load(run / "config.yaml"), source.step))
    typer.echo(f"{file}: backbone of step {source.step}, {len(tensors)} tensors")


@app.command()
def doctor(
    run: Annotated[
        Path, typer.Option(help="Run folder to measure; if it holds a run, with that run's recipe.")
    ] = Path("runs"),
    data: Annotated[Path | None, typer.Option(help="Folder of shards to measure.")] = None,
    require_gpu: Annotated[
        bool, typer.Option("--require-gpu", help="Fail where there is no GPU.")
    ] = False,
) -> None:
    """Check installation, machine, disks and network: a page for a bug report; torchrun starts it
    on several processes.
    """
    from scaletrain.doctor import run as doctor

    if doctor.examine(run, data, require_gpu=require_gpu):
        raise typer.Exit(1)


@show.command("config")
def show_config(recipe: Recipe, overrides: Overrides = None) -> None:
    """The resolved configuration, as a run saves it."""

    from scaletrain.config import load

    typer.echo(load.dump(load.load(recipe, overrides or ())), nl=False)


@show.command("model")
def show_model(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, FLOPs per view and step, and activation memory of a recipe; nothing is
    computed.
    """
    from scaletrain.config import load
    from scaletrain.estimate import model

    found = model.measure(load.load(recipe, overrides or ()))
    typer.echo(json.dumps(found, indent=1)) if as_json else model.show(found)


@show.command("memory")
def show_memory(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Ranks = 8,
    as_json: AsJson = False,
) -> None:
    """Bytes that each rank holds under each engine, of parameters, gradients, optimizer, target,
    buffers and activations.
    """
    from scaletrain.config import load
    from scaletrain.estimate import memory

    found = memory.measure(load.load(recipe, overrides or ()), ranks)
    typer.echo(json.dumps(found, indent=1)) if as_json else memory.show(found)


@show.command("comm")
def show_comm(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Ranks = 8,
    as_json: AsJson = False,
) -> None:
    """What the ranks send each other in a step: collectives and bytes by kind and purpose,
    predicted for any number of them.

    torchrun --nproc-per-node 2 -m scaletrain show comm ... counts them in a real step instead.
    """
    from scaletrain.config import load
    from scaletrain.estimate import comm

    found = comm.measure(load.load(recipe, overrides or ()), ranks)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(json.dumps(found, indent=1)) if as_json else comm.show(found)


@show.command("schema")
def show_schema() -> None:
    """JSON schema of recipes, for editors."""

    from scaletrain.config import load

    typer.echo(json.dumps(load.schema(), indent=1))


@show.command("methods")
def show_methods() -> None:
    """Every method and auxiliary: paper, family, recipes and published figures."""
    from scaletrain.report import catalogue
    from scaletrain.runtime import tables

    width = tables.width()
    for line in (
        *catalogue.lines("methods"),
        "",
        "added to a method by `auxiliaries`:",
        *catalogue.lines("auxiliaries"),
    ):
        typer.echo(tables.wrap(line, width, 8))


def _print_changes(recipe: Path, before: Config, after: Config) -> None:
    from scaletrain.config import load
    from scaletrain.runtime import tables

    changes = load.diff(before, after)
    if not changes:
        typer.echo(f"configuration: {recipe} as it is")
        return

    rows = [
        (key, *("-" if value is None else value for value in (old, new)))
        for key, old, new in changes
    ]
    tables.show(("key", "recipe", "this run"), rows, title=f"changes of the recipe {recipe}")


def _explained(error: Exception) -> tuple[str, int] | None:
    """The text and the exit code of an error that is to be expected; None for a defect of this
    program.
    """
    if isinstance(error, MemoryError):
        return (
            f"out of memory ({error}): lower batch, data.workers or data.prefetch",
            exit_codes.RETRY,
        )

    if isinstance(error, RuntimeError) and (torch := sys.modules.get("torch")):
        from scaletrain import dist

        if isinstance(error, torch.OutOfMemoryError):
            text = (
                "out of memory on the GPU: lower batch, or set "
                f"engine.activation_checkpointing=true ({str(error).splitlines()[0]})"
            )
            return text, exit_codes.RETRY

        if text := dist.lost_contact(error):
            return text, exit_codes.RETRY

    if isinstance(error, OSError) or (isinstance(error, ValueError) and _ours(error)):
        return str(error), exit_codes.of(error)

    return None


def _ours(error: ValueError) -> bool:
    """Whether this program raised it on purpose: a library's ValueError is a defect of the call."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next

    here = trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(
        Path(__file__).parent
    )
    return here or type(error).__module__.partition(".")[0] == "scaletrain"


def _follow_launcher() -> None:
    """Die with the local launcher, however it ends: orphans would go on writing to the run
    folder.
    """
    parent = os.environ.get("SCALETRAIN_LAUNCHER")

    if parent and sys.platform == "linux":
        # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != int(parent):
            sys.exit(1)


def main() -> None:
    _follow_launcher()
    try:
        app(prog_name="scaletrain")
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if code in (0, None) or os.environ.get("WORLD_SIZE", "1") == "1":
            raise

        # a normal exit may wait for ever for a collective that the others no longer join, and
        # nobody would see the failure
        if not isinstance(error, SystemExit):
            traceback.print_exc()

        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
