"""Images of every kind become the pixels that a viewer shows; hostile ones are refused, and cost
little memory and time.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from kit.data import encode, picture
from PIL import Image

from scaletrain.data.errors import ImageError
from scaletrain.data.transforms import image

LIMIT = 50_000_000  # the default of data.max_pixels


def saved(pixels: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    pixels.save(file, form, **options)
    return file.getvalue()


SMOOTH = Image.fromarray(picture(3, 48, 64))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright_by_exif(form: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(
        SMOOTH,
        form,
        exif=exif,
        **({"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}),
    )
    with Image.open(io.BytesIO(data)) as picture_file:
        wanted = np.asarray(ImageOps.exif_transpose(picture_file).convert("RGB")).astype(int)
    found = image.decode(data, LIMIT)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).mean() < 1
    assert image.upright(data, "RGB").size == wanted.shape[1::-1]


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("L", "JPEG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
    ],
)
def test_other_colour_modes_equal_pillows_rgb(mode: str, form: str) -> None:
    data = saved(SMOOTH.convert(mode), form, **({"lossless": True} if form == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as again:
        wanted = np.asarray(again.convert("RGB")).astype(int)
    assert np.abs(image.decode(data, LIMIT) - wanted).max() <= 1


def test_cmyk_is_the_picture_and_not_its_negative() -> None:
    found = image.decode(saved(SMOOTH.convert("CMYK"), "JPEG", quality=95), LIMIT)
    assert np.abs(found.astype(int) - np.asarray(SMOOTH)).mean() < 12


def test_sixteen_bits_keep_the_upper_byte() -> None:
    deep = (np.arange(48 * 64).reshape(48, 64) * 21).astype(np.uint16)
    data = bytes(cv2.imencode(".png", deep)[1])
    assert np.array_equal(image.decode(data, LIMIT), np.repeat((deep >> 8)[..., None], 3, 2))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(form: str) -> None:
    others = [Image.fromarray(picture(n, 48, 64)) for n in range(5)]
    data = saved(SMOOTH, form, save_all=True, append_images=others, lossless=True)
    assert np.array_equal(image.decode(data, LIMIT), np.asarray(SMOOTH))


def test_cut_images_are_read_only_where_all_pixels_are_there(
    capfd: pytest.CaptureFixture[str],
) -> None:
    png, jpeg, webp = (encode(np.asarray(SMOOTH), s) for s in (".png", ".jpg", ".webp"))
    assert np.array_equal(
        image.decode(png[:-12], LIMIT), np.asarray(SMOOTH)
    )  # without its IEND chunk
    whole = image.decode(jpeg, LIMIT)
    assert np.array_equal(image.decode(jpeg + b"\0" * 3000, LIMIT), whole)
    for cut in (
        png[: len(png) // 2],
        jpeg[: len(jpeg) // 2],
        jpeg[:-40],
        webp[: len(webp) // 2],
        webp[:-20],
    ):
        with pytest.raises(ImageError, match="the image is damaged"):
            image.decode(cut, LIMIT)
    capfd.readouterr()


def test_gray_filling_of_older_opencv_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = encode(np.asarray(SMOOTH), ".jpg")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.full((48, 64, 3), 128, np.uint8))
    assert image.decode(jpeg, LIMIT).max() == 128
    with pytest.raises(ImageError, match="truncated"):
        image.decode(jpeg[:-40], LIMIT)


def test_an_endless_progressive_jpeg_is_refused() -> None:
    data = saved(Image.fromarray(picture(1, 64, 64)), "JPEG", progressive=True)
    assert image.decode(data, LIMIT).shape == (64, 64, 3)
    at = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="more than 500 scans"):
        image.decode(data[:at] + data[at:-2] * 600 + b"\xff\xd9", LIMIT)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *between: bytes, colour: int = 2) -> bytes:
    rows = zlib.compress(bytes(1 << 20), 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(between) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


BOMBS = """
import resource, sys, pathlib
import numpy as np
from scaletrain.data.transforms import crop, image, maps
from scaletrain.data.errors import ImageError
image.decode(pathlib.Path(sys.argv[1]).read_bytes(), 10**6)  # loads the decoders
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[2:]:
    classes = lambda data, limit: maps.decode(data, "classes", limit)
    for decode in (image.decode, image.strict, classes):
        try:
            decode(pathlib.Path(name).read_bytes(), 50_000_000)
        except ImageError:
            pass
draw = np.random.default_rng(0)
for height, width in ((12000, 1), (1, 12000), (65000, 3), (3, 65000), (131072, 2)):
    pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    for protocol in ("tv", "byol", "none"):
        assert crop.evaluate(pixels, 224, protocol).shape == (224, 224, 3)
    for kind in ("bilinear", "bicubic"):
        for antialias in (False, True):
            cut = crop.crop(pixels, (0, 0, height, width), 224, kind, antialias)
            assert cut.shape == (224, 224, 3)
    maps.view(pixels[..., 0], "foreground", (0, 0, height, width), 224, flip=True)
    image.shrink(pixels, 1) if min(height, width) > 1 else None
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_take_little_memory(tmp_path: Path) -> None:
    text = zlib.compress(bytes(400 << 20), 9)
    webp = bytearray(saved(SMOOTH, "WEBP", lossless=True, exif=b"Exif\0\0" + bytes(20)))
    webp[24:30] = b"\0" * 6  # a canvas of one pixel around a larger frame
    jpeg = bytearray(encode(np.asarray(SMOOTH), ".jpg"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 20_000, 20_000)
    bombs = {
        "header": png(20_000, 20_000),
        "rows": png(7_000, 7_000),
        "wide": png(49_000_000, 1),
        "zTXt": png(30, 24, chunk(b"zTXt", b"c\0\0" + text)),
        "iTXt": png(30, 24, chunk(b"iTXt", b"c\0\1\0\0\0" + text)),
        "iCCP": png(30, 24, chunk(b"iCCP", b"c\0\0" + text)),
        "many": png(30, 24, *[chunk(b"zTXt", b"c%d\0\0" % i + text[:400_000]) for i in range(40)]),
        "jpeg": bytes(jpeg),
        "webp": bytes(webp),
    }
    (tmp_path / "good").write_bytes(encode(picture(1)))
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", BOMBS, tmp_path / "good", *(tmp_path / name for name in bombs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) <= 400, (
        done.stderr
    )  # 7,000 x 7,000 pixels, twice, are allowed; the rest is not


def test_large_texts_and_profiles_of_a_png_harm_nothing() -> None:
    whole = encode(np.asarray(SMOOTH))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = saved(SMOOTH, "PNG", exif=exif)
    for data, wanted in ((whole, np.asarray(SMOOTH)), (upright, np.rot90(np.asarray(SMOOTH), -1))):
        for extra in (
            chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(2_000_000))),
            chunk(b"iTXt", b"c\0\1\0\0\0" + zlib.compress(bytes(2_000_000))),
            chunk(b"iCCP", b"c\0\0" + zlib.compress(bytes(3_000_000))),
            chunk(b"tEXt", b"c\0" + b"x" * 2_000_000),
        ):
            for at in (33, len(data) - 12):  # before the pixels, and behind them
                found = data[:at] + extra + data[at:]
                assert np.array_equal(image.strict(found, LIMIT), wanted)
                assert np.array_equal(image.decode(found, LIMIT), wanted)
                assert np.array_equal(np.array(image.upright(found, "RGB")), wanted)
                damaged = bytearray(found)
                damaged[found.index(b"IDAT") + 30] ^= 0xFF
                with pytest.raises(ImageError, match="the image is damaged"):
                    image.strict(bytes(damaged), LIMIT)


def test_images_longer_than_any_photograph_are_refused() -> None:
    for width, height in ((131_073, 1), (1, 200_000)):
        with pytest.raises(
            ImageError, match=rf"{width} x {height} pixels: no side may have more than 131072"
        ):
            image.decode(png(width, height), LIMIT)
