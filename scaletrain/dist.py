"""The process group: ranks, and collectives with and without gradient.

With the loss convention of core.py, the backward of a gather is a sum over ranks and needs no
factor of the world size.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import ipaddress
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from scaletrain import environment, exit_codes
from scaletrain.peers import Peers

# Variable of the launcher: descriptor of the socket on which rank 0 accepts the other ranks.
LISTEN_FD = "SCALETRAIN_LISTEN_FD"
_peers: Peers | None = None

# torch 2.14 renamed both and warns at the old names.
_all_gather = getattr(c10d, "all_gather_single", None) or c10d.all_gather_into_tensor
_reduce_scatter = getattr(c10d, "reduce_scatter_single", None) or c10d.reduce_scatter_tensor


class LaunchError(ValueError):
    """The process group could not be formed; the text says why."""

    exit_code = exit_codes.RETRY


def init(timeout_seconds: float = 1800.0) -> torch.device:
    """Join the process group that torchrun's variables describe, if any, and return this rank's
    device.
    """
    local = environment.local_rank()
    # A scheduler may show each process a single device only, whatever its local rank.
    device = (
        torch.device("cuda", local % torch.cuda.device_count())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )

    if device.type == "cuda":
        torch.cuda.set_device(device)

    if environment.world() > 1 and not c10d.is_initialized():
        _join(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timedelta(seconds=timeout_seconds),
        )

    return device


def _join(backend: str, timeout: timedelta) -> None:
    global _peers
    host, port = os.environ.get("MASTER_ADDR", "?"), os.environ.get("MASTER_PORT", "?")
    try:
        if _loopback(host) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            place = _own_store(host, int(port), timeout)
            c10d.init_process_group(
                backend,
                store=place,
                rank=environment.rank(),
                world_size=environment.world(),
                timeout=timeout,
            )
        else:
            c10d.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise LaunchError(
            f"no rendezvous at {host}:{port}: {str(error).splitlines()[0]}. If the port is in use, "
            "choose another MASTER_PORT"
        ) from None

    _peers = Peers(rank(), world(), host, broadcast_object)
    # Not reached by a process that fails: cli.main ends those at once.
    atexit.register(_peers.leave)


def _loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _own_store(host: str, port: int, timeout: timedelta) -> TCPStore:
    """torch's store listens on all addresses of a machine; on one machine, this one listens on its
    loopback only.
    """
    world, first = int(os.environ["WORLD_SIZE"]), os.environ["RANK"] == "0"
    if not first:
        return TCPStore(host, port, world, False, timeout)

    given = os.environ.get(LISTEN_FD)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = (
        socket.socket(fileno=int(given))
        if given
        else socket.create_server((host, port), family=family)
    )

    return TCPStore(host, port, world, True, timeout, master_listen_fd=listener.detach())


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks; a no-op without glibc.

    By default it maps every block above 32 MB again, and the page faults of each step's activations
    cost several times their arithmetic on the CPU.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-4, 0)
        # M_TRIM_THRESHOLD: the heap is not given back
        libc.mallopt(-1, 2**31 - 1)


def shutdown() -> None:
    """Leave the process group in order. Not after an error: the other ranks would not learn
    of it.
    """
    leave()

    if c10d.is_initialized():
        c10d.destroy_process_group()


def leave() -> None:
    """This process will end in order, which the others need not follow at once."""
    if _peers is not None:
        _peers.leave()


def lost_contact(error: BaseException) -> str:
    """A text for an error that is due to another process which died or cannot be reached; empty for
    other errors.
    """
    if world() == 1 or not (isinstance(error, c10d.DistError) or "gloo/transport" in str(error)):
        return ""

    who = (
        _peers.name_lost(patience=2.0) if _peers is not None else ""
    ) or "another process of this run cannot be reached"
    return f"{who}; see its own output, and start again to resume ({str(error).splitlines()[0]})"


def rank() -> int:
    return c10d.get_rank() if c10d.is_initialized() else 0


def world() -> int:
    return c10d.get_world_size() if c10d.is_initialized() else 1


def port_problem(host: str, port: int) -> str | None:
    """Why this machine cannot listen on a port; None if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)

    return None


def local_world() -> int:
    """Number of processes on this node."""
    return environment.local_world()


def main() -> bool:
    return rank() == 0


# --- collectives without gradient -----------------------------------------------------------------


def sum_nograd(x: Tensor) -> Tensor:
    """Sum over ranks of a detached copy."""
    x = x.detach().clone()
    if world() > 1:
        c10d.all_reduce(x)
    return x


def max_nograd(x: Tensor) -> Tensor:
    x = x.detach().clone()
    if world() > 1:
        c10d.all_reduce(x, op=c10d.ReduceOp.MAX)
    return x


def max_later(value: int) -> Callable[[], int]:
    """Start to exchange a number; the returned function waits for the largest of all ranks."""
    box = torch.tensor(value)
    work = c10d.all_reduce(box, op=c10d.ReduceOp.MAX, async_op=True) if world() > 1 else None

    def result() -> int:
        if work is not None:
            work.wait()
        return int(box)

    return result


def barrier() -> None:
    """Wait for all ranks, on the host."""
    sum_nograd(torch.zeros(1))


def gather_nograd(x: Tensor) -> Tensor:
    """[b, ...] on each rank -> [W * b, ...] in rank order, which is the order of the global batch.
    Equal b on every rank.
    """
    x = x.detach().contiguous()
    if world() == 1:
        return x

    out = x.new_empty(world() * x.shape[0], *x.shape[1:])
    _all_gather(out, x)
    return out


def permute_nograd(x: Tensor, order: Tensor) -> Tensor:
    """Permute a global-batch tensor X: this rank's slice [b, ...] of X -> its slice of X[order].

    order: [W * b] int64 on the host, the same permutation on every rank. Equal b on every rank;
    each row is sent once.
    """
    x = x.detach()

    if world() == 1:
        return x[order.to(x.device)]

    rows = len(x)
    # where this rank's new rows are now; where its rows will be
    wanted, goes = mine(order), mine(order.argsort())
    sent = x[goes.argsort().to(x.device)].contiguous()
    arrived, out = torch.empty_like(sent), torch.empty_like(sent)
    come, go = (torch.bincount(p // rows, minlength=world()).tolist() for p in (wanted, goes))
    c10d.all_to_all_single(arrived, sent, come, go)

    # by origin, and from each in the new order
    out[(wanted // rows).argsort(stable=True).to(x.device)] = arrived
    return out


def broadcast_object(value: Any) -> Any:
    """Rank 0's small Python value, on every rank. Used between ranks of one run only."""
    box = [value]
    if world() > 1:
        c10d.broadcast_object_list(box)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's small Python value, in rank order."""
    box: list[Any] = [value] * world()
    if world() > 1:
        c10d.all_gather_object(box, value)
    return box


# --- collectives with gradient --------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return gather_nograd(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        out = grad.new_empty(ctx.rows, *grad.shape[1:])
        _reduce_scatter(out, grad)
        return out


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_nograd(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_nograd(grad)


def gather(x: Tensor) -> Tensor:
    """As gather_nograd, with gradients: the owner of a row receives the sum over ranks."""
    return _Gather.apply(x) if world() > 1 else x


def psum(x: Tensor) -> Tensor:
    """Sum over ranks; the gradient is the sum over ranks of the gradients."""
    return _Sum.apply(x) if world() > 1 else x


def mine(x: Tensor) -> Tensor:
    """This rank's slice of a global-batch tensor [B, ...] -> [b, ...]."""
    rows = x.shape[0] // world()
    return x[rank() * rows : (rank() + 1) * rows]
