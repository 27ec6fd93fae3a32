"""Construction of the networks that many methods share: an encoder with a projector, alone, with a
target network of its own initial values (BYOL), or with a momentum encoder (MoCo). The mathematics
of a step is in the methods' own files.

The order in which networks are built is the order in which their weights are drawn from the seed,
so it must not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor, nn

from scaletrain.core import Backbone, Clock, Method, RunInfo
from scaletrain.nn.norm import per_view, shuffled

MakeBackbone = Callable[[], Backbone]
# a projector for features of this width
MakeProjector = Callable[[int], nn.Module]


class Projected(Method):
    """A method with one encoder and a projector on its features."""

    projector: nn.Module

    def __init__(
        self, make_backbone: MakeBackbone, make_projector: MakeProjector, run_info: RunInfo
    ) -> None:
        super().__init__()
        _check_views(self, run_info)
        self.backbone = make_backbone()
        self.projector = make_projector(self.backbone.features)


class WithTarget(Projected):
    """A method that also has a target network, which follows the online one from initial values of
    its own (BYOL).
    """

    targets: ClassVar[Mapping[str, str]] = {
        "target_backbone": "backbone",
        "target_projector": "projector",
    }
    target_backbone: Backbone
    target_projector: nn.Module

    def add_target(self, make_backbone: MakeBackbone, make_projector: MakeProjector) -> None:
        """Build the target network. To be called once all online networks have been built."""
        self.target_backbone = make_backbone()
        self.target_projector = make_projector(self.target_backbone.features)


class WithMomentumEncoder(Method):
    """A method whose queries and keys come from two encoders, that of the keys following the other
    (MoCo). Subclasses call `start_targets` once all their networks have been built.
    """

    two_views = True
    targets: ClassVar[Mapping[str, str]] = {
        "target_backbone": "backbone",
        "target_projector": "projector",
    }
    target_backbone: Backbone
    projector: nn.Module
    target_projector: nn.Module

    def __init__(
        self,
        make_backbone: MakeBackbone,
        make_projector: MakeProjector,
        run_info: RunInfo,
        *,
        shuffle: bool,
    ) -> None:
        """shuffle: ShuffleBN, which the whole batch as one group of batch norm does not need."""
        super().__init__()
        _check_views(self, run_info)
        self.seed, self.shuffle = run_info.seed, shuffle and run_info.norm_group > 0
        # otherwise no sample needs another one of its batch: its negatives are keys of the past
        self.global_loss |= self.shuffle

        self.backbone, self.target_backbone = make_backbone(), make_backbone()
        width = self.backbone.features
        self.projector, self.target_projector = make_projector(width), make_projector(width)

    def keys(self, x: Tensor, clock: Clock) -> Tensor:
        """[V, B, 3, H, W] -> [V, B, features] of the key encoder. There must be no norms in what
        follows it, since those would not be shuffled.
        """
        if self.shuffle:
            return shuffled(self.target_backbone, x, self.seed, clock.step)
        return per_view(self.target_backbone, x)


def _check_views(method: Method, run_info: RunInfo) -> None:
    if method.two_views:
        run_info.need_pair(type(method).__module__.rpartition(".")[2])
