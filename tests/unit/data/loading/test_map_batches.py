"""Maps in batches: each shows what its view shows, pixel for pixel, for crops and for padded views,
in the worker and on the device, from the folder and from an address.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.data import add, encode, joined, write_shards
from kit.remote import serving

from scaletrain.config.schema import DataConfig, View
from scaletrain.core import Batch
from scaletrain.data.errors import ShardError
from scaletrain.data.format import index
from scaletrain.data.loading.loader import open_stream
from scaletrain.data.storage import http

CPU = torch.device("cpu")
VOID = 255
SIZES = ((60, 90), (90, 64), (48, 48))
# nothing changes the colours, which are the class numbers
PLAIN = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "interpolation": "bilinear", "size": 40}
CROPS = View(**PLAIN, count=2, scale=(0.2, 1.0))
PADDED = View(**PLAIN, count=2, scale=(0.5, 4.0))


def labelled(number: int) -> np.ndarray:
    """Rectangles of the classes 20, 30 .. 240, and a corner without a class, which differs."""
    draw = np.random.default_rng(number)
    values = np.kron(draw.integers(2, 25, (4, 4)) * 10, np.ones((24, 24))).astype(np.uint8)
    height, width = SIZES[number % 3]
    values = values[:height, :width]
    values[:10, : 5 + number] = VOID
    return values


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images painted with their classes: `data`, their class numbers as its members, and `maps`, in
    another order and other shards.
    """
    folder = tmp_path_factory.mktemp("maps")
    order = np.random.default_rng(0).permutation(24).tolist()
    for name, numbers, size in (("data", range(24), 9), ("maps", order, 7)):
        (folder / name).mkdir()
        for start in range(0, 24, size):
            with tarfile.open(folder / name / f"s-{start:02d}.tar", "w") as tar:
                for number in numbers[start : start + size]:
                    values = labelled(number)
                    image = np.repeat(values[..., None], 3, -1) if name == "data" else values
                    add(tar, f"k{number}.png", encode(image))
                    if name == "data":
                        add(tar, f"k{number}.mask.png", encode(values))
        index.build(folder / name)
    return folder


def batch(root: Path | str, view: View, rank: int = 0, world: int = 1, **options: object) -> Batch:
    data = {
        "path": f"{root}/data",
        "maps": [{"path": f"{root}/maps", "kind": kind} for kind in ("classes", "grey")],
        "lanes": 4,
        "window": 1,
        "workers": 0,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "views": [view, View(size=8)],
        **options,
    }
    stream = open_stream(DataConfig(**data), seed=3, batch=24, rank=rank, world=world, device=CPU)
    (found,) = stream.batches(0, 1)
    stream.close()
    return found


@pytest.mark.parametrize("augment", ["worker", "device"])
@pytest.mark.parametrize("view", [CROPS, PADDED], ids=["crops", "padded"])
def test_maps_show_what_their_views_show(root: Path, view: View, augment: str) -> None:
    found = batch(root, view, augment=augment)
    classes, grey = found.maps
    assert classes.shape == grey.shape == (2, 24, 1, 40, 40)
    assert (classes.dtype, grey.dtype, found.masks) == (torch.int64, torch.float32, None)
    painted = (found.views[0] * 255).round().long()
    # away from edges, where the filter of a view mixes two colours
    near = torch.nn.functional.pad(classes[:, :, 0].float(), (1, 1, 1, 1), value=-1)
    windows = near.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    flat = (windows.amin(-1) == windows.amax(-1))[:, :, None]
    outside = flat & (classes == VOID) & (painted == 0).all(2, keepdim=True)
    same = flat & ((painted == classes).all(2, keepdim=True) | outside)
    assert flat.float().mean() > 0.5
    assert (same.sum() / flat.sum()).item() > 0.99
    assert (outside.float().mean() > 0.1) == (view is PADDED)
    inside = flat & ~outside
    assert ((grey * 255 - classes).abs()[inside] <= 1).float().mean() > 0.99
    assert not grey[outside].any()


def test_several_maps_of_a_sample(root: Path) -> None:
    """Those of data.maps in their order; the masks are the first foreground."""
    own = {"kind": "foreground"}
    other = {"path": f"{root}/maps", "kind": "classes"}
    found = batch(root, PADDED, maps=[other, own, {"kind": "classes"}])
    numbers, foreground, members = found.maps
    assert torch.equal(numbers, members)
    assert found.masks is not None
    assert torch.equal(found.masks, foreground)
    assert set(foreground.unique().tolist()) == {0.0, 1.0}
    # only what lies outside of the image is black
    assert (foreground[numbers != VOID] == 1).all()
    assert (numbers[foreground == 0] == VOID).all()
    # the masks that data.foreground adds come last
    implied = batch(root, PADDED, maps=[other], foreground={"masks": True})
    assert [len(b.maps) for b in (found, implied)] == [3, 2]
    assert torch.equal(implied.maps[1], foreground)
    assert torch.equal(implied.masks, foreground)
    micro = found.split(3)[1]
    assert all(
        torch.equal(part, x[:, 8:16]) for part, x in zip(micro.maps, found.maps, strict=True)
    )
    assert [x.dtype for x in found.double().maps] == [torch.int64, torch.float64, torch.int64]


def same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.index, b.index)
    assert torch.equal(a.views[0], b.views[0])
    assert len(a.maps) == len(b.maps) == 2
    assert all(torch.equal(x, y) for x, y in zip(a.maps, b.maps, strict=True))


def test_ranks_workers_and_addresses_give_the_same_maps(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(http, "sleep", lambda seconds: None)
    whole = batch(root, PADDED)
    same(joined([batch(root, PADDED, rank, 2) for rank in range(2)]), whole)
    same(batch(root, PADDED, cache={"path": str(tmp_path / "a"), "stage": True}), whole)
    with serving(root) as web:
        same(batch(web.url, PADDED, workers=1, cache={"path": str(tmp_path / "b")}), whole)
        assert web.asked["maps/s-07.tar"] == 1


def test_samples_without_a_map(root: Path, tmp_path: Path) -> None:
    """All foreground, or all void; or an error that names the first."""
    write_shards(tmp_path / "data", (24,))
    maps = [{"kind": kind, "on_missing": "none"} for kind in ("foreground", "classes")]
    # studies and crops of the foreground leave them as they are
    study = {"study": "centred", "good_crops": 1.0}
    found = batch(tmp_path, PADDED, maps=maps, foreground=study)
    assert (found.maps[0] == 1).all()
    assert (found.maps[1] == VOID).all()
    with pytest.raises(ShardError, match=r"sample '000\d\d': it has no .mask.png member"):
        batch(tmp_path, PADDED, maps=[{"kind": "classes"}])


def test_a_map_of_another_size_names_both(root: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "data", (24,))
    (tmp_path / "maps").mkdir()
    with tarfile.open(tmp_path / "maps" / "s.tar", "w") as tar:
        for number in range(24):
            add(tar, f"{number:05d}.png", encode(labelled(number)))
    text = rf"the map in {tmp_path}/maps is \(\d+, \d+\) and the image \(24, 30\)"
    with pytest.raises(ShardError, match=text):
        batch(tmp_path, PADDED)


def test_padding_has_the_mean_colour(root: Path) -> None:
    found = batch(root, PADDED, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    outside = (found.views[0].abs() < 0.011).all(2)
    assert outside.float().mean() > 0.2
    assert (found.maps[0][:, :, 0][outside] == VOID).all()
