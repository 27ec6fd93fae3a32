"""Operations on the GPU, which trains, against the CPU, which the tests prove: normalisation, LARS,
the data's last step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scaletrain import rng
from scaletrain.core import Batch
from scaletrain.data.loading.dataset import RawBatch
from scaletrain.data.loading.to_device import ToDevice
from scaletrain.doctor.page import Finding, measured
from scaletrain.nn import norm
from scaletrain.optim.lars import LARS

# sums in another order
FP32 = 1e-5
# 2^-6: the result and what it is made of are rounded to 8 bits
BF16 = 2 * torch.finfo(torch.bfloat16).eps

Case = Callable[[torch.device], Sequence[Tensor]]


def parity(device: torch.device) -> list[Finding]:
    """CPU against GPU; every rank calls it together."""
    if device.type == "cpu":
        return [Finding("skip", "GPU parity", "no GPU: not run")]

    found = []
    for name, (case, tolerance) in CASES.items():
        values, findings = measured(
            "GPU parity",
            lambda case=case: {"worst": difference(case, device)},  # type: ignore[misc]
        )
        found += findings

        if values:
            worst = max(values["worst"])
            text = (
                f"{name}: differs by {worst:.1e} of the largest value from the CPU, "
                f"{tolerance:.1e} allowed"
            )
            fix = (
                "this GPU's driver, torch build or hardware computes wrong numbers: try another "
                "node, then report this page"
            )

            found.append(
                Finding("ok", "GPU parity", text)
                if worst <= tolerance
                else Finding("fail", "GPU parity", text, fix)
            )

    return found


def normalisation(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output and gradients of the cross-rank batch norm for two views, and its mean and variance.

    The group is one rank's samples, so no collective is involved. The input is rounded to bfloat16
    for every dtype.
    """
    draw = torch.Generator().manual_seed(0)
    x, dy = ((3 * torch.randn(2 * 16, 24, 9, 7, generator=draw) + 1).bfloat16() for _ in range(2))
    layer = norm.BatchNorm(24, group=16)

    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.rand(24, generator=draw) + 0.5)

    layer.to(device)
    leaf = x.to(device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    with norm.views(2):
        y = layer(leaf)

    grads = torch.autograd.grad(y, (leaf, *layer.parameters()), dy.to(device, dtype))
    return [y.detach(), *grads, *layer.staged[0][:2]]


def normalisation_bf16(device: torch.device) -> list[Tensor]:
    return normalisation(device, torch.bfloat16)


def lars(device: torch.device) -> list[Tensor]:
    """Parameters after three steps: adapted, decayed ones in two memory layouts, and one that is
    neither.
    """
    draw = torch.Generator().manual_seed(1)
    start = [
        torch.randn(16, 8, 3, 3, generator=draw),
        torch.randn(40, 30, generator=draw),
        torch.randn(40, generator=draw),
    ]

    params = [
        p.to(device).contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p.to(device)
        for p in start
    ]
    groups = [
        {"params": params[:2], "weight_decay": 1e-2, "adapt": True},
        {"params": params[2:], "weight_decay": 0.0, "adapt": False},
    ]
    optimizer = LARS(groups, lr=0.5, eta=0.02)

    for _ in range(3):
        for p in params:
            p.grad = (
                torch.randn(p.shape, generator=draw).to(device).contiguous(memory_format=_format(p))
            )
        optimizer.step()

    return [*params, optimizer.trust]


def _format(p: Tensor) -> torch.memory_format:
    return torch.channels_last if p.dim() == 4 else torch.contiguous_format


def pixels(device: torch.device) -> list[Tensor]:
    """Normalised views."""
    return list(_batch(device).views)


def keys(device: torch.device) -> list[Tensor]:
    """The samples' random keys and what is drawn from them, which must be the same numbers
    everywhere.
    """
    batch = _batch(device)
    return [
        batch.keys,
        rng.uniform(batch.keys, "doctor", 5),
        rng.permutation(97, "doctor", device=device),
    ]


def _batch(device: torch.device) -> Batch:
    draw = torch.Generator().manual_seed(2)
    view = torch.randint(0, 256, (2, 8, 20, 20, 3), dtype=torch.uint8, generator=draw)
    raw = RawBatch(3, (view,), torch.arange(5, 13), torch.full((8,), -1))
    return ToDevice(device, 7, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(raw)


def difference(case: Case, device: torch.device) -> float:
    """Largest difference to the CPU relative to the largest value of the tensor, over a case's
    tensors.
    """
    reference = normalisation if case is normalisation_bf16 else case
    worst = 0.0

    for mine, theirs in zip(case(device), reference(torch.device("cpu")), strict=True):
        a, b = mine.detach().cpu().double(), theirs.detach().double()
        apart = (a - b).abs().max() / b.abs().max().clamp_min(1e-30)
        worst = max(worst, float(apart.nan_to_num(float("inf"))))

    return worst


CASES: dict[str, tuple[Case, float]] = {
    "batch norm, fp32": (normalisation, FP32),
    "batch norm, bf16 against fp32": (normalisation_bf16, BF16),
    "LARS, 3 steps": (lars, FP32),
    "normalised views": (pixels, FP32),
    "random keys": (keys, 0.0),
}
