"""Communication of a training step: every collective with its kind, its bytes and its purpose.

A process group records each call and passes it on to gloo. To predict any number of ranks, the same
engine runs in one process whose group answers as if all ranks had the same data. Communication
depends on samples, views, channels and parameters, so images are tiny and all else is as in the
recipe; images that are communicated themselves (ShuffleBN) count with their full size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as c10d
from torch import Tensor
from torch._C._distributed_c10d import FakeStore, _create_work_from_future
from torch.futures import Future

from scaletrain import dist, environment, rng
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config
from scaletrain.core import Batch, Clock, RunInfo
from scaletrain.estimate import model
from scaletrain.nn.backbone import TIMM
from scaletrain.runtime import tables
from scaletrain.train.build import build


@dataclass(frozen=True)
class Call:
    """A collective as one rank sees it."""

    # all_reduce, all_gather, all_to_all, reduce_scatter, broadcast, reduce, barrier
    kind: str
    # Its purpose, see _WHO.
    reason: str
    # Size of the full tensor that is reduced, scattered, gathered or broadcast; for all_to_all, of
    # a rank's part.
    bytes: int
    # Size of its group.
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that this rank sends with a ring algorithm."""
        rounds = {"all_reduce": 2, "barrier": 0}.get(self.kind, 1)
        return rounds * self.bytes * (self.ranks - 1) / self.ranks


# first steps of a process that have messages of their own: DDP orders its buckets, ZeRO 3 agrees on
# the order of use
WARM = 2

# --- counting -------------------------------------------------------------------------------------

# the innermost of these modules that is on the stack; "": gradients are reduced, parameters are
# gathered or spread
_WHO = {
    "torch.distributed.fsdp": "",
    "deepspeed": "",
    "fairscale": "",
    "scaletrain.nn.norm": "batch norm",
    "scaletrain.nn.batch_norm": "batch norm",
    "scaletrain.nn.bank": "memories",
    "scaletrain.optim": "norms",
    "scaletrain.methods": "loss",
    "scaletrain.auxiliaries": "loss",
    "scaletrain.ops": "loss",
    "scaletrain.engines": "",
}
# of engines and their libraries
_FUNCTIONS = {
    "_agree": "agreement",
    "assert_ints_same_as_other_ranks": "agreement",
    "total": "norms",
    "get_grad_norm_direct": "norms",
}


class RecordingGroup(c10d.ProcessGroup):
    """A process group that records every collective in `calls`, then passes it on to `inner` or,
    without one, imitates ranks with the same data.
    """

    # of all groups of this process, in their order
    calls: ClassVar[list[Call]] = []
    # width of a tiny image -> that of the recipe's
    pixels: ClassVar[dict[int, int]] = {}

    def __init__(self, rank: int, size: int, inner: Any = None) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.place, self.count, self.inner = rank, size, inner

    def size(self) -> int:
        return self.count

    def getBackendName(self) -> str:
        return "noted"

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return c10d.distributed_c10d._get_process_group_name(self)

    def collective(
        self, name: str, kind: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        tensors = [list(_flat(a)) for a in args if isinstance(a, (Tensor, list))] or [[]]
        message = tensors[kind == "reduce_scatter"]
        self.calls.append(Call(kind, _reason(kind), sum(map(self.bytes, message)), self.count))
        if self.inner is not None:
            return getattr(self.inner, name)(*args, **options)

        ops = [o.reduceOp for o in (*args, *options.values()) if hasattr(o, "reduceOp")]
        with torch.no_grad():
            self.mirror(kind, tensors, self.count if c10d.ReduceOp.SUM in ops else 1)

        done: Future[Any] = Future()
        # DDP looks for its bucket there
        done.set_result(args[0] if args else None)
        return _create_work_from_future(done)

    def bytes(self, x: Tensor) -> int:
        """Size of a tensor; images count with the recipe's resolution."""
        if x.dim() < 5:  # [B, V, 3, H, W]
            return x.nbytes
        tiny = x.shape[-1]
        return x.nbytes * self.pixels.get(tiny, tiny) ** 2 // tiny**2

    def mirror(self, kind: str, tensors: list[list[Tensor]], times: int) -> None:
        """Write the result of a collective as if every rank had the same data: a sum is `times` as
        large.

        Integers are not summed: they belong to samples that other ranks do not have.
        """
        if kind in ("all_reduce", "reduce"):
            for tensor in tensors[0]:
                tensor.mul_(times if tensor.is_floating_point() else 1)
        elif kind == "all_to_all":
            tensors[0][0].copy_(tensors[1][0])
        elif kind == "all_gather":
            for tensor in tensors[0]:
                # it may lie inside
                tensor.view(-1, tensors[1][0].numel()).copy_(tensors[1][0].clone().view(1, -1))
        elif kind == "reduce_scatter":
            (out,), parts = tensors
            own = parts[self.place] if len(parts) > 1 else parts[0].view(self.count, -1)[self.place]
            out.copy_(own.view_as(out)).mul_(times)


for _name, _kind in {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    # torch 2.14 renamed the one above
    "all_gather_single": "all_gather",
    "alltoall_base": "all_to_all",
    # its name since torch 2.14
    "all_to_all_single": "all_to_all",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "barrier": "barrier",
}.items():
    setattr(
        RecordingGroup,
        _name,
        lambda self, *a, _name=_name, _kind=_kind, **o: self.collective(_name, _kind, a, o),
    )


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _flat(item)


def _reason(kind: str) -> str:
    frame, found = sys._getframe(1), None
    while frame.f_back:
        frame = frame.f_back
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if found is None and module == "scaletrain.dist" and function == "backward":
            # of a gather or sum that carries gradients: normalisation has its own
            return "loss"

        if found is None:
            found = next(
                (who for prefix, who in _WHO.items() if f"{module}.".startswith(f"{prefix}.")), None
            )

        if found or (found == "" and function in _FUNCTIONS):
            return found or _FUNCTIONS[function]

    return "gradients" if "reduce" in kind else "parameters"


def _create(store: Any, rank: int, size: int, timeout: Any) -> RecordingGroup:
    return RecordingGroup(
        rank, size, None if _faked(store) else c10d.ProcessGroupGloo(store, rank, size, timeout)
    )


def _faked(store: Any) -> bool:
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return isinstance(store, FakeStore)


c10d.Backend.register_backend("noted", _create, devices=["cpu"])


def divided(config: Config, ranks: int) -> int:
    """Samples per rank."""
    if config.batch % ranks:
        raise ConfigError(
            f"batch={config.batch} does not divide over {ranks} ranks: choose another --ranks or "
            "batch"
        )

    return config.batch // ranks


@contextmanager
def mirrored(ranks: int, rank: int = 0) -> Iterator[None]:
    """Context in which this process is one of `ranks` with the same data. Nothing is sent."""
    c10d.init_process_group("noted", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.shutdown()


@contextmanager
def joined() -> Iterator[None]:
    """Context in which the processes that torchrun started are a group that records its calls."""
    c10d.init_process_group("noted")
    try:
        yield
    finally:
        dist.shutdown()


# --- a step ---------------------------------------------------------------------------------------


def measure(config: Config, ranks: int) -> dict[str, Any]:
    """The collectives of one optimizer step in the middle of a run, as plain numbers. Raises
    ConfigError.

    A prediction for `ranks`; under torchrun with several processes, a real step of these.
    """
    real = environment.world() > 1

    with joined() if real else mirrored(ranks):
        ranks, found = dist.world(), summary(count(config))

    return {
        "engine": config.engine.name,
        "batch": config.batch,
        "ranks": ranks,
        "counted": real,
        "messages": found,
    }


def count(config: Config) -> list[Call]:
    """The collectives of one step in their order, inside joined() or mirrored()."""
    config = _tiny(config)
    run_info = model.run_info(config)
    steps = run_info.steps_per_epoch
    engine = build(config, run_info.samples, steps, torch.device("cpu"))
    batch = _batch(config, run_info)
    # queues are in use, nothing is frozen
    middle = Clock(50 * steps, 100 * steps, 50, steps)

    for _ in range(WARM + 1):
        RecordingGroup.calls.clear()
        if engine.step(batch, middle, 1e-3, 1e-3).skipped:
            raise RuntimeError("the step was not finite: its collectives are not those of training")

    return list(RecordingGroup.calls)


def _tiny(config: Config) -> Config:
    """The recipe with views of 8, 16, ... pixels, uncompiled."""
    views = config.data.views
    small = {size: 8 * (1 + i) for i, size in enumerate(sorted({v.size for v in views}))}
    # some of those are built for one size
    if not config.model.name.startswith(TIMM):
        views = tuple(v.model_copy(update={"size": small[v.size]}) for v in views)
        RecordingGroup.pixels.update((tiny, size) for size, tiny in small.items())

    data = config.data.model_copy(update={"views": views})
    return config.model_copy(
        update={"data": data, "engine": config.engine.model_copy(update={"compile": False})}
    )


def _batch(config: Config, run_info: RunInfo) -> Batch:
    rows = divided(config, dist.world())
    index = torch.arange(rows) * (run_info.samples // rows)
    images = tuple(torch.randn(count, rows, 3, size, size) for size, count in run_info.views)
    masks, maps = model.maps_of(config.data, images[0])
    pixels = torch.tensor([[-2.0] * 3, [2.0] * 3])
    support = None

    if run_info.support:
        some = torch.arange(run_info.support // dist.world())
        support = Batch(
            (torch.randn(1, len(some), *images[0].shape[2:]),),
            some,
            rng.hash64(0, some),
            pixels,
            labels=some // 2,
        )

    return Batch(
        images,
        index,
        rng.hash64(0, index),
        pixels,
        labels=index,
        masks=masks,
        maps=maps,
        support=support,
    )


def summary(calls: list[Call]) -> list[dict[str, Any]]:
    """Collectives by reason, kind and group size, those with the most bytes first."""
    alike: dict[tuple[str, str, int], list[Call]] = {}
    for call in calls:
        alike.setdefault((call.reason, call.kind, call.ranks), []).append(call)

    rows = [
        {
            "reason": reason,
            "kind": kind,
            "ranks": ranks,
            "calls": len(found),
            "bytes": sum(c.bytes for c in found),
            "sent": round(sum(c.sent for c in found)),
        }
        for (reason, kind, ranks), found in alike.items()
    ]

    return sorted(rows, key=lambda row: -row["bytes"])


def show(found: dict[str, Any]) -> None:
    """Print what measure() found as a table."""
    how = "counted" if found["counted"] else "predicted"
    title = (
        f"a step of {found['engine']} on {tables.plural(found['ranks'], 'rank')}, batch "
        f"{found['batch']}, {how}"
    )
    rows: list[tuple[Any, ...]] = [
        (
            row["reason"],
            row["kind"],
            row["ranks"],
            row["calls"],
            *(f"{row[key] / 1e6:,.3f}" for key in ("bytes", "sent")),
        )
        for row in found["messages"]
    ]

    calls, size, sent = (
        sum(row[key] for row in found["messages"]) for key in ("calls", "bytes", "sent")
    )
    rows += [(), ("all", "", "", calls, f"{size / 1e6:,.3f}", f"{sent / 1e6:,.3f}")]
    tables.show(("for", "collective", "ranks", "calls", "MB", "MB sent"), rows, title=title)
