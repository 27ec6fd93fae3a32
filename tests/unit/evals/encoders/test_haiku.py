"""BYOL's and ReLICv2's pickles of Haiku's parameters, written here as their code writes them."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kit.evals import backbone, settings
from torch import nn

from scaletrain.data.errors import DataError
from scaletrain.evals.encoders import tensorflow_padding
from scaletrain.evals.encoders.targets import find
from scaletrain.evals.errors import EvalError
from scaletrain.nn import resnet

CONFIG = settings("train", name="resnet50", stem="imagenet")
STATE = backbone(CONFIG)
Tree = dict[str, dict[str, Any]]


def module_of(name: str) -> str:
    """Haiku's name of a module of torchvision's ResNet."""
    parts = name.split(".")
    if len(parts) == 1:
        return f"res_net50/~/initial_{'conv' if name == 'conv1' else 'batchnorm'}"
    group, block, *rest = parts
    inner = {"downsample.0": "shortcut_conv", "downsample.1": "shortcut_batchnorm"}.get(
        ".".join(rest)
    ) or f"{'conv' if rest[0].startswith('conv') else 'batchnorm'}_{int(rest[0][-1]) - 1}"
    return f"res_net50/~/block_group_{int(group[-1]) - 1}/~/block_{block}/~/{inner}"


def trees(wrap: Callable[[np.ndarray], Any]) -> tuple[Tree, Tree]:
    """Parameters and state of Haiku for the network, with a projector and a classifier."""
    params: Tree = {"projector/linear": {"w": wrap(np.ones((2, 3), np.float32))}}
    state: Tree = {}
    for name, tensor in STATE.items():
        path, _, kind = name.rpartition(".")
        module, values = module_of(path), tensor.numpy()
        if values.ndim == 4:
            params.setdefault(module, {})["w"] = wrap(values.transpose(2, 3, 1, 0))
        elif kind in ("weight", "bias"):
            word = {"weight": "scale", "bias": "offset"}[kind]
            params.setdefault(module, {})[word] = wrap(values[None, None, None])
        elif kind != "num_batches_tracked":
            which = {"running_mean": "mean_ema", "running_var": "var_ema"}[kind]
            state[f"{module}/~/{which}"] = {
                "average": wrap(values[None, None, None]),
                "hidden": wrap(values[None, None, None]),
                "counter": np.asarray(7, np.int32),
            }
    return params, state


class FlatMapping(dict[str, Any]):
    """As Haiku's immutable dictionary is pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return FlatMapping, (dict(self),)


class _ByolExperimentState(NamedTuple):
    online_params: Any
    target_params: Any
    online_state: Any
    target_state: Any
    opt_state: Any


class TraceState(NamedTuple):
    trace: Any


class Wrapped:
    """An array of jax as it is pickled."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments, state = self.values.__reduce__()[:3]
        return _reconstruct_array, (function, arguments, state, {"weak_type": False})


def _reconstruct_array(*_: Any) -> None:
    raise AssertionError("nothing is called")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above under the names of the libraries that they stand for."""
    for path, thing in {
        "haiku._src.data_structures": FlatMapping,
        "byol.byol_experiment": _ByolExperimentState,
        "optax._src.transform": TraceState,
        "jax._src.array": _reconstruct_array,
    }.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules[path], thing.__name__, thing, raising=False)
        monkeypatch.setattr(thing, "__module__", path)


def byol() -> dict[str, Any]:
    params, state = trees(np.asarray)
    flat = FlatMapping({name: FlatMapping(values) for name, values in params.items()})
    target = FlatMapping({"res_net50/~/initial_conv": {"w": np.zeros(3, np.float32)}})
    optimizer = (TraceState({"a": np.zeros(2, np.float32)}), 0.5, 1 << 40)
    return {
        "experiment_state": _ByolExperimentState(flat, target, FlatMapping(state), {}, optimizer),
        "step": np.int64(9),
        "rng": np.zeros(2, np.uint32),
    }


def relicv2(wrap: Callable[[np.ndarray], Any] = np.asarray) -> dict[str, Any]:
    """A dictionary, with the devices as the first axis of each array."""
    params, state = trees(lambda values: wrap(np.stack([values, values])))
    return {"experiment_state": {"online_params": params, "online_state": state}, "step": 9}


def reference() -> nn.Module:
    net = resnet.ResNet(CONFIG.model)
    net.load_state_dict(STATE)
    tensorflow_padding.adapt(net)
    return net.eval()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", ["byol", "relicv2", "relicv2 of jax"])
@pytest.mark.usefixtures("libraries")
def test_the_network_that_was_saved(tmp_path: Path, kind: str, protocol: int) -> None:
    content = {"byol": byol, "relicv2": relicv2}.get(kind, lambda: relicv2(Wrapped))()
    path = tmp_path / "pretrain.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    encoder = find(f"{kind.split()[0]}:{path}")

    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(encoder.module(x), reference()(x))
    assert encoder.model == CONFIG.model
    assert "projector" in encoder.about
    assert encoder.name == f"{kind.split()[0]}-pretrain"


@pytest.mark.usefixtures("libraries")
def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    content = relicv2()
    del content["experiment_state"]["online_params"][module_of("layer3.4.bn2")]["scale"]
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, 2))
    with pytest.raises(EvalError, match=r"no tensor 'layer3\.4\.bn2\.weight'"):
        find(f"relicv2:{path}")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "a.pkl", tmp_path / "pwned"
    path.write_bytes(pickle.dumps({**relicv2(), "more": Evil(marker)}, 2))
    with pytest.raises(DataError, match="refused, nothing was run"):
        find(f"relicv2:{path}")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [{}, {"experiment_state": []}, {"experiment_state": {"online_params": {}}}]
)
def test_another_pickle(tmp_path: Path, content: Mapping[str, Any]) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, 2))
    with pytest.raises(EvalError, match="no experiment_state"):
        find(f"byol:{path}")


def naive(x: np.ndarray, kernel: int, stride: int, fill: float) -> np.ndarray:
    """Windows [outputs, outputs, kernel, kernel] of "SAME", after its definition in TensorFlow."""
    length = x.shape[-1]
    outputs = -(-length // stride)
    before = max((outputs - 1) * stride + kernel - length, 0) // 2
    result = np.full((outputs, outputs, kernel, kernel), fill)
    for i, j, a, b in np.ndindex(*result.shape):
        row, column = i * stride + a - before, j * stride + b - before
        if 0 <= row < length and 0 <= column < length:
            result[i, j, a, b] = x[row, column]
    return result


@pytest.mark.parametrize("length", [5, 6, 7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (1, 2)])
def test_padding_is_that_of_tensorflow(length: int, kernel: int, stride: int) -> None:
    x = torch.randn(1, 1, length, length, dtype=torch.float64)
    conv = nn.Conv2d(1, 1, kernel, stride, kernel // 2, bias=False, dtype=torch.float64)
    pool = nn.MaxPool2d(3, 2, 1)
    tensorflow_padding.adapt(nn.Sequential(conv, pool))

    windows = naive(x[0, 0].numpy(), kernel, stride, 0.0)
    wanted = (windows * conv.weight[0, 0].detach().numpy()).sum((2, 3))
    np.testing.assert_allclose(conv(x)[0, 0].detach().numpy(), wanted)
    highest = naive(x[0, 0].numpy(), 3, 2, -np.inf).max((2, 3))
    np.testing.assert_array_equal(pool(x)[0, 0].numpy(), highest)


def test_an_even_side_pads_otherwise_than_torch() -> None:
    x = torch.randn(1, 1, 8, 8)
    conv = nn.Conv2d(1, 1, 3, 2, 1, bias=False)
    plain = conv(x)
    tensorflow_padding.adapt(nn.Sequential(conv))
    assert not torch.equal(conv(x), plain)
    assert torch.equal(conv(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, stride=2))
