"""Reads the checkpoints of BYOL and ReLICv2, pickles of Haiku's parameters, without running them.

Sources: google-deepmind/deepmind-research, byol, and google-deepmind/relicv2 (checkpointing.py,
networks.py, eval_experiment.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaletrain.data.format import numpy_pickle
from scaletrain.data.format.numpy_pickle import JAX_ARRAY, MAPPING
from scaletrain.evals.errors import EvalError

# Largest file; BYOL's ResNet-200 of double width has 4.6 GB.
MAX_BYTES = 16 << 30
# What precedes the encoder's names in what `read` returns.
ENCODER = "backbone."
_KNOWN = {
    "haiku._src.data_structures FlatMap": MAPPING,
    "haiku._src.data_structures FlatMapping": MAPPING,
    "haiku._src.data_structures frozendict": MAPPING,
    "collections OrderedDict": MAPPING,
    "jax.interpreters.xla reconstruct_device_array": JAX_ARRAY,
    "jax._src.device_array reconstruct_device_array": JAX_ARRAY,
    "jax._src.array _reconstruct_array": JAX_ARRAY,
}
# Objects of these libraries are kept as they are: the experiment's state, and the optimizer's.
_RECORDS = r"(byol|relicv2|haiku|optax|jax|jaxlib|acme|numpy)(\.\w+)* \w+"
# The first part is the network: res_net50, or the class of another one.
_MODULE = re.compile(
    r"[^/]+/~/(?:initial_(?P<stem>conv|batchnorm)(?:_1)?|block_group_(?P<group>\d)/~/"
    r"block_(?P<block>\d{1,3})/~/(?:shortcut_(?P<short>conv|batchnorm)"
    r"|(?P<layer>conv|batchnorm)_(?P<number>\d)))"
)
_KINDS = {"scale": "weight", "offset": "bias", "w": "weight"}
_STATISTICS = {"mean_ema": "running_mean", "var_ema": "running_var"}


def read(path: Path) -> dict[str, Tensor | None]:
    """The encoder's tensors by torchvision's names after ENCODER; all others have no tensor, but a
    name. Raises DataError or EvalError.
    """
    content = numpy_pickle.load(path, limit=MAX_BYTES, known=_KNOWN, records=_RECORDS)
    params, statistics = _online(content.get("experiment_state"), path)
    table: dict[str, Tensor | None] = {}

    for module, kind, value in _leaves(params):
        if (name := _name(module)) and kind in _KINDS:
            table[f"{ENCODER}{name}.{_KINDS[kind]}"] = _tensor(value, kind, path)
        else:
            table[f"{module.partition('/')[0]}.{module}.{kind}"] = None

    for module, kind, value in _leaves(statistics):
        norm, _, which = module.rpartition("/~/")
        if (name := _name(norm)) and which in _STATISTICS and kind == "average":
            table[f"{ENCODER}{name}.{_STATISTICS[which]}"] = _tensor(value, kind, path)
        else:
            table[f"{module.partition('/')[0]}.{kind}.{module}"] = None

    return table


def _online(state: Any, path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Parameters and batch-norm statistics of the online network.

    A state is a dict (ReLICv2) or a tuple with names (BYOL and the linear evaluations), whose first
    and third fields these are.
    """
    parts: tuple[Any, ...] = ()
    if isinstance(state, dict):
        parts = state.get("online_params"), state.get("online_state")
    elif isinstance(state, numpy_pickle.Record) and state.name.endswith("ExperimentState"):
        parts = state.arguments[:3:2] if isinstance(state.arguments, tuple) else ()

    if len(parts) == 2 and all(isinstance(part, dict) for part in parts):
        return parts[0], parts[1]

    raise EvalError(
        f"{path} has no experiment_state with parameters and state of an online network; is it a "
        "checkpoint of BYOL or ReLICv2?"
    )


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for module, values in tree.items():
        for kind, value in values.items() if isinstance(values, dict) else ():
            yield str(module), str(kind), value


def _name(module: str) -> str:
    """torchvision's name of a module of the encoder; "" for any other."""
    match = _MODULE.fullmatch(module)
    if match is None:
        return ""
    if match["stem"]:
        return {"conv": "conv1", "batchnorm": "bn1"}[match["stem"]]

    block = f"layer{int(match['group']) + 1}.{int(match['block'])}"
    if match["short"]:
        return f"{block}.downsample.{int(match['short'] == 'batchnorm')}"

    return f"{block}.{'conv' if match['layer'] == 'conv' else 'bn'}{int(match['number']) + 1}"


def _tensor(value: Any, kind: str, path: Path) -> Tensor:
    """[H, W, in, out] -> [out, in, H, W], and [1, 1, 1, C] -> [C]. ReLICv2's arrays have the
    devices before that, all with the same values.
    """
    values = numpy_pickle.floats(value, path)
    if kind == "w":
        one = values[0] if values.ndim == 5 else values
        if one.ndim != 4:
            raise EvalError(f"{path}: a convolution has the shape {list(values.shape)}")
        return torch.from_numpy(one.transpose(3, 2, 0, 1).copy(order="C"))

    if values.ndim < 1 or not values.size:
        raise EvalError(f"{path}: a batch norm has the shape {list(values.shape)}")
    return torch.from_numpy(values.reshape(-1, values.shape[-1])[0].copy())
