"""The stream: the same batches for any world size, any number of workers, from any step; faults
arrive as one error.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from kit.data import add, children, encode, joined, picture, write_shards

from scaletrain import rng
from scaletrain.config.schema import DataConfig, View
from scaletrain.core import Batch
from scaletrain.data.errors import DataError, ShardError
from scaletrain.data.loading.dataset import Images
from scaletrain.data.loading.loader import Stream, eval_batches, open_stream
from scaletrain.evals.transforms import Transform

CPU = torch.device("cpu")
VIEWS = (View(size=16, count=2, solarize=0.2), View(size=8, scale=(0.05, 0.14)))
MASKS = {"masks": True}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "d", (11, 3, 20, 14), masks=True)


def stream(
    folder: Path | str,
    rank: int = 0,
    world: int = 1,
    batch: int = 12,
    seed: int = 5,
    **options: object,
) -> Stream:
    data = DataConfig(
        path=str(folder),
        **{
            "lanes": 4,
            "window": 2,
            "workers": 0,
            "views": VIEWS,
            "mean": MEAN,
            "std": STD,
            **options,
        },
    )
    return open_stream(data, seed=seed, batch=batch, rank=rank, world=world, device=CPU)


def same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.index, b.index)
    assert torch.equal(a.keys, b.keys)
    assert torch.equal(a.labels, b.labels)
    for x, y in zip(a.views, b.views, strict=True):
        assert torch.equal(x, y)
    assert (a.masks is None) == (b.masks is None)
    if a.masks is not None:
        assert torch.equal(a.masks, b.masks)


def test_shapes_and_meaning(folder: Path) -> None:
    s = stream(folder, foreground=MASKS)
    assert (s.samples, s.steps_per_epoch) == (48, 4)
    batches = list(s.batches(0, 8))
    for epoch in range(2):
        numbers = torch.cat([b.index for b in batches[epoch * 4 : epoch * 4 + 4]])
        assert sorted(numbers.tolist()) == list(range(48))
    b = batches[5]
    assert [tuple(v.shape) for v in b.views] == [(2, 12, 3, 16, 16), (1, 12, 3, 8, 8)]
    assert b.masks.shape == (2, 12, 1, 16, 16)
    assert set(b.masks.unique().tolist()) <= {0.0, 1.0}
    assert b.labels.tolist() == [i % 7 for i in b.index.tolist()]
    assert torch.equal(b.keys, rng.hash64(5, 1, b.index, 0))
    for v in b.views:
        assert v.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert v.dtype == torch.float32
    assert torch.allclose(
        b.pixel_range, (torch.tensor([[0.0], [1.0]]) - torch.tensor(MEAN)) / torch.tensor(STD)
    )


def test_normalisation_is_that_of_to_tensor(folder: Path) -> None:
    s = stream(folder)
    raw = s.dataset[(0, 1)]
    wanted = (raw.views[0].double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(
        STD
    ).double()
    batch = next(iter(s.batches(1, 2)))
    assert torch.allclose(batch.views[0].double(), wanted.permute(0, 1, 4, 2, 3), atol=1e-5)
    assert raw.views[0].dtype == torch.uint8


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_world_sees_the_same_batches(folder: Path, world: int) -> None:
    whole = list(stream(folder, foreground=MASKS).batches(0, 6))
    ranks = [
        list(stream(folder, rank, world, foreground=MASKS).batches(0, 6)) for rank in range(world)
    ]
    for step in range(6):
        same(joined([r[step] for r in ranks]), whole[step])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(folder: Path, workers: int) -> None:
    one = list(stream(folder, foreground=MASKS).batches(0, 6))
    many = list(stream(folder, foreground=MASKS, workers=workers).batches(0, 6))
    for a, b in zip(one, many, strict=True):
        same(a, b)


@pytest.mark.parametrize("world", [1, 2])
def test_augmenting_on_the_device_gives_the_same_batches(folder: Path, world: int) -> None:
    """Colours and flips left to the device: alike to rounding, at any world size and in workers."""
    levels = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    (worker,) = stream(folder, **levels).batches(5, 6)
    options = {"world": world, "augment": "device", "workers": 1, **levels}
    parts = [b for r in range(world) for b in stream(folder, rank=r, **options).batches(5, 6)]
    assert torch.equal(torch.cat([p.keys for p in parts]), worker.keys)
    for size, views in enumerate(worker.views):
        device = torch.cat([p.views[size] for p in parts], 1)
        assert parts[0].views[size].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert (device - views).abs().mean() < 0.5
        assert (device.flip(-1) - views).abs().mean() > 5


def test_resume_anywhere_gives_the_same_pixels(folder: Path) -> None:
    whole = list(stream(folder).batches(0, 9))
    for start, world, workers in ((1, 1, 0), (3, 1, 2), (4, 2, 0), (7, 3, 1)):
        ranks = [
            list(stream(folder, r, world, workers=workers).batches(start, 9)) for r in range(world)
        ]
        for offset in range(9 - start):
            parts = [r[offset] for r in ranks]
            for k, view in enumerate(whole[start + offset].views):
                assert torch.equal(torch.cat([p.views[k] for p in parts], 1), view)


def test_pixels_change_with_seed_epoch_and_view(folder: Path) -> None:
    def pixels(s: Stream, epoch: int) -> dict[int, torch.Tensor]:
        found = {}
        for b in s.batches(epoch * 4, epoch * 4 + 4):
            found.update({int(i): b.views[0][:, row] for row, i in enumerate(b.index)})
        return found

    a, b, c = (
        pixels(stream(folder), 0),
        pixels(stream(folder), 1),
        pixels(stream(folder, seed=6), 0),
    )
    assert not any(
        torch.equal(a[i], b[i]) or torch.equal(a[i], c[i]) or torch.equal(a[i][0], a[i][1])
        for i in range(48)
    )


@pytest.mark.parametrize("masks", [False, True])
def test_each_member_is_decoded_once_for_all_views(
    tmp_path: Path, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: Counter[bytes] = Counter()
    right = cv2.imdecode

    def counted(buffer: np.ndarray, flags: int) -> np.ndarray:
        decoded[buffer.tobytes()] += 1
        return right(buffer, flags)

    views = (View(size=16, count=2), View(size=8, count=6))
    s = stream(
        write_shards(tmp_path / "d", (13, 11), masks=masks),
        views=views,
        foreground={"masks": masks},
    )
    monkeypatch.setattr(cv2, "imdecode", counted)
    batches = list(s.batches(0, 2))  # an epoch
    assert [tuple(v.shape[:2]) for v in batches[0].views] == [(2, 12), (6, 12)]
    for number in range(24):
        assert decoded.pop(encode(picture(number))) == 1
    assert sum(decoded.values()) == 24 * masks


def test_random_state_of_the_process_is_left_alone(folder: Path) -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    list(stream(folder, workers=1).batches(0, 2))
    assert torch.equal(torch.rand(3), wanted)


def test_closing_early_stops_the_workers(folder: Path) -> None:
    before = children()
    s = stream(folder, workers=2)
    next(iter(s.batches(0, 8)))
    assert len(children()) == len(before) + 2
    s.close()
    assert children() == before


def test_data_sets_can_be_pickled(folder: Path) -> None:
    """For start methods other than fork."""
    s = stream(folder)
    first = s.dataset[(0, 0)]
    again = pickle.loads(pickle.dumps(s.dataset))
    assert torch.equal(again[(0, 0)].views[0], first.views[0])


def test_synthetic_stream_needs_no_files() -> None:
    s = stream("synthetic", synthetic_samples=1234, foreground=MASKS)
    assert (s.samples, s.steps_per_epoch) == (1234, 102)
    a, b = s.batches(101, 103)
    assert [tuple(v.shape) for v in a.views] == [(2, 12, 3, 16, 16), (1, 12, 3, 8, 8)]
    assert torch.equal(a.views[0], b.views[0])
    assert not torch.equal(a.index, b.index)
    assert a.masks.shape == (2, 12, 1, 16, 16)


def test_numbers_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="5 processes do not divide batch=12"):
        stream(folder, world=5)
    with pytest.raises(
        DataError, match=r"does not divide batch=12; set data.lanes to a divisor such as 6"
    ):
        stream(folder, lanes=8)
    with pytest.raises(DataError, match="48 samples, fewer than batch=64"):
        stream(folder, batch=64)
    with pytest.raises(DataError, match=r"data.path is empty"):
        stream("")


# --- faults ---------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_bit_is_named(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path / "d", (8, 8, 8))
    s = stream(folder, workers=workers)
    path = folder / "s-001.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"IHDR", 3000)
    data[at + 30] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"s-001.tar at byte \d+: the content of") as error:
        list(s.batches(0, 2))
    one_line(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_undecodable_image_is_named(tmp_path: Path, workers: int) -> None:
    import tarfile

    folder = tmp_path / "d"
    folder.mkdir()
    with tarfile.open(folder / "s.tar", "w") as tar:
        for i in range(12):
            add(tar, f"k{i}.png", b"\x89PNG\r\n\x1a\n" if i == 4 else encode(picture(i)))
    with pytest.raises(
        ShardError, match=r"s.tar at byte \d+: sample 'k4': not a JPEG, PNG or WebP image"
    ) as error:
        list(stream(folder, workers=workers).batches(0, 1))
    one_line(error)
    with pytest.raises(ShardError, match="sample 'k4'"):
        list(
            eval_batches(
                str(folder),
                transform=Transform(resize="tv", size=8),
                device=CPU,
                mean=MEAN,
                std=STD,
            )
        )


def test_images_above_the_pixel_limit_are_named(folder: Path) -> None:
    with pytest.raises(ShardError, match=r"30 x 24 pixels are more than data.max_pixels=700"):
        list(stream(folder, max_pixels=700).batches(0, 1))


def test_missing_and_wrong_masks_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ShardError,
        match=r"has no .mask.png member; add masks, or read none \(data.foreground.masks=false",
    ):
        list(stream(write_shards(tmp_path / "a", (12,)), foreground=MASKS).batches(0, 1))
    import tarfile

    (tmp_path / "b").mkdir()
    with tarfile.open(tmp_path / "b" / "s.tar", "w") as tar:
        for i in range(12):
            add(tar, f"k{i}.png", encode(picture(i)))
            add(tar, f"k{i}.mask.png", encode(np.ones((3, 3), np.uint8)))
    with pytest.raises(ShardError, match=r"the mask is \(3, 3\) and the image \(24, 30\)"):
        list(stream(tmp_path / "b", foreground=MASKS).batches(0, 1))


class _Dying(Images):
    how: int = signal.SIGKILL

    def __getitem__(self, at: tuple[int, int]):  # type: ignore[no-untyped-def]
        if at[1] == 2:
            os.kill(os.getpid(), self.how)
        return super().__getitem__(at)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            signal.SIGKILL,
            r"loader worker 0 \(pid \d+\), last reading .*, was killed by SIGKILL; if memory ran "
            r"out, lower",
        ),
        (
            signal.SIGSTOP,
            r"loader worker 0 \(pid \d+\), last reading s-\d+.tar/\d+, is stopped \(SIGSTOP\)",
        ),
    ],
)
def test_dead_and_stopped_workers_are_named(
    folder: Path, how: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaletrain.data.loading.watchdog.CHECK", 0.3)
    s = stream(folder, workers=2)
    s.dataset.__class__ = type("Dying", (_Dying,), {"how": how})
    with pytest.raises(DataError, match=words) as error:
        list(s.batches(0, 4))
    one_line(error)


def test_workers_ignore_the_signals_of_preemption(folder: Path) -> None:
    s = stream(folder, workers=2, prefetch=1)
    batches, before = s.batches(0, 8), children()
    found = [next(batches)]
    workers = set(children()) - set(before)
    assert len(workers) == 2
    for pid in workers:
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
            os.kill(pid, name)
    found += list(batches)
    for a, b in zip(found, stream(folder).batches(0, 8), strict=True):
        same(a, b)
