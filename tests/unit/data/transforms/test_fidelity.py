"""The fidelity gate: what the fast kernels make of an image against torchvision on Pillow images
with the same parameters.

benchmarks/loader.py runs this file first and voids its figures if it is red.
"""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from kit.data import picture
from kit.fidelity import IMAGES, MODES, NOISE, close, done, drawn, errors, photo, pillow
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as TF

from scaletrain.config.schema import View
from scaletrain.data.loading.dataset import render
from scaletrain.data.transforms import color, crop, on_device
from scaletrain.data.transforms.params import ORDERS, packed

# --- operations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("factor", [0.0, 0.37, 0.9, 1.0, 1.31, 2.0])
def test_blends_are_pillows_to_the_last_bit(name: str, factor: float) -> None:
    image, pil = IMAGES[name], Image.fromarray(IMAGES[name])
    for key, theirs in (
        ("brightness", TF.adjust_brightness),
        ("contrast", TF.adjust_contrast),
        ("saturation", TF.adjust_saturation),
    ):
        assert np.array_equal(done(image, jitter=True, **{key: factor}), theirs(pil, factor)), key


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.021, 0.004, 0.05, 0.1, 0.31, 0.5])
def test_hue_is_pillows(name: str, turns: float) -> None:
    """Exact but where float32 and Pillow's float64 fall on two sides of a whole number: at most 1 %
    of the pixels.
    """
    image = IMAGES[name]
    theirs = np.asarray(TF.adjust_hue(Image.fromarray(image), turns))
    ours = done(image, jitter=True, hue=turns)
    close(ours, theirs, mean=0.05, bias=0.05, worst=1.0)
    assert (ours != theirs).mean() < 0.01


@pytest.mark.parametrize("name", IMAGES)
def test_gray_solarize_and_flip_are_pillows_to_the_last_bit(name: str) -> None:
    image, pil = IMAGES[name], Image.fromarray(IMAGES[name])
    assert np.array_equal(done(image, gray=True), TF.rgb_to_grayscale(pil, 3))
    assert np.array_equal(done(image, solarize=True), TF.solarize(pil, 128))
    assert np.array_equal(done(image, flip=True), TF.hflip(pil))
    assert np.array_equal(done(image), image)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("sigma", [0.15, 0.3, 0.5, 0.77, 1.0, 1.5, 2.0, 2.6])
def test_blur_is_torchvisions(name: str, sigma: float) -> None:
    theirs = (
        TF.gaussian_blur(torch.from_numpy(IMAGES[name]).permute(2, 0, 1), 23, sigma)
        .permute(1, 2, 0)
        .numpy()
    )
    # weights of 8 bits down the columns: up to half a level on average
    close(done(IMAGES[name], sigma=sigma), theirs, mean=0.5, bias=0.1, worst=2.0)


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0, 3.0])
def test_blur_has_its_sigma_in_both_directions(sigma: float) -> None:
    """Below 1 a sampled Gaussian is narrower than its sigma."""
    line = np.zeros((41, 41, 3), np.uint8)
    line[20] = 255
    for image, profile in ((line, np.s_[:, 20, 0]), (line.swapaxes(0, 1).copy(), np.s_[20, :, 0])):
        curve = done(image, sigma=sigma)[profile].astype(float)
        spread = np.sqrt((curve * (np.arange(41) - 20) ** 2).sum() / curve.sum())
        assert abs(spread / sigma - 1) < 0.05


def test_blur_keeps_black_and_white_and_narrow_ones_do_nothing() -> None:
    for level in (0, 1, 254, 255):
        for sigma in (0.2, 0.7, 1.3, 2.0, 5.0):
            assert (done(np.full((30, 40, 3), level, np.uint8), sigma=sigma) == level).all()
    assert np.array_equal(done(NOISE, sigma=0.05), NOISE)
    assert done(NOISE[:8, :9].copy(), sigma=6.0).shape == (
        8,
        9,
        3,
    )  # the kernel would be wider than the image
    both = done(NOISE, sigma=1.0, solarize=True)  # solarize comes after the blur
    assert np.array_equal(both, TF.solarize(Image.fromarray(done(NOISE, sigma=1.0)), 128))


# --- geometry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize(
    ("box", "size"), [((10, 20, 130, 150), 32), ((3, 5, 90, 64), 96), ((40, 40, 9, 12), 32)]
)
def test_antialiased_crop_is_pillows(
    interpolation: str, box: tuple[int, int, int, int], size: int
) -> None:
    for image in (IMAGES["photo"], IMAGES["saturated"]):
        theirs = TF.resized_crop(Image.fromarray(image), *box, [size, size], MODES[interpolation])
        ours = crop.crop(image, box, size, interpolation, antialias=True)
        assert ours.flags.c_contiguous
        close(ours, theirs, mean=0.1, bias=0.05, worst=1.0)


@pytest.mark.parametrize("interpolation", MODES)
def test_plain_crop_is_torchs_without_antialias(interpolation: str) -> None:
    image = IMAGES["saturated"]
    x = torch.from_numpy(image).permute(2, 0, 1)[None, :, 10:140, 20:170].float()
    theirs = (
        torch.nn.functional.interpolate(x, (32, 32), mode=interpolation)
        .clamp(0, 255)[0]
        .permute(1, 2, 0)
    )
    close(
        crop.crop(image, (10, 20, 130, 150), 32, interpolation, antialias=False),
        theirs.round().numpy(),
        mean=0.5,
    )
    assert (
        errors(
            crop.crop(image, (10, 20, 130, 150), 32, interpolation, antialias=True),
            theirs.round().numpy(),
        )[0]
        > 2
    )


def tensorflow(x: np.ndarray, side: int) -> np.ndarray:
    """tf.image.resize(x, (side, side), BICUBIC): resize_bicubic_op.cc, half_pixel_centers, with its
    table of 1024 offsets.

    GetWeightsAndIndices gives neighbours outside the image no weight and divides by the sum of the
    others.
    """

    def one_axis(x: np.ndarray) -> np.ndarray:
        rows = []
        for out in range(side):
            where = (out + 0.5) * len(x) / side - 0.5
            base = int(np.floor(where))
            offset = round((where - base) * 1024) / 1024
            total, weights = np.zeros(x.shape[1:]), 0.0
            for k in (-1, 0, 1, 2):
                t = abs(k - offset)
                a = -0.5
                near, far = (
                    ((a + 2) * t - (a + 3)) * t * t + 1,
                    ((a * t - 5 * a) * t + 8 * a) * t - 4 * a,
                )
                if 0 <= base + k < len(x):
                    total = total + (near if t <= 1 else far) * x[base + k]
                    weights += near if t <= 1 else far
            rows.append(total / weights)
        return np.stack(rows)

    return one_axis(one_axis(x.astype(float)).swapaxes(0, 1)).swapaxes(0, 1).clip(0, 255)


@pytest.mark.parametrize("name", ["photo", "noise"])
@pytest.mark.parametrize(
    "box", [(0, 0, 90, 110), (5, 7, 80, 70), (30, 40, 20, 33), (60, 60, 1, 2), (89, 0, 1, 110)]
)
@pytest.mark.parametrize("size", [8, 37, 48])
def test_keys_is_tensorflows_bicubic(name: str, box: tuple[int, int, int, int], size: int) -> None:
    image = IMAGES[name]
    top, left, height, width = box
    theirs = tensorflow(image[top : top + height, left : left + width], size)
    ours = crop.crop(image, box, size, "keys", antialias=False)
    assert np.abs(ours - theirs).max() < 0.9  # half a level of rounding and TensorFlow's table
    assert np.abs(ours - theirs).mean() < 0.3
    if min(height, width) > 2 * size:
        assert (
            errors(crop.crop(image, box, size, "bicubic", antialias=False), theirs.round())[0] > 0.5
        )  # a = -.75
        assert errors(crop.crop(image, box, size, "bicubic", antialias=True), theirs.round())[0] > 2


def test_antialiased_modes_do_not_alias_a_zone_plate() -> None:
    """Rings whose frequency grows to Nyquist at the edge; at a quarter of the size the outer ones
    must become gray.
    """
    y, x = np.mgrid[-200:200, -200:200]
    plate = np.repeat(
        (127.5 + 127.5 * np.cos(np.pi * (x * x + y * y) / 400))[..., None], 3, -1
    ).astype(np.uint8)
    yy, xx = np.mgrid[-49.5:50, -49.5:50]
    beyond = (np.hypot(xx, yy) > 25) & (
        np.hypot(xx, yy) < 48
    )  # twice the new Nyquist frequency and more
    for interpolation in MODES:
        ours = crop.crop(plate, (0, 0, 400, 400), 100, interpolation, antialias=True)
        close(
            ours,
            TF.resize(Image.fromarray(plate), [100, 100], MODES[interpolation]),
            mean=0.1,
            worst=1.0,
        )
        assert ours[beyond].std() < 8
    for interpolation in (*MODES, "keys"):
        assert (
            crop.crop(plate, (0, 0, 400, 400), 100, interpolation, antialias=False)[beyond].std()
            > 25
        )


@pytest.mark.parametrize(
    ("height", "width", "area"),
    [(300, 450, (0.08, 1.0)), (375, 500, (0.05, 0.14)), (500, 333, (0.14, 1.0))],
)
def test_ten_thousand_boxes_are_distributed_as_torchvisions(
    height: int, width: int, area: tuple[float, float]
) -> None:
    spec = View(scale=area)
    torch.manual_seed(0)
    empty = torch.empty(3, height, width)
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(empty, spec.scale, spec.ratio)
            for _ in range(10_000)
        ]
    )
    ours = np.array([p.box for p in drawn(10_000, spec, height, width)])
    for value in (
        lambda x: x[:, 2] * x[:, 3],
        lambda x: x[:, 3] / x[:, 2],
        *(lambda x, i=i: x[:, i] for i in range(4)),
    ):
        assert stats.ks_2samp(value(ours), value(theirs)).pvalue > 0.01
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width


def whole_then_centre(image: np.ndarray, size: int) -> np.ndarray:
    """torchvision's evaluation: Resize(256 / 224 of the size), CenterCrop(size)."""
    height, width = image.shape[:2]
    side, short = round(size * 256 / 224), min(height, width)
    x = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    shape = (side * height // short, side * width // short)
    x = torch.nn.functional.interpolate(x, shape, mode="bilinear", antialias=True)
    return TF.center_crop(x, [size, size])[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("height", "width"), [(180, 230), (230, 180), (20, 300), (300, 20), (64, 64), (7, 500)]
)
@pytest.mark.parametrize("size", [32, 96])
def test_evaluation_views_are_torchvisions_bit_for_bit(height: int, width: int, size: int) -> None:
    image = cv2.resize(photo(), (width, height))
    assert np.array_equal(crop.evaluate(image, size, "tv"), whole_then_centre(image, size))


@pytest.mark.parametrize(("height", "width"), [(900, 3), (3, 901), (1, 600), (7, 1200), (1201, 20)])
def test_long_images_are_cut_before_they_are_enlarged(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int
) -> None:
    image = cv2.resize(picture(3, 200, 200), (width, height), interpolation=cv2.INTER_LINEAR)
    wanted = {size: whole_then_centre(image, size) for size in (32, 96)}
    tall = crop.resize(image, 32, 32, "bilinear", antialias=True)
    monkeypatch.setattr(crop, "LARGE", 1000)
    for size, true in wanted.items():
        close(crop.evaluate(image, size, "tv"), true, mean=1.5, bias=0.5, worst=16.0)
    close(
        crop.resize(image, 32, 32, "bilinear", antialias=True), tall, mean=0.5, bias=0.5, worst=1.0
    )


# --- whole views ----------------------------------------------------------------------------------

WILD = View(
    size=64,
    jitter=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    blur=0.5,
    solarize=0.3,
)


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("name", ["photo", "saturated"])
def test_whole_views_are_pillows(name: str, interpolation: str) -> None:
    image = IMAGES[name]
    spec = WILD.model_copy(update={"interpolation": interpolation})
    pairs = []
    for p in drawn(150, spec, *image.shape[:2]):
        p = p._replace(sigma=p.sigma * 3)  # of a small view: as wide as at 224
        out = np.empty((64, 64, 3), np.uint8)
        render(image, spec, p, out)
        pairs.append((out, pillow(image, spec, p)))
        if not p.solarize:  # where a level decides whether a pixel is inverted, one view may be off
            close(*pairs[-1], worst=8.0)
    close(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]), mean=1.0, bias=0.25)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_the_jitter(order: tuple[int, ...]) -> None:
    p = color.PLAIN._replace(
        jitter=True, order=order, brightness=1.5, contrast=0.6, saturation=1.6, hue=-0.13, flip=True
    )
    p = p._replace(box=(20, 30, 100, 120))
    out = np.empty((64, 64, 3), np.uint8)
    render(IMAGES["photo"], View(size=64), p, out)
    theirs = pillow(IMAGES["photo"], View(size=64), p)
    close(out, theirs, mean=0.3, bias=0.1, worst=3.0)
    other = pillow(IMAGES["photo"], View(size=64), p._replace(order=order[::-1]))
    assert errors(out, other)[0] > 1.0


def test_device_executes_what_the_worker_does() -> None:
    """Equal but where float32 sums fall on two sides of a whole number, and in the blur, whose
    weights the worker rounds.
    """
    spec = WILD.model_copy(update={"size": 48})
    for image in (IMAGES["photo"], IMAGES["saturated"]):
        params = [p._replace(sigma=p.sigma * 3) for p in drawn(120, spec, *image.shape[:2])]
        cut = np.stack(
            [crop.crop(image, p.box, 48, spec.interpolation, spec.antialias) for p in params]
        )
        worker = np.empty_like(cut)
        for i, p in enumerate(params):
            color.apply(cut[i], p, worker[i])
        x = torch.from_numpy(cut).permute(0, 3, 1, 2).float()
        on_device.augment(x, torch.tensor([packed(p) for p in params]))
        device = x.permute(0, 2, 3, 1).numpy()
        assert np.array_equal(device, device.round())
        blurred = np.array([p.sigma > 0 for p in params])
        close(device[~blurred], worker[~blurred], mean=0.02, bias=0.01, worst=0.0)
        close(device[blurred], worker[blurred], mean=0.5, bias=0.1, worst=2.0)
        close(device, worker, mean=0.25, bias=0.1, worst=2.0)
