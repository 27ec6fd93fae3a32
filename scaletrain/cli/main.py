"""The program `scaletrain`: its commands, and how failures end.

Expected failures are one `error:` text on stderr, with the exit codes of exit_codes.py; a defect of
this program keeps its traceback.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from scaletrain import exit_codes
from scaletrain.cli import commands, lazy, pipeline, show

# Commands that train: they save before they end.
TRAINING = ("train", "pipeline")


class _Guarded(TyperGroup):
    """Turns exceptions into messages and exit codes, and lets one rank speak for all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # help at once: typer imports pydantic to read even the default of --debug
        if len(args) == 2 and args[0] in self.commands and args[1] in ctx.help_option_names:
            self.commands[args[0]].make_context(args[0], args[1:], parent=ctx)

        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError as error:
            # nobody reads the output any more, as with head
            if error.filename is None and ctx.invoked_subcommand not in TRAINING:
                os._exit(141)
            raise
        except Exception as error:
            self._report(ctx, error)

    def _report(self, ctx: Any, error: Exception) -> None:
        # typer's own
        usage = (
            hasattr(error, "exit_code") and type(error).__module__.partition(".")[0] != "scaletrain"
        )
        text, own = _explained(error, ctx.invoked_subcommand) or (
            "",
            int(getattr(error, "exit_code", exit_codes.DEFECT)),
        )
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
app.command()(commands.train)
app.command("eval")(commands.evaluate)
app.command("compare")(commands.compare_runs)
app.command("leaderboard")(commands.rank_encoders)
app.command()(commands.export)
app.command()(pipeline.pipeline)
app.command()(commands.doctor)
app.add_typer(show.app, name="show")
for name, text in lazy.GROUPS.items():
    app.add_typer(lazy.group(name), name=name, help=text, no_args_is_help=True)


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
    """Self-supervised image pretraining, from shards to an evaluated encoder."""
    # training saves first, and the groups have help that needs no torch
    if context.invoked_subcommand not in (*TRAINING, *lazy.GROUPS):
        from scaletrain.runtime.signals import ending_at_once

        resumable = context.invoked_subcommand == "eval"
        context.with_resource(ending_at_once(resumable=resumable))


def _explained(error: Exception, command: str | None) -> tuple[str, int] | None:
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

    # what libraries say of images and tables is about the input of an import
    expected = isinstance(error, ValueError) and (command == "shards" or _ours(error))
    if isinstance(error, OSError) or expected:
        return str(error), exit_codes.of(error)

    return None


def _ours(error: ValueError) -> bool:
    """Whether this program raised it on purpose: a library's ValueError is a defect of the call."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next

    here = trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(
        Path(__file__).parents[1]
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


def main(*words: str) -> None:
    """Run the command line, after `words` if they are given."""
    _follow_launcher()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")

    try:
        app([*words, *sys.argv[1:]], prog_name="scaletrain")
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
