"""Decodes and encodes images. The size is read from the header first, so that decompression bombs
are refused before decoding.

The functions raise ImageError, to which the caller adds where the bytes come from.
"""

from __future__ import annotations

import io
import struct
from contextlib import suppress

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from scaletrain.data.errors import ImageError

Pixels = NDArray[np.uint8]  # [H, W, 3] RGB
# most pixels of a side, since tables for resizing grow with it; JPEG and WebP allow 65,535
MAX_SIDE = 1 << 17
# most scans of a progressive JPEG; encoders write about ten, and each one updates every pixel
SCANS = 500
# bytes in which the end of a JPEG is searched: some cameras append a few bytes
TAIL = 4096
# chunks of a PNG with text, which Pillow decompresses and refuses above 1 MB
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def kind(data: bytes) -> str:
    """The format by the first bytes, whatever the name: "jpg", "png" or "webp", "" for others."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"

    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def size(data: bytes) -> tuple[int, int]:
    """Height and width from the header, or (0, 0) if there is no valid header."""
    try:
        match kind(data):
            case "jpg":
                return _jpeg(data)
            case "png":
                width, height = struct.unpack(">II", data[16:24])
                return height, width
            case "webp":
                return _webp(data)
    except (struct.error, IndexError):
        pass

    return 0, 0


def decode(data: bytes, max_pixels: int) -> Pixels:
    """Decode an image to RGB pixels, rotated by its EXIF orientation (which torchvision ignores);
    of an animation, the first frame.

    Gray, palette, CMYK and 16-bit images become 8-bit RGB (the upper byte); alpha is dropped.
    Damaged files are read if Pillow considers them complete, such as a PNG without its end.
    """
    check(data, max_pixels)

    return _decode(data, cv2.IMREAD_COLOR_RGB)


def grey(data: bytes) -> NDArray[np.uint8]:
    """Decode a checked image to the grey values of its colours, [H, W], as `decode` does."""
    return _decode(data, cv2.IMREAD_GRAYSCALE)


def check(data: bytes, max_pixels: int) -> None:
    """Raise ImageError for what is no image, or takes too much memory or time to decode."""
    height, width = size(data)
    if height * width == 0:
        raise ImageError("not a JPEG, PNG or WebP image")
    if height * width > max_pixels:
        raise ImageError(f"{width} x {height} pixels are more than data.max_pixels={max_pixels}")
    if max(height, width) > MAX_SIDE:
        raise ImageError(f"{width} x {height} pixels: no side may have more than {MAX_SIDE}")


def strict(data: bytes, max_pixels: int) -> Pixels:
    """As `decode`, but also raises ImageError for files that Pillow cannot read."""
    check(data, max_pixels)
    upright(data, "RGB")
    return _decode(data, cv2.IMREAD_COLOR_RGB)


def _decode(data: bytes, flags: int) -> Pixels:
    # OpenCV before 5 silently fills the missing part of a truncated JPEG with gray; a complete file
    # ends with this marker
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" in data[-TAIL:]:
        with suppress(cv2.error):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
            if pixels is not None:
                return pixels  # type: ignore[return-value]

    return np.array(upright(data, "L" if flags == cv2.IMREAD_GRAYSCALE else "RGB"))


def upright(data: bytes, mode: str = "") -> Image.Image:
    """Decode a checked image with Pillow, which is slower than OpenCV but reports faults, to the
    mode or as it is stored; rotated by its EXIF orientation. Raises ImageError.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
            return turned.convert(mode) if mode else turned
    except Exception as error:  # Pillow raises many types for damaged files
        if kind(data) == "png" and len(plain := _without_texts(data)) < len(data):
            return upright(plain, mode)
        raise ImageError(f"the image is damaged ({error})") from None


def _without_texts(data: bytes) -> bytes:
    """A PNG without the chunks of text, which do not affect its pixels and may have any size (PNG
    specification, 5.3 and 11.3).
    """
    kept, at = [data[:8]], 8

    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in TEXTS:
            kept.append(data[at:end])
        at = end

    return b"".join([*kept, data[at:]])


def _jpeg(data: bytes) -> tuple[int, int]:
    """Height and width from the frame header SOFn (ITU T.81, B.1.1.3 and B.2.2)."""
    at = 2
    while True:
        # fill bytes
        while data[at] == 0xFF and data[at + 1] == 0xFF:
            at += 1

        if data[at] != 0xFF:
            return 0, 0

        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            if marker & 3 == 2 and data.count(b"\xff\xda") > SCANS:
                raise ImageError(
                    f"a progressive JPEG of more than {SCANS} scans, each of which is decoded in "
                    "full"
                )

            return height, width

        if marker in (0xD9, 0xDA):
            return 0, 0

        at += (
            2
            if marker == 0x01 or 0xD0 <= marker <= 0xD8
            else 2 + struct.unpack_from(">H", data, at + 2)[0]
        )


def _webp(data: bytes) -> tuple[int, int]:
    """Height and width of the canvas or of the only frame (RFC 9649, sections 2.5 to 2.7)."""
    match data[12:16]:
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return height & 0x3FFF, width & 0x3FFF
        case b"VP8L":
            bits = struct.unpack_from("<I", data, 21)[0]
            return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
        case b"VP8X":
            width, height = (
                int.from_bytes(data[24:27], "little"),
                int.from_bytes(data[27:30], "little"),
            )
            return height + 1, width + 1

    return 0, 0


def png(pixels: Pixels) -> bytes:
    """Encode [H, W] gray or [H, W, 3] RGB pixels as PNG."""
    bgr = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".png", bgr)[1])


def jpeg(pixels: Pixels, quality: int) -> bytes:
    """Encode [H, W, 3] RGB pixels as JPEG; `quality` in 1 .. 100."""
    try:
        return bytes(
            cv2.imencode(
                ".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
            )[1]
        )
    except cv2.error as error:
        raise ImageError(f"the image cannot be written as JPEG ({error.err})") from None


def shrink(pixels: Pixels, side: int) -> Pixels:
    """Reduce [H, W, 3], H and W above `side`, so that the short side is `side`. Area averages are
    antialiased (as in FFCV's writer).
    """
    height, width = pixels.shape[:2]
    scale = side / min(height, width)

    return cv2.resize(
        pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA
    )  # type: ignore[return-value]
