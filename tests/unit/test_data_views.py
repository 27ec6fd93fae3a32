"""Views: parameters distributed as torchvision's, executed as Pillow does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_kit import picture
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as TF

from scaletrain.config import View
from scaletrain.data import colour, crop
from scaletrain.data.stream import render, sample_keys
from scaletrain.data.views import DRAWS, ORDERS, Params, draw, expand, random_box, uniforms

PHOTO = picture(5, 150, 200)
PIL = Image.fromarray(PHOTO)
STILL = Params((0, 0, 150, 200), False, True, (0, 1, 2, 3), 1.0, 1.0, 1.0, 0.0, False, 0.0, False)


def off(a: object, b: object) -> float:
    """Mean absolute difference in gray levels."""
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean())


# --- parameters -------------------------------------------------------------------------------------------------------


def rows(seed: int, epoch: int, samples: int) -> list[list[float]]:
    """The numbers of the first view of samples 0 .. samples - 1."""
    return [u[0] for u in uniforms(sample_keys(seed, epoch, torch.arange(samples)), 1)]


def test_numbers_depend_on_every_part_of_the_key_and_on_the_view() -> None:
    keys = [
        sample_keys(s, e, torch.tensor([i])) for s, e, i in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 3, 3 * 10**8))
    ]
    drawn = np.array([uniforms(key, 4)[0] for key in keys])
    assert drawn.shape == (5, 4, DRAWS)
    assert len(np.unique(drawn)) == drawn.size
    assert uniforms(keys[0], 2)[0] == drawn[0, :2].tolist()  # more views do not change the first ones
    many = np.array(rows(0, 0, 600)).ravel()
    assert stats.kstest(many, "uniform").pvalue > 1e-3
    assert many.min() >= 0
    assert many.max() < 1
    assert abs(np.corrcoef(np.array(rows(0, 0, 2000))[:, :2].T)[0, 1]) < 0.1


def test_crop_boxes_follow_torchvision() -> None:
    spec = View(area=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    height, width, n = 300, 450, 4000
    torch.manual_seed(0)
    theirs = [transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), spec.area, spec.ratio) for _ in range(n)]
    ours = [draw(spec, u, height, width).box for u in rows(0, 0, n)]
    a, b = np.array(ours), np.array(theirs)
    for name, value in (("area", lambda x: x[:, 2] * x[:, 3]), ("ratio", lambda x: x[:, 3] / x[:, 2])):
        assert stats.ks_2samp(value(a), value(b)).pvalue > 0.01, name
    for column in range(4):
        assert stats.ks_2samp(a[:, column], b[:, column]).pvalue > 0.01, column
    assert (a[:, 0] + a[:, 2]).max() <= height
    assert (a[:, 1] + a[:, 3]).max() <= width


@pytest.mark.parametrize(("height", "width"), [(20, 400), (400, 20), (60, 50)])
def test_impossible_crops_fall_back_to_the_centre_as_torchvision(height: int, width: int) -> None:
    spec = View(area=(1.0, 1.0), ratio=(0.99, 1.01))
    torch.manual_seed(0)
    theirs = transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), spec.area, spec.ratio)
    assert random_box(spec, [0.5] * 20, 0.5, 0.5, height, width) == tuple(theirs)


def test_probabilities_and_ranges() -> None:
    spec = View(size=96, crop=0.5, flip=0.3, jitter=0.8, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    spec = spec.model_copy(update={"grayscale": 0.2, "blur": 0.1, "sigma": (0.1, 2.0), "solarize": 0.25})
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
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.7, 1.3), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)):
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
    specs = (View(size=96, count=2, flip=0.1), View(size=224, blur=1.0), View(size=224, count=2, blur=0.1), View(size=96))
    groups = expand(specs)
    assert [[v.size for v in g] for g in groups] == [[224] * 3, [96] * 3]
    assert [v.blur for v in groups[0]] == [1.0, 0.1, 0.1]
    assert [v.flip for v in groups[1]] == [0.1, 0.1, 0.5]


# --- execution against Pillow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("box", "size"), [((10, 20, 130, 150), 32), ((3, 5, 90, 64), 96), ((40, 40, 9, 12), 32)])
def test_antialiased_crop_is_pillows(interpolation: str, box: tuple[int, int, int, int], size: int) -> None:
    mode = {"bilinear": TF.InterpolationMode.BILINEAR, "bicubic": TF.InterpolationMode.BICUBIC}[interpolation]
    theirs = TF.resized_crop(PIL, *box, [size, size], mode)
    ours = crop.crop(PHOTO, box, size, interpolation, antialias=True)
    assert ours.flags.c_contiguous
    assert off(ours, theirs) < 0.1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_plain_crop_is_torchs_without_antialias(interpolation: str) -> None:
    x = torch.from_numpy(PHOTO).permute(2, 0, 1)[None, :, 10:140, 20:170].float()
    theirs = torch.nn.functional.interpolate(x, (32, 32), mode=interpolation).clamp(0, 255)[0].permute(1, 2, 0)
    assert off(crop.crop(PHOTO, (10, 20, 130, 150), 32, interpolation, antialias=False), theirs.round().numpy()) < 0.5
    assert off(crop.crop(PHOTO, (10, 20, 130, 150), 32, interpolation, antialias=True), theirs.round().numpy()) > 2


@pytest.mark.parametrize("factor", [0.0, 0.37, 0.9, 1.0, 1.31, 2.0])
def test_colour_operations_are_pillows(factor: float) -> None:
    assert off(colour.brightness(PHOTO, factor), TF.adjust_brightness(PIL, factor)) < 0.1
    assert off(colour.contrast(PHOTO, factor), TF.adjust_contrast(PIL, factor)) < 0.2
    assert off(colour.saturation(PHOTO, factor), TF.adjust_saturation(PIL, factor)) < 0.6
    turn = (factor - 1) / 2
    # Pillow's integer HSV alone moves this saturated picture by 0.7 levels; photographs agree to 0.25
    assert off(colour.hue(PHOTO, turn), TF.adjust_hue(PIL, turn)) < 1.5
    assert off(colour.hue(PHOTO, turn), TF.adjust_hue(PIL, turn - 0.03 if turn > 0 else turn + 0.03)) > 3


def test_gray_and_solarize_are_pillows() -> None:
    assert off(colour.gray(PHOTO), TF.rgb_to_grayscale(PIL, 3)) < 0.05
    assert off(colour.solarize(PHOTO), TF.solarize(PIL, 128)) == 0
    even = np.full((8, 8, 3), 77, np.uint8)  # no operation but brightness changes a uniform gray
    assert off(colour.saturation(even, 1.4), even) == 0
    assert off(colour.contrast(even, 0.3), even) == 0
    assert off(colour.hue(even, 0.2), even) == 0


@pytest.mark.parametrize("sigma", [0.15, 0.5, 1.0, 2.0])
def test_blur_is_torchvisions_and_has_its_sigma(sigma: float) -> None:
    theirs = TF.gaussian_blur(torch.from_numpy(PHOTO).permute(2, 0, 1), 23, sigma).permute(1, 2, 0).numpy()
    assert off(colour.blur(PHOTO, sigma), theirs) < 0.2
    if sigma >= 1:  # below, a sampled Gaussian is narrower than its sigma
        point = np.zeros((41, 41, 3), np.uint8)
        point[20, :] = 255  # a line, whose profile is the kernel
        profile = colour.blur(point, sigma)[:, 20, 0].astype(float)
        spread = np.sqrt((profile * (np.arange(41) - 20) ** 2).sum() / profile.sum())
        assert abs(spread / sigma - 1) < 0.05
    assert colour.blur(PHOTO, 0.05) is PHOTO


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_whole_view_equals_the_sequence_of_pillow_operations(order: tuple[int, ...]) -> None:
    p = STILL._replace(box=(20, 30, 100, 120), flip=True, order=order, brightness=1.3, contrast=0.7, saturation=1.2, hue=-0.08)
    steps = (
        lambda x: TF.adjust_brightness(x, 1.3),
        lambda x: TF.adjust_contrast(x, 0.7),
        lambda x: TF.adjust_saturation(x, 1.2),
        lambda x: TF.adjust_hue(x, -0.08),
    )
    spec = View(size=64)
    for solarize in (False, True):
        p = p._replace(solarize=solarize)
        image = TF.hflip(TF.resized_crop(PIL, *p.box, [64, 64], TF.InterpolationMode.BICUBIC))
        for i in order:
            image = steps[i](image)
        out = np.zeros((64, 64, 3), np.uint8)
        render(PHOTO, spec, p, out)
        assert off(out, TF.solarize(image, 128) if solarize else image) <= 2.0
    wrong = np.zeros_like(out)
    render(PHOTO, spec, p._replace(flip=False), wrong)
    assert off(wrong, out) > 10


def test_mask_follows_its_view() -> None:
    """A white mask region painted into the image stays on the same pixels after crop, resize and flip."""
    mask = np.zeros((60, 80), np.uint8)
    mask[10:40, 15:50] = 1
    painted = np.repeat(mask[..., None] * 255, 3, -1)
    for flip in (False, True):
        cut = crop.crop_mask(mask, (5, 10, 50, 55), 32, flip)
        out = np.zeros((32, 32, 3), np.uint8)
        render(painted, View(size=32), STILL._replace(box=(5, 10, 50, 55), flip=flip, jitter=False), out)
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
    assert off(crop.evaluate(photo, 56, "byol"), TF.resize(centre, [56, 56], TF.InterpolationMode.BICUBIC)) < 6
    assert off(crop.evaluate(photo, 56, "none"), TF.resize(pil, [56, 56])) < 0.1
    assert crop.evaluate(photo[:40, :40], 40, "none") is not None
    assert np.array_equal(crop.evaluate(photo[:40, :40], 40, "none"), photo[:40, :40])
