"""One file of weights: whole or not at all, readable by others, damage and pickles refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file as official_load
from safetensors.torch import save_file as official_save
from torch import nn

from scaletrain.checkpoint.files import CheckpointError, export, load_file


def weights() -> dict[str, torch.Tensor]:
    return {
        "conv.weight": torch.arange(24.0).view(2, 3, 4).transpose(0, 1),
        "n": torch.tensor(3),
        "half": torch.ones(3).bfloat16(),
    }


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "net.safetensors"
    export(weights(), path, {"model": "resnet18", "step": "7"})
    ours, meta = load_file(path)
    assert meta == {"format": "pt", "model": "resnet18", "step": "7"}
    for read in (ours, official_load(path)):
        assert read.keys() == weights().keys()
        assert all(
            torch.equal(read[name], t) and read[name].dtype == t.dtype
            for name, t in weights().items()
        )
    with safe_open(path, "pt") as handle:
        assert handle.metadata()["model"] == "resnet18"
    assert os.listdir(path.parent) == [path.name]  # noqa: PTH208


def test_loads_strictly_into_a_module_and_shares_nothing(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    export(net.state_dict(), tmp_path / "a", {})
    read, _ = load_file(tmp_path / "a")
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).load_state_dict(read, strict=True)
    read["0.weight"].zero_()
    assert torch.equal(load_file(tmp_path / "a")[0]["0.weight"], net.state_dict()["0.weight"])


def test_files_of_others(tmp_path: Path) -> None:
    official_save(weights() | {"conv.weight": torch.ones(2)}, tmp_path / "a")
    assert load_file(tmp_path / "a")[1] == {}
    for length in range(300, 700, 4):  # a header of 0x0280 bytes begins like a pickle
        export({"x": torch.ones(2)}, tmp_path / "b", {"fill": "x" * length})
        if (tmp_path / "b").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        raise AssertionError
    assert torch.equal(load_file(tmp_path / "b")[0]["x"], torch.ones(2))


def test_a_flipped_bit_anywhere(tmp_path: Path) -> None:
    """Refused, or without effect: only the padding and the name of the sum itself may change, never
    a value.
    """
    path, escaped = tmp_path / "a", []
    export(weights(), path, {"model": "resnet18"})
    raw = path.read_bytes()
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            read, meta = load_file(path)
        except CheckpointError:
            continue
        escaped.append(raw[place])
        assert all(torch.equal(read[name], t) for name, t in weights().items())
        assert meta["model"] == "resnet18"
    assert len(escaped) <= len("scaletrain.sha256") + 7, bytes(escaped)


def test_refused_with_the_fix(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("zip.pt", "old.pth"):
        with pytest.raises(
            CheckpointError, match=rf"{name}.*looks like a pickle.*convert it once.*save_file"
        ):
            load_file(tmp_path / name)
    export(weights(), tmp_path / "a", {})
    (tmp_path / "cut").write_bytes((tmp_path / "a").read_bytes()[:-1])
    (tmp_path / "empty").touch()
    for name in ("cut", "empty"):
        with pytest.raises(
            CheckpointError, match=f"{name} is not a whole safetensors file.*cut short"
        ):
            load_file(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"cannot read .*none.*No such file"):
        load_file(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"pipe is a pipe or a device and not a file"):
        load_file(tmp_path / "pipe")
    with (tmp_path / "header").open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 32)  # sparse
    with pytest.raises(
        CheckpointError,
        match=r"header: its header has 1,073,741,824 bytes, more than the 16,777,216",
    ):
        load_file(tmp_path / "header")
    with pytest.raises(CheckpointError, match=r"is a folder; give one \.safetensors file"):
        load_file(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot export tensor 'z' of type torch\.complex64"):
        export({"z": torch.ones(1, dtype=torch.complex64)}, tmp_path / "z", {})


def test_a_failed_export_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export({"x": torch.ones(2)}, tmp_path / "a", {})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*/a: No space left on device"):
        export({"x": torch.zeros(2)}, tmp_path / "a", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert torch.equal(load_file(tmp_path / "a")[0]["x"], torch.ones(2))
