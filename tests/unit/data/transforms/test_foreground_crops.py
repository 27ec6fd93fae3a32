"""Good crops: a keyed share of the samples, whose large crops hold foreground; all others are as
they were. And worse masks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from kit.data import write_shards

from scaletrain import rng
from scaletrain.config.schema import DataConfig, View
from scaletrain.core import Batch
from scaletrain.data.loading.loader import open_stream
from scaletrain.data.transforms import foreground_crops, mask_ablations

SPEC = View(size=16, scale=(0.05, 0.2))


def held(box: foreground_crops.Box, mask: np.ndarray) -> float:
    top, left, h, w = box
    return mask[top : top + h, left : left + w].sum() / mask.sum()


def test_a_box_holds_what_is_asked_or_the_most_of_all() -> None:
    mask = np.zeros((24, 30), np.uint8)
    mask[2:8, 20:28] = 1
    corner = (20, 0, 4, 4)
    for rows in foreground_crops.draws(rng.hash64(0, torch.arange(50)), 1, 1.0):
        boxes = [foreground_crops.random_box(SPEC, u[:20], u[20], u[21], 24, 30) for u in rows[0]]
        found = foreground_crops.box(SPEC, corner, rows[0], mask, 0.25)
        enough = [box for box in boxes if held(box, mask) >= 0.25]
        assert (
            found == enough[0]
            if enough
            else held(found, mask) == max(held(box, mask) for box in [corner, *boxes])
        )
        assert foreground_crops.box(SPEC, (0, 18, 10, 10), rows[0], mask, 0.9) == (
            0,
            18,
            10,
            10,
        )  # it is good as it is
        assert foreground_crops.box(SPEC, corner, rows[0], 0 * mask, 0.25) == corner
        # around the whole image, and so around all foreground
        beyond = (-3, -9, 40, 50)
        assert foreground_crops.box(SPEC, beyond, rows[0], mask, 1.0) == beyond


def test_the_share_is_that_of_the_samples() -> None:
    keys = rng.hash64(3, torch.arange(4000))
    few, more = ([bool(d) for d in foreground_crops.draws(keys, 2, share)] for share in (0.25, 0.5))
    assert abs(np.mean(few) - 0.25) < 0.03
    assert all(b for a, b in zip(few, more, strict=True) if a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("good") / "shards", (48,), masks=True)


def batch(folder: Path, share: float) -> Batch:
    views = (View(size=16, count=2, scale=(0.05, 0.2)), View(size=8, scale=(0.05, 0.2)))
    data = DataConfig(
        path=str(folder),
        lanes=4,
        window=1,
        workers=0,
        views=views,
        foreground={"masks": True, "good_crops": share, "good_cover": 0.15},
    )
    stream = open_stream(data, seed=1, batch=24, rank=0, world=1, device=torch.device("cpu"))
    return next(iter(stream.batches(0, 1)))


def test_only_the_chosen_samples_and_their_large_crops_change(folder: Path) -> None:
    plain, half, every = (batch(folder, share) for share in (0.0, 0.5, 1.0))
    chosen = rng.uniform(plain.keys, "good", 1)[:, 0] < 0.5
    assert torch.equal(half.views[0][:, ~chosen], plain.views[0][:, ~chosen])
    assert torch.equal(half.views[0][:, chosen], every.views[0][:, chosen])
    assert torch.equal(every.views[1], plain.views[1])
    assert plain.masks is not None
    assert every.masks is not None
    empty = [(b.masks.mean((2, 3, 4)) == 0).float().mean().item() for b in (plain, every)]
    assert empty[0] > 0.2
    assert empty[1] == 0


def test_masks_are_needed() -> None:
    with pytest.raises(ValueError, match=r"add data\.foreground\.masks=true"):
        DataConfig(foreground={"good_crops": 0.5})


# --- masks made worse -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_made_up_masks_cover_their_share(share: float) -> None:
    mask = np.zeros((40, 60), np.uint8)
    for kind in ("points", "rectangle", "centred"):
        found = mask_ablations.alter(mask, kind, share, [0.3, 0.9])
        assert abs(found.mean() - share) < 0.03
        assert set(np.unique(found)) == {0, 1}
    centred = mask_ablations.alter(mask, "centred", share, [0.3, 0.9])
    for axis in range(2):  # as much room on either side, to a pixel
        inside = np.flatnonzero(centred.any(1 - axis))
        assert abs(inside[0] - (mask.shape[axis] - 1 - inside[-1])) <= 1
    assert not np.array_equal(mask_ablations.alter(mask, "rectangle", share, [0.0, 0.0]), centred)


def test_masks_grow_shrink_and_become_boxes() -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[8:12, 5:15] = 1  # 40 pixels
    grown, shrunk = (mask_ablations.alter(mask, kind, 0.9, [0, 0]) for kind in ("add", "remove"))
    assert grown[7:13, 7:13].all()
    assert (grown >= mask).all()
    assert (shrunk <= mask).all()
    assert shrunk.sum() == 40 - 4 * 6
    mask[0, 19] = 1
    assert mask_ablations.alter(mask, "box", 0, [0, 0]).sum() == 12 * 15
    assert mask_ablations.alter(0 * mask, "box", 0, [0, 0]).sum() == 0


def test_the_stream_alters_masks_and_nothing_else(folder: Path) -> None:
    def data(**study: object) -> DataConfig:
        foreground = {"masks": True, **study}
        return DataConfig(
            path=str(folder),
            lanes=4,
            window=1,
            workers=0,
            views=(View(size=16),),
            foreground=foreground,
        )

    plain, other = (
        next(
            iter(
                open_stream(
                    config, seed=1, batch=24, rank=0, world=1, device=torch.device("cpu")
                ).batches(0, 1)
            )
        )
        for config in (data(), data(study="centred", study_share=1.0))
    )
    assert torch.equal(plain.views[0], other.views[0])
    assert other.masks is not None
    assert (other.masks == 1).all()
    assert plain.masks is not None
    assert not (plain.masks == 1).all()
