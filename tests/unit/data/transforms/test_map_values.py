"""Maps: the values that a file stands for by kind, and the same geometry as the views, also where
these extend beyond the image.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from kit.data import encode, picture
from PIL import Image

from scaletrain import rng
from scaletrain.config.schema import View
from scaletrain.data.errors import ImageError
from scaletrain.data.loading.dataset import render
from scaletrain.data.transforms import color, maps
from scaletrain.data.transforms.params import draw, uniforms

LIMIT = 10**6
WIDE = View(size=48, scale=(0.3, 6.0), interpolation="bilinear", antialias=False)
NUMBERS = np.random.default_rng(0).integers(0, 256, (24, 30), dtype=np.uint8)


def saved(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def palette(numbers: np.ndarray, colours: int = 256) -> bytes:
    """A PNG of 8 bits, in whose palette the colours are not the numbers."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = numbers.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    values = bytes(value for n in range(colours) for value in (255 - n, n // 2, 7))
    rows = b"".join(b"\0" + row.tobytes() for row in numbers)
    chunks = ((b"IHDR", head), (b"PLTE", values), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks)


VOID_TOO = np.where(NUMBERS > 200, 255, NUMBERS % 5).astype(np.uint8)


@pytest.mark.parametrize(
    ("data", "numbers"),
    [
        (encode(NUMBERS), NUMBERS),
        (palette(NUMBERS), NUMBERS),
        # void has no colour in a palette of 5
        (palette(VOID_TOO, 5), VOID_TOO),
    ],
    ids=["grey", "palette", "short palette"],
)
def test_class_numbers_are_grey_values_or_places_in_the_palette(
    data: bytes, numbers: np.ndarray
) -> None:
    assert np.array_equal(maps.decode(data, "classes", LIMIT), numbers)
    # a third: the middle of three pixels
    small = maps.shrink(data, 8)
    assert np.array_equal(maps.decode(small, "classes", LIMIT), numbers[1::3, 1::3])
    for kind in ("foreground", "grey"):
        whole, part = (maps.decode(file, kind, LIMIT) for file in (data, small))
        assert np.array_equal(part, whole[1::3, 1::3])


def test_a_map_of_few_bits_of_grey_is_not_resized() -> None:
    four = bytearray(encode(NUMBERS))
    four[24] = 4
    with pytest.raises(ImageError, match="4 bits of grey cannot be resized"):
        maps.shrink(bytes(four), 8)


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (encode(NUMBERS, ".jpg"), "classes", "must be a PNG, and this is a jpg"),
        (encode(NUMBERS, ".webp"), "foreground", "must be a PNG, and this is a webp"),
        (encode(picture(0)), "classes", "has 8 bits of colour type 2"),
        (encode(NUMBERS.astype(np.uint16)), "classes", "has 16 bits of colour type 0"),
        (saved(Image.fromarray(NUMBERS > 9)), "classes", "has 1 bits of colour type 0"),
        (encode(np.zeros((2000, 2000), np.uint8)), "classes", "more than data.max_pixels"),
        (encode(NUMBERS)[:99], "classes", "the image is damaged"),
    ],
)
def test_what_has_no_certain_class_numbers_is_refused(data: bytes, kind: str, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        maps.decode(data, kind, LIMIT)


def test_values_of_the_device() -> None:
    values = torch.tensor([[[[0, 1], [51, 255]]]], dtype=torch.uint8)
    classes, grey, mask = (
        maps.on_device(x, kind)
        for x, kind in ((values, "classes"), (values, "grey"), (values.clamp(max=1), "foreground"))
    )
    assert classes.shape == grey.shape == mask.shape == (1, 1, 1, 2, 2)
    assert (classes.dtype, classes.flatten().tolist()) == (torch.int64, [0, 1, 51, 255])
    assert grey.flatten().tolist() == pytest.approx([0, 1 / 255, 0.2, 1])
    assert mask.flatten().tolist() == [0, 1, 1, 1]


def test_a_view_may_extend_beyond_the_image() -> None:
    """The image, painted with its classes, keeps its shape and lies where the map has it."""
    numbers = np.kron([[40, 120, 200], [90, 160, 250]], np.ones((30, 30))).astype(np.uint8)
    painted = np.repeat(numbers[..., None], 3, -1)
    beyond, shown, right = 0, 0, 0
    for u in uniforms(rng.hash64(0, torch.arange(60)), 1):
        p = draw(WIDE, u[0], *numbers.shape)
        top, left, height, width = p.box
        for start, length, limit in ((top, height, 60), (left, width, 90)):
            # either inside of the image on this side, or around all of it
            assert min(start, limit - start - length) >= 0 or (
                start <= 0 and start + length >= limit
            )
        assert 0.25 * 5400 < height * width < 6.1 * 5400
        out = np.empty((48, 48, 3), np.uint8)
        render(painted, WIDE, color.PLAIN._replace(box=p.box, flip=p.flip), out, (10, 20, 30))
        classes, mask, grey = (
            maps.view(values, kind, p.box, 48, p.flip)
            for values, kind in (
                (numbers, "classes"),
                ((numbers > 100).view(np.uint8), "foreground"),
                (numbers, "grey"),
            )
        )
        outside = classes == maps.VOID
        beyond += outside.any()
        assert (out[outside] == (10, 20, 30)).all()
        assert not mask[outside].any()
        assert not grey[outside].any()
        # the part of the view that the image covers, to a row and a column
        covered = (min(height, 60) / height) * (min(width, 90) / width)
        assert abs((~outside).mean() - covered) < 0.05
        # away from edges, where the filter of the view mixes two colours
        flat = ~outside & (np.ptp(_neighbours(classes), 0) == 0)
        shown += flat.sum()
        right += (flat & (out[..., 0] == classes)).sum()
        assert np.array_equal(mask[flat], (classes[flat] > 100))
        assert np.abs(grey[flat].astype(int) - classes[flat]).max() <= 1
    assert beyond > 20
    assert right / shown > 0.99


def _neighbours(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, 1, mode="edge")
    return np.stack(
        [padded[y : y + len(values), x : x + len(values)] for y in range(3) for x in range(3)]
    )


def test_a_crop_without_padding_is_what_it_was() -> None:
    """An upper bound of 1 keeps every crop inside of the image."""
    spec = View(size=16, scale=(0.05, 1.0), ratio=(0.3, 3.0))
    for u in uniforms(rng.hash64(1, torch.arange(200)), 1):
        top, left, height, width = draw(spec, u[0], 24, 90).box
        assert 0 <= top <= 24 - height
        assert 0 <= left <= 90 - width
    with pytest.raises(ValueError, match="at most 16, got 17"):
        View(scale=(0.5, 17.0))


def test_tiny_and_long_images_can_be_padded() -> None:
    for shape in ((1, 1), (1, 3000), (3000, 1)):
        for interpolation in ("bilinear", "keys"):
            spec = View(size=8, scale=(8.0, 16.0), interpolation=interpolation, antialias=False)
            for u in uniforms(rng.hash64(2, torch.arange(5)), 1):
                p = draw(spec, u[0], *shape)
                out = np.zeros((8, 8, 3), np.uint8)
                render(
                    np.full((*shape, 3), 200, np.uint8), spec, color.PLAIN._replace(box=p.box), out
                )
                assert (out == 200).any()
                inside = maps.view(np.zeros(shape, np.uint8), "classes", p.box, 8, flip=False) == 0
                assert np.array_equal(inside, out[..., 0] == 200)
