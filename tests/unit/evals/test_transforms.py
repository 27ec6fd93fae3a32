"""The deterministic transforms of evaluations."""

from __future__ import annotations

import numpy as np
import pytest
from kit.data import picture
from PIL import Image
from pydantic import ValidationError
from torchvision import transforms as T

from scaletrain.data.errors import ImageError
from scaletrain.data.transforms import crop
from scaletrain.data.transforms.image import Pixels
from scaletrain.evals import transforms
from scaletrain.evals.features import FeatureConfig
from scaletrain.evals.transforms import Transform


def photo(height: int, width: int) -> Pixels:
    """A smooth image, in which resizing loses little."""
    y, x = np.mgrid[:height, :width]
    channels = [np.sin(x / 9) + np.cos(y / 7), np.sin((x + y) / 11), np.cos(x * y / 900)]
    return np.clip(128 + 60 * np.stack(channels, -1), 0, 255).astype(np.uint8)


def noisy(image: Pixels, severity: int, generator: np.random.Generator) -> Pixels:
    noise = generator.normal(0, 10 * severity, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transforms.CORRUPTIONS, "noise", noisy)


# --- resizing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(90, 131), (131, 90), (40, 57)])
def test_simclr_transfer_is_torchvisions(height: int, width: int) -> None:
    """Short side by bicubic interpolation, also where that enlarges, and the centre."""
    image = photo(height, width)
    plain = T.Compose([T.Resize(64, T.InterpolationMode.BICUBIC), T.CenterCrop(64)])
    expected = np.asarray(plain(Image.fromarray(image)), np.int16)
    actual = Transform(resize="simclr-transfer", size=64)(image, 0)
    assert actual.shape == (64, 64, 3)
    off = np.abs(actual.astype(np.int16) - expected)
    assert off.max() <= 2
    assert off.mean() < 0.1


def test_native_does_not_resample() -> None:
    image = photo(70, 91)
    actual = Transform(resize="native", size=64)(image, 0)
    expected = np.asarray(T.CenterCrop(64)(Image.fromarray(image)))
    assert np.array_equal(actual, expected)
    with pytest.raises(ImageError, match="91 x 70 pixels are less than the 71 of a native crop"):
        Transform(resize="native", size=71)(image, 0)


@pytest.mark.parametrize("resize", crop.PROTOCOLS)
def test_a_border_is_cut_before_the_resize(resize: transforms.Resize) -> None:
    inner = photo(70, 91)
    framed = np.pad(inner, ((2, 2), (2, 2), (0, 0)), constant_values=255)
    plain = Transform(resize=resize, size=64)
    assert np.array_equal(plain.model_copy(update={"border": 2})(framed, 0), plain(inner, 0))
    if resize != "native":  # which takes the same centre of both
        assert not np.array_equal(plain(framed, 0), plain(inner, 0))


def test_a_border_of_the_whole_image_is_refused() -> None:
    with pytest.raises(ImageError, match="8 x 20 pixels: nothing is left without a border of 4"):
        Transform(resize="none", size=8, border=4)(picture(0, 20, 8), 0)


# --- corruptions ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("noise")
def test_a_corruption_depends_on_the_sample_alone() -> None:
    """And on its kind, severity and seed; never on what was drawn before."""
    image = photo(64, 64)
    one = Transform(resize="none", size=32, corruption="noise", severity=1)
    first = one(image, 5)
    one(image, 6)
    assert np.array_equal(first, one(image, 5))

    others = [
        one(image, 6),
        one.model_copy(update={"severity": 2})(image, 5),
        one.model_copy(update={"seed": 1})(image, 5),
        Transform(resize="none", size=32)(image, 5),
    ]
    assert not any(np.array_equal(first, other) for other in others)


@pytest.mark.usefixtures("noise")
def test_a_corruption_is_of_the_resized_image() -> None:
    image = photo(32, 32)
    seen = []
    transforms.CORRUPTIONS["noise"] = lambda image, *_: seen.append(image.copy()) or image * 0
    actual = Transform(resize="byol", size=24, corruption="noise", severity=3)(image, 0)
    assert np.array_equal(seen[0], Transform(resize="byol", size=24)(image, 0))
    assert not actual.any()


def test_what_is_no_corruption_is_refused() -> None:
    for model, options in (
        (Transform, {"resize": "tv", "size": 32}),
        (FeatureConfig, {}),
    ):
        with pytest.raises(ValidationError, match="unknown corruption 'fog'; available: none"):
            model(**options, corruption="fog", severity=1)
        for half in ({"severity": 1}, {"corruption": "fog"}):
            with pytest.raises(ValidationError, match="a corruption needs a severity of 1 to 5"):
                model(**options, **half)


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("noise")
def test_every_option_changes_the_digest() -> None:
    changes = {
        "resize": "tv",
        "size": 31,
        "border": 1,
        "corruption": "other",
        "severity": 4,
        "seed": 1,
    }
    one = Transform(resize="byol", size=32, corruption="noise", severity=3)
    assert set(changes) == set(Transform.model_fields)
    others = [one.model_copy(update={name: value}).digest for name, value in changes.items()]
    assert len({one.digest, *others}) == 7
    assert one.digest == Transform(resize="byol", size=32, corruption="noise", severity=3).digest


def test_the_protocols_are_the_ones_that_are_known() -> None:
    assert set(crop.PROTOCOLS) == set(transforms.Resize.__args__)
    with pytest.raises(ValueError, match="'five'; known: tv, byol, simclr-transfer, native, none"):
        crop.evaluate(photo(9, 9), 8, "five")
