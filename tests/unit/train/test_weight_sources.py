"""Weights of a module from runs, steps and files of this library and others; what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from kit import teachers
from torch import Tensor

from scaletrain.checkpoint import files, reader
from scaletrain.checkpoint.files import CheckpointError
from scaletrain.core import Source
from scaletrain.engines.placement import TrainingError
from scaletrain.train.weight_sources import Shape, read

ENCODER = {
    name.removeprefix("backbone."): tensor
    for name, tensor in teachers.weights().items()
    if name.startswith("backbone.")
}
OTHER = {name: tensor + 1 for name, tensor in ENCODER.items()}


def shapes(tensors: dict[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def behind(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def layers(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones(3) for name in names}


# the names in files of other libraries
FOREIGN: dict[str, tuple[str, dict[str, Tensor]]] = {
    "torchvision": ("", layers("fc.weight", "fc.bias")),
    "DistributedDataParallel": ("module.", layers("module.fc.weight", "module.fc.bias")),
    "MoCo v2": (
        "module.encoder_q.",
        {
            **layers("module.encoder_q.fc.0.weight", "module.encoder_q.fc.2.bias"),
            **behind("module.encoder_k.", OTHER),
            **layers("module.encoder_k.fc.0.weight", "module.queue", "module.queue_ptr"),
        },
    ),
    "BYOL": (
        "online_network.encoder.",
        {
            **layers("online_network.projector.0.weight", "predictor.0.weight"),
            **behind("target_network.encoder.", OTHER),
        },
    ),
    "SimSiam": ("module.encoder.", layers("module.encoder.fc.0.weight", "module.predictor.0.bias")),
    "SwAV": ("module.", layers("module.projection_head.0.weight", "module.prototypes.weight")),
    "DINO": ("module.backbone.", layers("module.head.mlp.0.weight")),
    "solo-learn": ("backbone.", behind("momentum_backbone.", OTHER) | layers("classifier.bias")),
    "detection": ("backbone.body.", layers("rpn.conv.weight")),
    "timm": ("", layers("head.weight")),
}


@pytest.mark.parametrize("library", FOREIGN)
@pytest.mark.parametrize("module", ["backbone", ""])
def test_files_of_other_libraries(library: str, module: str, tmp_path: Path) -> None:
    prefix, others = FOREIGN[library]
    files.export(behind(prefix, ENCODER) | others, tmp_path / "file", {})
    found = read(Source(tmp_path / "file", module), shapes(ENCODER))
    assert found.tensors.keys() == ENCODER.keys()
    assert all(torch.equal(found.tensors[name], ENCODER[name]) for name in ENCODER)
    assert (f"its names begin with '{prefix}'" in found.notes) == bool(prefix)
    assert f"{len(others)} of its tensors are not of the" in found.notes
    origin = found.origin
    assert origin["sha256"] == files.fingerprint(ENCODER, {})
    assert (origin["path"], origin["module"], origin["step"]) == (
        str(tmp_path / "file"),
        module,
        None,
    )


def test_old_files_have_no_counters_of_batches(tmp_path: Path) -> None:
    old = {name: t for name, t in ENCODER.items() if not name.endswith("num_batches_tracked")}
    files.export(behind("module.", old), tmp_path / "file", {})
    found = read(Source(tmp_path / "file"), shapes(ENCODER))
    assert found.tensors.keys() == ENCODER.keys()
    assert found.tensors["bn1.num_batches_tracked"] == 0
    counters = len(ENCODER) - len(old)
    assert f"{counters} counters num_batches_tracked are not in it and start at" in found.notes


def test_modules_of_a_run_and_its_steps(tmp_path: Path) -> None:
    first, second = teachers.weights(), teachers.weights(6)
    run = teachers.save(tmp_path / "run", 3, first | behind("target_", OTHER))
    teachers.save(run, 7, second)
    head = {"0.weight": (5, 32), "0.bias": (5,)}
    for path, step, tensors in (
        (run, 7, second),
        (run / "checkpoints" / "step-00000003", 3, first),
    ):
        found = read(Source(path, "head"), head)
        assert torch.equal(found.tensors["0.weight"], tensors["head.0.weight"])
        assert (found.notes, found.origin["step"]) == (f"step {step}", step)
        encoder = read(Source(path), shapes(ENCODER)).tensors
        assert torch.equal(encoder["conv1.weight"], tensors["backbone.conv1.weight"])
    assert read(Source(run, "head"), head, step=3).origin["step"] == 3
    with pytest.raises(CheckpointError, match="step-00000005 is no longer there: restore it"):
        read(Source(run, "head"), head, step=5)
    with pytest.raises(TrainingError, match="has no module 'tail'; it has backbone, head"):
        read(Source(run, "tail"), head)


def test_a_head_is_looked_for_by_its_name(tmp_path: Path) -> None:
    linear = {"weight": (5, 32), "bias": (5,)}
    tensors = {"weight": torch.ones(5, 32), "bias": torch.ones(5)}
    both = behind("module.fc.", tensors) | behind("module.old.", tensors)
    files.export(ENCODER | both, tmp_path / "file", {})
    assert "begin with 'module.fc.'" in read(Source(tmp_path / "file", "fc"), linear).notes
    with pytest.raises(TrainingError, match="has no module 'head'; it has "):
        read(Source(tmp_path / "file", "head"), linear)
    files.export(tensors, tmp_path / "alone", {"module": "fc"})
    assert read(Source(tmp_path / "alone", ""), linear).notes == ""


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (
            behind("a.", ENCODER) | behind("b.", ENCODER),
            "holds several networks that fit this model, behind 'a.', 'b.'",
        ),
        (ENCODER | layers("layer5.weight"), "layer5.weight is (3,) in the file and absent"),
        (ENCODER | layers("conv1.weight"), "conv1.weight is (3,) in the file and (4, 3, 3, 3)"),
        (layers("x"), "conv1.weight is absent in the file and (4, 3, 3, 3) in the model"),
    ],
)
def test_other_networks_are_refused(tensors: dict[str, Tensor], text: str, tmp_path: Path) -> None:
    files.export(tensors, tmp_path / "file", {})
    with pytest.raises(TrainingError, match=re.escape(text)):
        read(Source(tmp_path / "file"), shapes(ENCODER))


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path, text in (
        (tmp_path, "is a folder, but neither a run nor a step of one"),
        (tmp_path / "run", "no good checkpoint yet"),
        (tmp_path / "none", "cannot read .*none: No such file"),
    ):
        with pytest.raises(CheckpointError, match=text):
            read(Source(path), shapes(ENCODER))
    assert reader.steps(tmp_path / "run" / "checkpoints") == {}
