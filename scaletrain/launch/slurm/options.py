"""Options of commands that submit jobs, as types of their parameters."""

from __future__ import annotations

from typing import Annotated

import typer

CpusPerTask = Annotated[
    int | None, typer.Option(min=1, help="Default: the node's, divided by its tasks.")
]
Mem = Annotated[str | None, typer.Option(help="Per node, e.g. 480G; default: the partition's.")]
Time = Annotated[
    str | None,
    typer.Option(
        help="Limit, e.g. 1-00:00:00, or minutes; 0: none. The job requeues itself at its end."
    ),
]
Partition = Annotated[str | None, typer.Option(help="Default: the cluster's default.")]
Account = Annotated[str | None, typer.Option()]
Qos = Annotated[str | None, typer.Option()]
Constraint = Annotated[str | None, typer.Option(help="Features the nodes must have.")]
Exclude = Annotated[str | None, typer.Option(help="Nodes to avoid, e.g. n[3-4].")]
Mail = Annotated[str | None, typer.Option(help="Address notified of end, failure and requeue.")]
Setup = Annotated[
    list[str] | None,
    typer.Option(help="Shell line before the command, e.g. 'module load cuda'; may be repeated."),
]
Container = Annotated[
    str | None, typer.Option(help="Command before `python`, e.g. 'apptainer exec --nv image.sif'.")
]
