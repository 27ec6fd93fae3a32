"""Views: parameters distributed as torchvision's, executed as Pillow does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kit.data import picture
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as TF

from scaletrain.config.schema import View
from scaletrain.data.loading.dataset import render, sample_keys
from scaletrain.data.transforms import color, crop, maps
from scaletrain.data.transforms.params import DRAWS, ORDERS, draw, expand, random_box, uniforms


def off(a: object, b: object) -> float:
    """Mean absolute difference in gray levels."""
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean())


# --- parameters -----------------------------------------------------------------------------------


def rows(seed: int, epoch: int, samples: int) -> list[list[float]]:
    """The numbers of the first view of samples 0 .. samples - 1."""
    return [u[0] for u in uniforms(sample_keys(seed, epoch, torch.arange(samples)), 1)]


def test_numbers_depend_on_every_part_of_the_key_and_on_the_view() -> None:
    keys = [
        sample_keys(s, e, torch.tensor([i]))
        for s, e, i in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 3, 3 * 10**8))
    ]
    drawn = np.array([uniforms(key, 4)[0] for key in keys])
    assert drawn.shape == (5, 4, DRAWS)
    assert len(np.unique(drawn)) == drawn.size
    assert (
        uniforms(keys[0], 2)[0] == drawn[0, :2].tolist()
    )  # more views do not change the first ones
    many = np.array(rows(0, 0, 600)).ravel()
    assert stats.kstest(many, "uniform").pvalue > 1e-3
    assert many.min() >= 0
    assert many.max() < 1
    assert abs(np.corrcoef(np.array(rows(0, 0, 2000))[:, :2].T)[0, 1]) < 0.1


@pytest.mark.parametrize(("height", "width"), [(20, 400), (400, 20), (60, 50)])
def test_impossible_crops_fall_back_to_the_centre_as_torchvision(height: int, width: int) -> None:
    spec = View(scale=(1.0, 1.0), ratio=(0.99, 1.01))
    torch.manual_seed(0)
    theirs = transforms.RandomResizedCrop.get_params(
        torch.empty(3, height, width), spec.scale, spec.ratio
    )
    assert random_box(spec, [0.5] * 20, 0.5, 0.5, height, width) == tuple(theirs)


def test_probabilities_and_ranges() -> None:
    spec = View(
        size=96,
        crop=0.5,
        flip=0.3,
        jitter=0.8,
        brightness=0.4,
        contrast=0.3,
        saturation=0.2,
        hue=0.1,
    )
    spec = spec.model_copy(
        update={"grayscale": 0.2, "blur": 0.1, "sigma": (0.1, 2.0), "solarize": 0.25}
    )
    drawn = [draw(spec, u, 100, 100) for u in rows(9, 1, 5000)]
    shares = {
        "crop": (0.5, np.mean([p.box != (0, 0, 100, 100) for p in drawn])),
        "flip": (0.3, np.mean([p.flip for p in drawn])),
        "jitter": (0.8, np.mean([p.jitter for p in drawn])),
        "gray": (0.2, np.mean([p.gray for p in drawn])),
        "blur": (0.1, np.mean([p.sigma > 0 for p in drawn])),
        "solarize": (0.25, np.mean([p.solarize for p in drawn])),
    }
    for name, (wanted, found) in shares.items():
        assert abs(found - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 5000), name
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.7, 1.3),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        values = np.array([getattr(p, name) for p in drawn])
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 0.001, name
    sigmas = np.array([p.sigma for p in drawn if p.sigma]) * 224 / 96
    assert stats.kstest(sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > 0.001
    assert stats.chisquare([sum(p.order == o for p in drawn) for o in ORDERS]).pvalue > 0.001


def test_strengths_above_one_start_at_zero() -> None:
    drawn = [draw(View(brightness=1.0), u, 50, 50).brightness for u in rows(0, 0, 300)]
    assert 0 <= min(drawn) < 0.05
    assert 1.9 < max(drawn) <= 2


def test_views_are_grouped_by_size_largest_first() -> None:
    specs = (
        View(size=96, count=2, flip=0.1),
        View(size=224, blur=1.0),
        View(size=224, count=2, blur=0.1),
        View(size=96),
    )
    groups = expand(specs)
    assert [[v.size for v in g] for g in groups] == [[224] * 3, [96] * 3]
    assert [v.blur for v in groups[0]] == [1.0, 0.1, 0.1]
    assert [v.flip for v in groups[1]] == [0.1, 0.1, 0.5]


# --- execution; test_data_fidelity.py has the colours ---------------------------------------------


def test_mask_follows_its_view() -> None:
    """A white mask region painted into the image stays on the same pixels after crop, resize and
    flip.
    """
    mask = np.zeros((60, 80), np.uint8)
    mask[10:40, 15:50] = 1
    painted = np.repeat(mask[..., None] * 255, 3, -1)
    for flip in (False, True):
        cut = maps.view(mask, "foreground", (5, 10, 50, 55), 32, flip)
        out = np.zeros((32, 32, 3), np.uint8)
        render(painted, View(size=32), color.PLAIN._replace(box=(5, 10, 50, 55), flip=flip), out)
        assert set(np.unique(cut)) == {0, 1}
        assert ((out[..., 0] > 127) == cut).mean() > 0.97


@pytest.mark.parametrize(("height", "width"), [(150, 200), (200, 150), (70, 300)])
def test_evaluation_protocols(height: int, width: int) -> None:
    photo = picture(8, height, width)
    pil = Image.fromarray(photo)
    tv = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])(pil)
    assert off(crop.evaluate(photo, 56, "tv"), tv) < 0.1
    side = round(min(height, width) * 0.875)
    centre = TF.center_crop(pil, [side, side])
    assert (
        off(
            crop.evaluate(photo, 56, "byol"),
            TF.resize(centre, [56, 56], TF.InterpolationMode.BICUBIC),
        )
        < 6
    )
    assert off(crop.evaluate(photo, 56, "none"), TF.resize(pil, [56, 56])) < 0.1
    assert crop.evaluate(photo[:40, :40], 40, "none") is not None
    assert np.array_equal(crop.evaluate(photo[:40, :40], 40, "none"), photo[:40, :40])
