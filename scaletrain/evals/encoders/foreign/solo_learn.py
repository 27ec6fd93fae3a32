"""ResNets of solo-learn (vturrisi/solo-learn)."""

from __future__ import annotations

from torch import nn

from scaletrain.evals.encoders.layout import Layout


def _adapt(net: nn.Module) -> None:
    """Its first layer for CIFAR pads by two pixels, not one (methods/base.py)."""
    first = net.get_submodule("conv1")
    assert isinstance(first, nn.Conv2d)
    if first.kernel_size == (3, 3):
        first.padding = (2, 2)


# earlier versions call the backbone encoder
LAYOUT = Layout(prefixes=("backbone.", "encoder.", ""), adapt=_adapt)
