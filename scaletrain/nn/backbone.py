"""`model` of a recipe -> an encoder: [N, 3, H, W] images to [N, features] pooled features, without
a classifier.

Our ResNets, or a network of the timm library under `timm/NAME`, always untrained and with its own
parameter names. timm's batch norms are replaced by ours, so that cross-rank statistics, groups,
views and skipped steps mean the same in it.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from scaletrain.config.recipe import ConfigError, nearest
from scaletrain.config.schema import DataConfig, ModelConfig
from scaletrain.core import Backbone
from scaletrain.nn import resnet
from scaletrain.nn.norm import BatchNorm

TIMM = "timm/"


def build(config: ModelConfig, data: DataConfig | None = None) -> Backbone:
    """Build the network with newly drawn weights. Raises ConfigError.

    data: how its images are normalised; `model.input=lightness` cannot do without.
    """
    return _timm(config) if config.name.startswith(TIMM) else resnet.ResNet(config, data)


def unpooled(net: Backbone) -> Backbone:
    """Make a network return its last feature map [N, features, H, W]. Raises ConfigError."""
    # a network of timm has no such attribute
    if getattr(net, "pool", None) is None:
        raise ConfigError(
            "model.name: the method needs the feature map before pooling, which only our own "
            "ResNets give"
        )

    net.pool = False
    return net


def _timm(config: ModelConfig) -> Backbone:
    for key in ("width", "stem", "sk", "input", "zero_init", "output_stride"):
        value, plain = getattr(config, key), ModelConfig.model_fields[key].default
        if value != plain:
            raise ConfigError(
                f"model.{key}={value} is for our own ResNets; with model.name={config.name} leave "
                f"it at {plain}"
            )

    try:
        import timm
    except ModuleNotFoundError:
        raise ConfigError(
            f"model.name={config.name} needs the timm library: pip install timm"
        ) from None

    name = config.name.removeprefix(TIMM)
    # also keeps out timm's `hf-hub:` names, which would be fetched
    if not timm.is_model(name):
        raise ConfigError(f"model.name: timm has no '{name}'{nearest(name, timm.list_models())}")

    net: Any = timm.create_model(name, pretrained=False, num_classes=0)
    if isinstance(getattr(net, "features", None), nn.Module):
        raise ConfigError(
            f"model.name={config.name}: its layers are named 'features', where methods read the "
            "output's width"
        )

    net.features = int(getattr(net, "head_hidden_size", net.num_features))
    net.stride = _stride(net, config)
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            net.set_submodule(path, _ours(module, config))

    # by its attribute `features`; a wrapper would change the names of its parameters
    return cast(Backbone, net)


def _stride(net: Any, config: ModelConfig) -> int:
    """The stride of the last place where timm taps the network. Raises ConfigError."""
    taps = getattr(net, "feature_info", None)
    if not isinstance(taps, list) or not taps:
        raise ConfigError(
            f"model.name={config.name}: timm does not say the stride of its last feature map"
        )

    return int(taps[-1]["reduction"])


def _ours(theirs: nn.modules.batchnorm._BatchNorm, config: ModelConfig) -> BatchNorm:
    """Our norm with the parameters of one of timm's, and with its activation where that is part of
    it.
    """
    from timm.layers.norm_act import BatchNormAct2d

    known = type(theirs) in (nn.BatchNorm2d, BatchNormAct2d)
    if not known or theirs.momentum is None or not theirs.track_running_stats:
        raise ConfigError(
            f"model.name={config.name} normalises by a {type(theirs).__name__} that we have no "
            "replacement for"
        )

    fused = (theirs.drop, theirs.act) if isinstance(theirs, BatchNormAct2d) else ()
    ours = BatchNormAct(
        *fused,
        features=theirs.num_features,
        scale=theirs.affine,
        shift=theirs.affine,
        group=config.norm_group,
        eps=theirs.eps,
        momentum=config.norm_momentum or theirs.momentum,
    )

    ours.weight, ours.bias = theirs.weight, theirs.bias
    return ours


class BatchNormAct(BatchNorm):
    """Batch norm, then modules without parameters, in their order: timm's `BatchNormAct2d`."""

    def __init__(self, *after: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.after = nn.Sequential(*after)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(super().forward(x))
        return y
