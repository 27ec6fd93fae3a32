"""CPU seconds per source image, from tar to a batch of 4 x 224 + 2 x 96 views, compared with
lightly and albumentations on webdataset.

First the tests of fidelity run; if they fail, the figures are void. Then pairs of runs alternate,
each in a process of its own with two single-threaded loader workers. Both sides make the views of
configs/relicv2_r50_in1k.yaml with their probabilities and strengths; crops are bilinear, with
antialiasing in the comparison with lightly and without it in that with albumentations. The CPU
seconds of the main process and the workers between two batches are counted, so the start is not.
The peers return uint8, without the conversion to normalised floats that both do by default;
scaletrain returns uint8, or floats that it computes in the main process.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.rows import Row, spread
from scaletrain import dist
from scaletrain.config import load
from scaletrain.config.schema import DataConfig, View
from scaletrain.data.loading.dataset import sample_keys
from scaletrain.data.loading.loader import open_stream
from scaletrain.data.reading.reader import Shards
from scaletrain.data.transforms import color, crop, image
from scaletrain.data.transforms.params import draw, expand, uniforms

HERE = Path(__file__).parent
GATE = HERE.parent / "tests" / "unit" / "data" / "transforms" / "test_fidelity.py"
WORKERS, BATCH, WARM = 2, 32, 4
TARGETS = {
    ("lightly", False): 3.5,
    ("lightly", True): 2.5,
    ("albumentations", False): 1.2,
    ("albumentations", True): 1.0,
}


def rows(
    shards: Path, lightly: str, albumentations: str, pairs: int, batches: int
) -> Iterator[Row]:
    """A ratio for each peer and output type; nothing is measured if the tests of fidelity fail."""
    if subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(GATE)],
        cwd=HERE.parent,
        stdout=subprocess.DEVNULL,
    ).returncode:
        yield Row("views: speed", "VOID", "-", "-", "the tests of fidelity fail", "-", False)
        return

    folders = {"lightly": lightly, "albumentations": albumentations}

    def run(name: str, peer: str, floats: bool) -> float:
        command = [
            sys.executable,
            "-m",
            "benchmarks.loader",
            str(shards),
            str(batches),
            name,
            peer,
            str(int(floats)),
        ]

        path = os.pathsep.join((str(HERE.parent), folders.get(name, "")))
        env = os.environ | {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "NO_ALBUMENTATIONS_UPDATE": "1",
        }
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=env, cwd=HERE.parent
        )

        return float(done.stdout.splitlines()[-1])

    for (name, floats), target in TARGETS.items():
        measured = [(run("ours", name, floats), run(name, name, floats)) for _ in range(pairs)]
        ratios = [theirs / ours for ours, theirs in measured]
        mine, other = (
            f"{statistics.median(column) * 1e3:.2f} ms/image"
            for column in zip(*measured, strict=True)
        )
        figure = (
            "tar to 4 x 224 + 2 x 96 views, "
            f"{'ours normalised floats, theirs uint8' if floats else 'uint8'}"
        )

        yield Row(
            figure,
            mine,
            f"webdataset + {name}",
            other,
            spread(ratios),
            f"{target}",
            statistics.median(ratios) >= target,
        )


def views(antialias: bool) -> DataConfig:
    recipe = load.load(HERE.parent / "configs" / "relicv2_r50_in1k.yaml").data
    match = {"interpolation": "bilinear", "antialias": antialias}
    return recipe.model_copy(
        update={"views": tuple(view.model_copy(update=match) for view in recipe.views)}
    )


def seconds(batches: Iterable[Any], count: int) -> float:
    """CPU seconds per image of this process and its children over `count` batches, after the first
    WARM ones.
    """
    running = iter(batches)

    for _ in range(WARM):
        next(running)

    begun = cpu()
    for _ in range(count):
        next(running)

    return (cpu() - begun) / (count * BATCH)


def cpu() -> float:
    """CPU seconds that this process and its running children have used."""
    ticks = 0
    for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in child.read_text().split():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])

    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def ours(shards: Path, count: int, antialias: bool, floats: bool) -> float:
    torch.set_num_threads(1)
    dist.keep_freed_memory()  # as training does
    data = views(antialias).model_copy(
        update={"path": str(shards), "workers": WORKERS, "lanes": 8, "window": 4}
    )
    stream = open_stream(data, seed=0, batch=BATCH, rank=0, world=1, device=torch.device("cpu"))

    if not floats:
        stream._to_device = lambda raw: raw  # type: ignore[assignment]

    measured = seconds(stream.batches(0, WARM + count + 3 * WORKERS), count)
    stream.close()
    return measured


def lightly(shards: Path, count: int, antialias: bool, _: bool) -> float:
    from lightly.transforms.byol_transform import BYOLView1Transform
    from lightly.transforms.multi_view_transform import MultiViewTransform
    from torchvision import transforms as T

    def one(view: View) -> Any:
        sigma = tuple(s * view.size / 224 for s in view.sigma)
        made = BYOLView1Transform(
            view.size,
            cj_prob=view.jitter,
            gaussian_blur=view.blur,
            solarization_prob=view.solarize,
            sigmas=sigma,
        )
        parts = made.transform.transforms

        parts[0] = T.RandomResizedCrop(view.size, scale=view.scale, antialias=antialias)
        parts[-2:] = [T.PILToTensor()]
        return made

    return peer(
        shards, "pil", MultiViewTransform([one(view) for view in views(antialias).views]), count
    )


def albumentations(shards: Path, count: int, antialias: bool, _: bool) -> float:
    import albumentations as A

    def one(view: View) -> A.Compose:
        around = {
            key: (1 - getattr(view, key), 1 + getattr(view, key))
            for key in ("brightness", "contrast", "saturation")
        }
        sigma = tuple(s * view.size / 224 for s in view.sigma)
        parts = [
            A.RandomResizedCrop(
                size=(view.size, view.size),
                scale=view.scale,
                ratio=view.ratio,
                interpolation=cv2.INTER_LINEAR,
            ),
            A.HorizontalFlip(p=view.flip),
            A.ColorJitter(**around, hue=(-view.hue, view.hue), p=view.jitter),
            A.ToGray(p=view.grayscale),
            A.GaussianBlur(blur_limit=0, sigma_limit=sigma, p=view.blur),
            A.Solarize(threshold_range=(0.5, 0.5), p=view.solarize),
        ]

        return A.Compose(parts)

    made = [one(view) for view in views(antialias).views]
    return peer(shards, _rgb, lambda x: [one(image=x)["image"] for one in made], count)


def _rgb(key: str, data: bytes) -> Any:
    return (
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if key.endswith(("jpg", "jpeg"))
        else None
    )


def peer(shards: Path, decode: Any, transform: Callable[[Any], Any], count: int) -> float:
    import webdataset

    urls = sorted(map(str, shards.glob("*.tar")))
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).repeat()
    data = data.decode(decode).to_tuple("jpg;jpeg", "cls").map_tuple(transform, lambda label: label)
    return seconds(
        torch.utils.data.DataLoader(
            data, batch_size=BATCH, num_workers=WORKERS, worker_init_fn=_one_thread
        ),
        count,
    )


def _one_thread(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def stages(shards: Path, antialias: bool, count: int = 200) -> str:
    """CPU milliseconds of each stage, compared with the floor, which is decoding and resizing."""
    _one_thread(0)
    groups, reader = expand(views(antialias).views), Shards(str(shards))
    specs = [view for group in groups for view in group]
    outs = [np.empty((view.size, view.size, 3), np.uint8) for view in specs]
    draws = uniforms(sample_keys(0, 0, torch.arange(count)), len(specs))

    color.prepare()
    spent: dict[str, float] = {}

    def timed(stage: str, work: Iterator[Any]) -> list[Any]:
        begun = time.process_time()
        made = list(work)
        spent[stage] = spent.get(stage, 0.0) + time.process_time() - begun
        return made

    for sample in range(count):
        (found,) = timed("read", (reader.read(s) for s in (sample % len(reader),)))
        (pixels,) = timed("decode", (image.decode(data, 10**8) for data in (found.image,)))
        params = timed(
            "draw",
            (draw(s, u, *pixels.shape[:2]) for s, u in zip(specs, draws[sample], strict=True)),
        )
        each = list(zip(specs, params, strict=True))
        cuts = timed(
            "resize",
            (crop.crop(pixels, p.box, s.size, s.interpolation, s.antialias) for s, p in each),
        )

        sharp = list(zip(cuts, params, outs, strict=True))
        timed(
            "jitter and flip",
            (
                color.apply(cut, p._replace(sigma=0.0, solarize=False), out)  # type: ignore[func-returns-value]
                for cut, p, out in sharp
            ),
        )
        blurs = [
            (out, color.PLAIN._replace(sigma=p.sigma, solarize=p.solarize))
            for out, p in zip(outs, params, strict=True)
        ]

        timed(
            "blur and solarize",
            (
                color.apply(out.copy(), p, out)  # type: ignore[func-returns-value]
                for out, p in blurs
                if p.sigma or p.solarize
            ),
        )

    floor = (spent["decode"] + spent["resize"]) * 1e3 / count
    total = sum(spent.values()) * 1e3 / count
    parts = ", ".join(f"{stage} {value * 1e3 / count:.2f}" for stage, value in spent.items())
    return f"{parts}; sum {total:.2f} = {total / floor:.2f} x the floor of {floor:.2f}"


SIDES: dict[str, Callable[[Path, int, bool, bool], float]] = {
    "ours": ours,
    "lightly": lightly,
    "albumentations": albumentations,
}

if __name__ == "__main__":
    folder, measured_batches, side, against, as_floats = sys.argv[1:]
    print(SIDES[side](Path(folder), int(measured_batches), against == "lightly", as_floats == "1"))
