"""A GPU that computes nothing: torch's meta device in its place, and a counter of the kernels that
a step would launch and of the times that the host would wait for it.

A call of ATen counts as one launch, a multi-tensor call as its launches. Values that the host would
read are made up. float32 only: the meta device knows no autocast.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.report import ROOT
from scaletrain.nn import batch_norm, norm

DEVICE = torch.device("meta")
# tensors of one launch of a multi-tensor kernel
CHUNK = 60
# calls that launch nothing: views, and memory that is only allocated
FREE = frozenset(
    """
    view _unsafe_view transpose t permute expand slice select split split_with_sizes unbind detach
    alias as_strided unsqueeze squeeze empty empty_like empty_strided new_empty new_empty_strided
    unfold diagonal chunk lift_fresh _reshape_alias is_same_size resize_ set_ view_as movedim
    flatten unflatten narrow expand_as squeeze_ unsqueeze_ t_
    """.split()  # noqa: SIM905
)
# a file whose frames only stand between the caller and its code
TRANSPARENT = str(Path("runtime") / "timing.py")


class Wait(NamedTuple):
    """A time that the host stands still until the GPU has done all that was asked of it."""

    reason: str
    # part of the step
    phase: str
    # file and line in the package
    site: str


class Copy(NamedTuple):
    """A copy between host and GPU."""

    direction: str
    blocking: bool
    phase: str
    site: str


def on_gpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta


class LaunchCounter(TorchDispatchMode):
    """Counts what the calls inside it would launch on the GPU, and where the host would wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # set by the listener of the step's spans
        self.phase = "rest"
        self.clear()

    def clear(self) -> None:
        """Forget all counts."""
        self.by_call: Counter[str] = Counter()
        self.by_phase: Counter[str] = Counter()
        self.by_site: Counter[str] = Counter()
        self.waits: list[Wait] = []
        self.copies: list[Copy] = []
        # launches after the last wait, at which the GPU had nothing left to do
        self.after_wait = 0

    @contextmanager
    def listen(self, phase: str) -> Iterator[None]:
        """Count what is inside as part of a phase; a listener of runtime.timing."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        involved = any(map(on_gpu, tree_leaves((args, kwargs))))
        involved |= str(kwargs.get("device", "")).startswith(DEVICE.type)

        if name == "_local_scalar_dense" and on_gpu(args[0]):
            self._wait("reads a number")
            return _made_up(args[0].dtype)
        if name == "nonzero" and involved:
            self._wait("nonzero")
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if name in ("index", "index_put", "index_put_") and involved:
            args = (args[0], self._indices(*args[:2]), *args[2:])
        if name in ("_to_copy", "copy_") and self._copied_to_host(name, args, kwargs):
            if name == "copy_":
                return args[0]
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)

        out = func(*args, **kwargs)
        if involved and name not in FREE:
            self._launch(name, args)
        return out

    def _launch(self, name: str, args: Sequence[Any]) -> None:
        count = _multi_tensor_launches(args) if name.startswith("_foreach") else 1
        self.by_call[name] += count
        self.by_phase[self.phase] += count
        self.by_site[site()] += count
        self.after_wait += count

    def _wait(self, reason: str) -> None:
        self.waits.append(Wait(reason, self.phase, site()))
        self.after_wait = 0

    def _indices(self, x: Tensor, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Indices that the meta device can take: a mask's size depends on its values."""
        out: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype is torch.bool:
                self._wait("mask as index")
                out += [index.new_empty(index.numel(), dtype=torch.int64)] * index.dim()
            elif index is not None and on_gpu(x) and not on_gpu(index):
                self._wait("index on the host")
                out.append(torch.empty_like(index, device=DEVICE))
            else:
                out.append(index)

        return out

    def _copied_to_host(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Note a copy between host and GPU; whether its values have to be made up."""
        source = args[1] if name == "copy_" else args[0]
        to_gpu = (
            on_gpu(args[0])
            if name == "copy_"
            else torch.device(kwargs.get("device") or source.device) == DEVICE
        )
        if on_gpu(source) == to_gpu:
            return False

        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and any(args[2:3])))
        self.copies.append(Copy("to device" if to_gpu else "to host", blocking, self.phase, site()))
        # a number of the host travels as an argument of the kernel
        if blocking and not (name == "copy_" and to_gpu and source.dim() == 0):
            self._wait("blocking copy")
        return not to_gpu


def _made_up(dtype: torch.dtype) -> bool | float | int:
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _multi_tensor_launches(args: Sequence[Any]) -> int:
    """One launch for CHUNK tensors where all lists agree in layout, else one for each tensor."""
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    if not lists:
        return 1

    pairs = zip(*lists[:2], strict=True) if len(lists) > 1 else ()
    slow = any(x.shape != y.shape or x.stride() != y.stride() for x, y in pairs)
    return len(lists[0]) if slow else -(-len(lists[0]) // CHUNK)


def site() -> str:
    """The innermost line of the package that is being run, as FILE:LINE."""
    package = str(ROOT / "scaletrain")
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        name = frame.f_code.co_filename
        if name.startswith(package) and not name.endswith(TRANSPARENT):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"

    return "autograd"


# --- the package on the meta device ---------------------------------------------------------------


@contextmanager
def simulated() -> Iterator[torch.device]:
    """Inside, the package takes the meta device for a GPU."""
    autocast = torch.autocast

    def autocast_of_host(device: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device == DEVICE.type else device, *args, **kwargs)

    with ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for name, kernel in META_KERNELS.items():
            library.impl(name, kernel, "Meta")

        patch = mock.patch.object
        stack.enter_context(patch(torch.Tensor, "is_cuda", property(on_gpu)))
        stack.enter_context(patch(torch, "autocast", autocast_of_host))
        # as Python functions: of a custom operator, only the outside would be seen
        backward = batch_norm._batch_norm_backward._init_fn
        stack.enter_context(patch(norm, "batch_norm", _batch_norm))
        stack.enter_context(patch(batch_norm, "_batch_norm_backward", backward))
        yield DEVICE


_FORWARD = batch_norm.batch_norm._init_fn


class _BatchNorm(torch.autograd.Function):
    """scaletrain::batch_norm, its calls of ATen in the open."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        out = _FORWARD(*inputs)
        batch_norm._save(ctx, inputs, out)
        ctx.mark_non_differentiable(*out[1:])
        return out

    backward = staticmethod(batch_norm._backward)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n_views: int,
    group: int,
    eps: float,
    *given: Tensor | None,
) -> Any:
    return _BatchNorm.apply(x, weight, bias, n_views, group, eps, *given)


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


def _elemt(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    eps: float,
) -> Tensor:
    if mean.shape != (x.shape[1],) or not (mean.is_contiguous() and invstd.is_contiguous()):
        raise ValueError(f"statistics {tuple(mean.shape)} of an input {tuple(x.shape)}")
    return torch.empty_like(x)


def _backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *_: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if dy.shape != x.shape or dy.stride() != x.stride() or dy.dtype != x.dtype:
        raise ValueError(f"the gradient's strides {dy.stride()} are not the input's {x.stride()}")
    empty = mean.new_empty(0)
    return torch.empty_like(mean), torch.empty_like(mean), empty, empty


def _backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    if count.dtype != torch.int32 or not (sum_dy.dtype == mean.dtype == sum_dy_xmu.dtype):
        raise ValueError(f"sums {sum_dy.dtype}, mean {mean.dtype}, count {count.dtype}")
    return torch.empty_like(x)


# CUDA kernels that torch has no shapes of; they refuse what the kernels would refuse
META_KERNELS: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": _stats,
    "batch_norm_elemt": _elemt,
    "batch_norm_backward_reduce": _backward_reduce,
    "batch_norm_backward_elemt": _backward_elemt,
}
