"""Encoders from the checkpoints of other trainers: each layout gives the network that was saved."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.evals import backbone, settings
from safetensors.torch import save_file
from torch import Tensor, nn

from scaletrain.checkpoint.files import CheckpointError
from scaletrain.data.errors import DataError
from scaletrain.evals.encoders import checkpoints, torch_files
from scaletrain.evals.encoders.encoder import EncoderConfig
from scaletrain.evals.encoders.targets import find
from scaletrain.evals.errors import EvalError
from scaletrain.nn import resnet

State = dict[str, Tensor]
NETWORK = settings("train", stem="imagenet").model
STATE = backbone(settings("train", stem="imagenet"))
IMAGES = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
CIFAR = EncoderConfig(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def under(prefix: str, state: Mapping[str, Tensor] = STATE) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(*names: str) -> State:
    return {name: torch.ones(2, 3) for name in names}


def layers(state: State) -> State:
    """As nn.Sequential of a ResNet's children names them."""
    numbers = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(i + 3) for i in range(1, 5)}}
    parts = (name.partition(".") for name in state)
    return {
        f"{numbers[head]}.{rest}": tensor
        for (head, _, rest), tensor in zip(parts, state.values(), strict=True)
    }


# what the trainers save, and the groups of names that are left out
FILES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "moco v2": (
        "moco",
        {
            "epoch": 200,
            "arch": "resnet50",
            "state_dict": {
                **under("module.encoder_q."),
                **other("module.encoder_q.fc.0.weight", "module.encoder_q.fc.2.bias"),
                **under("module.encoder_k.", backbone(settings("x", stem="imagenet"), seed=5)),
                **other("module.queue", "module.queue_ptr"),
            },
            "optimizer": {"state": {}, "param_groups": []},
        },
        ("module.encoder_k (120)", "module.queue", "module.encoder_q (2)"),
    ),
    "moco v3": (
        "moco",
        {
            "state_dict": {
                **under("module.base_encoder."),
                **other("module.base_encoder.fc.0.weight", "module.predictor.0.weight"),
                **under("module.momentum_encoder.", backbone(settings("x", stem="imagenet"), 5)),
            }
        },
        ("module.momentum_encoder (120)", "module.predictor"),
    ),
    "swav published": (
        "swav",
        OrderedDict(
            under("module.") | other("module.projection_head.0.weight", "module.prototypes.weight")
        ),
        ("module.projection_head", "module.prototypes"),
    ),
    "swav training": (
        "swav",
        {"epoch": 3, "state_dict": under("module."), "amp": {"loss_scaler0": {"scale": 2.0}}},
        (),
    ),
    "barlow published": ("barlow_twins", STATE, ()),
    "barlow training": (
        "barlow_twins",
        {"epoch": 9, "model": under("module.backbone.") | other("module.projector.0.weight")},
        ("module.projector",),
    ),
    "vicreg published": ("vicreg", OrderedDict(STATE), ()),
    "vicreg training": ("vicreg", {"model": under("module.backbone.")}, ()),
    "vissl": (
        "vissl",
        {
            "phase_idx": 1,
            "classy_state_dict": {
                "base_model": {
                    "model": {"trunk": under("_feature_blocks."), "heads": other("0.clf.0.weight")}
                }
            },
        },
        (),
    ),
    "solo-learn": (
        "solo_learn",
        {
            "global_step": 7,
            "state_dict": under("backbone.")
            | under("momentum_backbone.")
            | other("classifier.weight"),
        },
        ("momentum_backbone", "classifier.weight"),
    ),
    "solo-learn before": ("solo_learn", {"state_dict": under("encoder.")}, ()),
    "lightly benchmark": (
        "lightly",
        {"state_dict": under("backbone.") | other("projection_head.layers.0.weight")},
        ("projection_head.layers",),
    ),
    "lightly layers": ("lightly", {"state_dict": under("backbone.", layers(STATE))}, ()),
}


@pytest.mark.parametrize("case", FILES)
def test_the_network_that_was_saved(tmp_path: Path, case: str) -> None:
    source, content, left_out = FILES[case]
    torch.save(content, tmp_path / "file.pth.tar")
    encoder = find(f"{source}:{tmp_path / 'file.pth.tar'}")

    ours = resnet.ResNet(NETWORK).eval()
    ours.load_state_dict(STATE)
    assert torch.equal(encoder.module(IMAGES), ours(IMAGES))
    assert not any(p.requires_grad for p in encoder.module.parameters())
    assert (encoder.model, encoder.size) == (NETWORK, 224)
    assert (encoder.run, encoder.home, encoder.name) == (None, tmp_path, f"{source}-file.pth")
    assert all(group in encoder.about for group in left_out)
    assert ("left out" in encoder.about) == bool(left_out)


def test_all_sources_have_a_case() -> None:
    tested = {source for source, _, _ in FILES.values()} | {"byol", "relicv2"}
    assert set(checkpoints.sources()) == tested


def test_swavs_normalisation_and_that_of_the_user(tmp_path: Path) -> None:
    torch.save(under("module."), tmp_path / "a.pth")
    target = f"swav:{tmp_path / 'a.pth'}"
    assert find(target).data.std == (0.228, 0.224, 0.225)
    assert find(target, config=EncoderConfig(std=(0.2, 0.2, 0.2))).data.std == (0.2, 0.2, 0.2)
    assert find(target).data.mean == (0.485, 0.456, 0.406)


def test_forms_of_files(tmp_path: Path) -> None:
    """Files of before torch 1.6, safetensors, half precision, without counters of batches."""
    half = {n: t.half() for n, t in STATE.items() if not n.endswith("num_batches_tracked")}
    torch.save(half, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "new.safetensors")
    old, new = (find(f"vicreg:{tmp_path / name}") for name in ("old.pth", "new.safetensors"))
    weights = old.module.state_dict()["layer4.1.conv2.weight"]
    assert torch.equal(weights, STATE["layer4.1.conv2.weight"].half().float())
    assert weights.dtype == torch.float32
    assert torch.equal(new.module.state_dict()["conv1.weight"], STATE["conv1.weight"])
    assert old.weights != new.weights


def test_baselines(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    target = f"vicreg:{tmp_path / 'a.pth'}"
    torch.manual_seed(3)
    fresh = resnet.ResNet(NETWORK).state_dict()
    untrained = find(target, "untrained", EncoderConfig(seed=3))
    assert torch.equal(untrained.module.state_dict()["conv1.weight"], fresh["conv1.weight"])
    assert find(target, "pixels").size == 32


@pytest.mark.parametrize("source", ["lightly", "solo_learn"])
def test_networks_for_small_images(tmp_path: Path, source: str) -> None:
    """solo-learn pads the first layer by two pixels, others by one; the same weights are then
    another encoder.
    """
    cfg = settings("train")
    state = backbone(cfg)
    torch.save({"state_dict": under("backbone.", state)}, tmp_path / "a.ckpt")
    target = f"{source}:{tmp_path / 'a.ckpt'}"
    with pytest.raises(EvalError, match="normalises in its own way"):
        find(target)

    encoder = find(target, config=CIFAR)
    ours = resnet.ResNet(cfg.model).eval()
    ours.load_state_dict(state)
    if source == "solo_learn":
        ours.conv1 = nn.Conv2d(3, 4, 3, padding=2, bias=False)
        ours.conv1.weight = nn.Parameter(state["conv1.weight"])
    assert torch.equal(encoder.module(IMAGES[..., :32, :32]), ours(IMAGES[..., :32, :32]))
    assert encoder.size == 32
    torch.save(state, tmp_path / "plain.pth")
    assert encoder.weights != find(f"vicreg:{tmp_path / 'plain.pth'}", config=CIFAR).weights


# --- what does not fit


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"state_dict": under("module.encoder.")}, r"no tensor module\.encoder_q\.conv1\.weight"),
        ({"model": STATE}, "holds no encoder where moco keeps it"),
        ({"state_dict": []}, "holds no encoder"),
        ({}, "it has no tensors"),
        (
            {"state_dict": under("module.encoder_q.", STATE | {"layer9.odd": torch.ones(2)})},
            r"has no tensor 'layer9\.odd' \[2\]",
        ),
        (
            {
                "state_dict": under(
                    "module.encoder_q.", {n: t for n, t in STATE.items() if n != "bn1.bias"}
                )
            },
            r"it has no tensor 'bn1\.bias' \[4\]",
        ),
        (
            {"state_dict": under("module.encoder_q.", STATE | {"bn1.bias": torch.ones(5)})},
            r"'bn1\.bias' is \[5\], the model has \[4\]",
        ),
        (
            {
                "state_dict": under(
                    "module.encoder_q.", STATE | {"layer2.7.conv1.weight": torch.ones(1)}
                )
            },
            "is no ResNet that is known: it has 2-8-2-2 basic blocks",
        ),
        (
            {"state_dict": {"module.encoder_q.conv1.weight": torch.ones(1).expand(999, 3, 7, 7)}},
            "more elements than values",
        ),
        ({"state_dict": {"module.encoder_q.conv1.weight": torch.ones(3)}}, "is no ResNet"),
    ],
)
def test_another_content_is_refused_by_name(tmp_path: Path, content: Any, text: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(EvalError, match=text) as error:
        find(f"moco:{tmp_path / 'a.pth'}")
    assert str(tmp_path / "a.pth") in str(error.value)


def test_a_huge_network_takes_no_memory(tmp_path: Path) -> None:
    """The file says a width of 16 and has one value for each of its tensors."""
    with torch.device("meta"):
        wide = resnet.ResNet(NETWORK.model_copy(update={"name": "resnet50", "width": 16.0}))
    state = {n: torch.zeros(t.shape[:1]) for n, t in wide.state_dict().items()}
    state["conv1.weight"] = torch.zeros(1024, 3, 7, 7)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(EvalError, match="does not fit the model"):
        find(f"vicreg:{tmp_path / 'a.pth'}")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "a.pth", tmp_path / "pwned"
    content = {"state_dict": under("module.encoder_q."), "hyper": Evil(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(EvalError, match=r"object of (pathlib|getattr|builtins|__builtin__)"):
        find(f"moco:{path}")
    assert not marker.exists()

    path.write_bytes(pickle.dumps(content))
    with pytest.raises(EvalError, match=str(path)):
        find(f"moco:{path}")
    assert not marker.exists()


@pytest.mark.parametrize("source", ["moco", "byol"])
def test_damaged_files_are_one_clear_error(tmp_path: Path, source: str) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": under("module.encoder_q.")}, path)
    whole = path.read_bytes()
    for content in (b"", b"\xff\xd8", whole[: len(whole) // 2], b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises((EvalError, DataError), match=str(path)):
            find(f"{source}:{path}")

    for place in (tmp_path, tmp_path / "none", Path("/dev/zero")):
        with pytest.raises((EvalError, DataError), match="cannot be read"):
            find(f"{source}:{place}")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(EvalError, match="is compressed"):
        find(f"vicreg:{tmp_path / 'b.pth'}")


def test_a_file_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    monkeypatch.setattr(torch_files, "MAX_BYTES", 1000)
    with pytest.raises(EvalError, match="more than the 1,000 that are read"):
        find(f"vicreg:{tmp_path / 'a.pth'}")


def test_a_text_that_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvalError, match=r"'moko' is no trainer.*'moco'"):
        find("moko:a.pth")
    with pytest.raises(EvalError, match="moco:FILE"):
        find("moco:")
    with pytest.raises(EvalError, match="neither a run folder"):
        find("./tv/resnet18")
    Path("moco:a.safetensors").write_bytes(b"0" * 99)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        find(Path("moco:a.safetensors"))
    with pytest.raises(EvalError, match="settings encoder"):
        find(tmp_path, config=CIFAR)
