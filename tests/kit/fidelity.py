"""Images, views by torchvision alone, and distances between two renderings."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from kit.data import picture
from scaletrain.config.schema import View
from scaletrain.data.loading.dataset import sample_keys
from scaletrain.data.transforms import color
from scaletrain.data.transforms.params import Params, draw, uniforms

MODES = {"bilinear": TF.InterpolationMode.BILINEAR, "bicubic": TF.InterpolationMode.BICUBIC}


def photo() -> np.ndarray:
    """Blobs, edges, texture and flat parts with the muted colours of photographs, [180, 230, 3]."""
    rng = np.random.default_rng(3)
    coarse = cv2.resize(
        rng.random((8, 10, 3)).astype(np.float32), (230, 180), interpolation=cv2.INTER_CUBIC
    )
    gray = cv2.resize(
        rng.random((30, 40, 1)).astype(np.float32), (230, 180), interpolation=cv2.INTER_LINEAR
    )[..., None]
    image = 0.35 * coarse + 0.45 * gray + 0.08 * rng.standard_normal((180, 230, 1))
    image[60:120, 80:160] = image[60:120, 80:160] * 0.3 + 0.5
    image[:30, :40] = (0.2, 0.2, 0.2)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


NOISE = np.random.default_rng(0).integers(0, 256, (90, 110, 3), dtype=np.uint8)


IMAGES = {
    "photo": photo(),
    "saturated": picture(5, 150, 200),
    "noise": NOISE,
    "gray": np.repeat(photo()[..., :1], 3, -1),
}


def errors(ours: np.ndarray, theirs: object) -> tuple[float, float, float]:
    """Mean absolute difference, bias and 99th percentile in gray levels."""
    difference = np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)
    return (
        float(np.abs(difference).mean()),
        float(abs(difference.mean())),
        float(np.percentile(np.abs(difference), 99)),
    )


def close(
    ours: np.ndarray, theirs: object, mean: float = 2.0, bias: float = 0.5, worst: float = 6.0
) -> None:
    found = errors(ours, theirs)
    assert np.all(np.array(found) <= (mean, bias, worst)), found


def done(image: np.ndarray, **change: object) -> np.ndarray:
    out = np.empty_like(image)
    before = image.copy()
    color.apply(image, color.PLAIN._replace(**change), out)  # type: ignore[arg-type]
    assert np.array_equal(image, before)
    return out


def pillow(image: np.ndarray, spec: View, p: Params) -> np.ndarray:
    """The same view by torchvision alone; the blur is its own on tensors, with a kernel that
    reaches as far as any here.
    """
    steps = (
        lambda x: TF.adjust_brightness(x, p.brightness),
        lambda x: TF.adjust_contrast(x, p.contrast),
        lambda x: TF.adjust_saturation(x, p.saturation),
        lambda x: TF.adjust_hue(x, p.hue),
    )
    x = TF.resized_crop(
        Image.fromarray(image), *p.box, [spec.size, spec.size], MODES[spec.interpolation]
    )
    for i in p.order if p.jitter else ():
        x = steps[i](x)
    if p.gray:
        x = TF.rgb_to_grayscale(x, 3)
    if p.sigma:
        x = TF.to_pil_image(TF.gaussian_blur(TF.pil_to_tensor(x), 23, p.sigma))
    if p.solarize:
        x = TF.solarize(x, 128)
    return np.asarray(TF.hflip(x) if p.flip else x)


def drawn(n: int, spec: View, height: int, width: int) -> list[Params]:
    return [
        draw(spec, u[0], height, width) for u in uniforms(sample_keys(11, 0, torch.arange(n)), 1)
    ]
