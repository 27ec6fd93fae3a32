"""The stages of encoders: the units of sharding and of activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scaletrain.config.recipe import ConfigError
from scaletrain.nn.norm import replayed
from scaletrain.nn.resnet import ResNet


def stages(network: nn.Module) -> list[nn.Module]:
    """The stages of a network of `model.name` from input to output; none for any other module. The
    stem is no stage.
    """
    if isinstance(network, ResNet):
        return [network.layer1, network.layer2, network.layer3, network.layer4]

    children, found = dict(network.named_children()), list[nn.Module]()
    for name in _timm_features(network):
        # `layer1` is a stage; `stages.0` and `blocks.3.1` lie in a list of stages
        top, _, inner = name.partition(".")
        if top in children:
            found += [
                m
                for m in (children[top].children() if inner else [children[top]])
                if m not in found and _deep(m)
            ]

    return found


def _timm_features(network: nn.Module) -> list[str]:
    """Where timm itself taps a network: its stages, and single layers."""
    features: Any = getattr(network, "feature_info", ())
    return [str(info["module"]) for info in features] if isinstance(features, list) else []


def _deep(module: nn.Module) -> bool:
    return sum(any(True for _ in layer.parameters(recurse=False)) for layer in module.modules()) > 1


def networks(method: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Every encoder inside a method, targets included: its name and its stages."""
    return ((name, parts) for name, module in method.named_modules() if (parts := stages(module)))


def channels_last_inputs(method: nn.Module) -> None:
    """Hand every encoder its images channels last: convolutions follow their input, whatever the
    layout of their weights.

    For engines whose library takes row-major parameters only.
    """
    for name, _ in networks(method):
        method.get_submodule(name).register_forward_pre_hook(_channels_last)


def _channels_last(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.contiguous(memory_format=torch.channels_last)
        if isinstance(x, Tensor) and x.dim() == 4
        else x
        for x in args
    )


def recompute(method: nn.Module, chosen: bool | tuple[int, ...]) -> None:
    """Keep only the inputs of the chosen stages (1 is the first; True: all) of every encoder;
    backward runs them again.

    Exact, running statistics included. Raises ConfigError for a stage that there is not.
    """
    for name, parts in networks(method):
        wanted = range(1, len(parts) + 1) if isinstance(chosen, bool) else chosen
        if wrong := [number for number in wanted if number > len(parts)]:
            raise ConfigError(
                f"engine.activation_checkpointing: {name} has {len(parts)} stages, there is no "
                f"stage {wrong[0]}"
            )

        for number in wanted:
            _run_again(parts[number - 1])


def _run_again(stage: nn.Module) -> None:
    forward = stage.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=replayed, **kwargs)

    # within the module's hooks, by which engines gather its parameters
    stage.forward = twice
