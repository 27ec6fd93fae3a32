"""Weighted mixtures and virtual epochs: exact shares, whole passes, the same batches for every
world.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.data import write_shards

from scaletrain import rng
from scaletrain.config.load import build
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import DataConfig, View
from scaletrain.data.errors import DataError
from scaletrain.data.loading.loader import Stream, open_stream
from scaletrain.data.reading.concat import ConcatShards
from scaletrain.data.sampling.mixture import Mixture, MixtureSource
from scaletrain.data.sampling.plan import Order

A, B = np.array([13, 1, 40, 7, 0, 22]), np.array([30, 31, 9])  # 83 and 70 samples


def mixture(*weights: float, **options: int) -> Mixture:
    sources = [
        MixtureSource("a", A, weights[0]),
        *(MixtureSource("b", B, weight) for weight in weights[1:]),
    ]
    return Mixture(sources, **{"seed": 1, "batch": 24, "lanes": 8, "window": 2, **options})


def run(plan: Mixture, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epoch, sample and repeat of every draw of the first steps, [steps, size] each."""
    found = [(divmod(step, plan.steps_per_epoch)) for step in range(steps)]
    drawn = [plan.draws(*at) for at in found]
    epochs = np.array([epoch for epoch, _ in found])[:, None].repeat(plan.size, 1)
    return epochs, np.stack([d.samples for d in drawn]), np.stack([d.repeats for d in drawn])


@pytest.mark.parametrize("counts", [A, B, np.array([3]), np.array([8, 8])])
@pytest.mark.parametrize("lanes", [1, 5, 8])
def test_lanes_taking_turns_visit_every_sample_once(counts: np.ndarray, lanes: int) -> None:
    order = Order(counts, seed=0, lanes=lanes, window=2)
    lane, at = order.turn(np.arange(order.samples))
    assert sorted(order.at(3, lane, at).tolist()) == list(range(order.samples))
    rounds = order.samples // lanes
    assert np.array_equal(lane[: rounds * lanes], np.tile(np.arange(lanes), rounds))
    assert (np.diff(lane[rounds * lanes :]) > 0).all()  # one more for some, in turn
    assert (order.turn(np.array([0]))[1] == 0).all()


def test_a_virtual_epoch_of_one_source_walks_through_it_whole() -> None:
    plan = mixture(1.0, epoch_samples=50)
    assert (plan.samples, plan.steps_per_epoch, plan.whole) == (83, 2, False)
    _, samples, _ = run(plan, 83)  # 24 passes
    passes = np.sort(samples.ravel())
    assert np.array_equal(passes, np.arange(83).repeat(24))
    walked = samples.ravel()
    seen = [Counter(walked[: 24 * step].tolist()) for step in range(1, 84)]
    assert all(
        max(c.values()) - min(c.get(i, 0) for i in range(83)) <= 1 for c in seen
    )  # none again before all were seen


@pytest.mark.parametrize("weights", [(0.7, 0.3), (2, 1), (0.123, 0.877), (5, 1, 1)])
def test_shares_are_exact_and_passes_whole(weights: tuple[float, ...]) -> None:
    plan = mixture(*weights, epoch_samples=120, batch=40)
    sizes = [83, *[70] * (len(weights) - 1)]
    first = np.cumsum([0, *sizes])
    assert plan.samples == sum(sizes)
    assert plan.weights() == pytest.approx([w / sum(weights) for w in weights])
    _, samples, _ = run(plan, 60)
    for number, weight in enumerate(plan.weights()):
        per_step = ((samples >= first[number]) & (samples < first[number + 1])).sum(1)
        away = per_step.cumsum() - weight * 40 * np.arange(1, 61)
        assert np.abs(away).max() < len(weights)  # not only on average
        mine = [s[(s >= first[number]) & (s < first[number + 1])] for s in samples]
        counts = np.zeros(sizes[number], int)
        for part in mine:
            counts += np.bincount(part - first[number], minlength=sizes[number])
            assert counts.max() - counts.min() <= 1


def test_counts_of_small_shares_never_fall() -> None:
    plan = mixture(0.3, 0.2, 0.01, 0.49, batch=8)
    drawn = np.array([plan.drawn(n) for n in range(5000)])
    assert (np.diff(drawn, axis=0) >= 0).all()
    assert np.array_equal(drawn.sum(1), np.arange(5000))
    assert plan.drawn(10**15)[2] == pytest.approx(10**13, abs=4)


def test_a_draw_has_a_key_of_its_own() -> None:
    """The small source is gone through several times in an epoch: its repeats must differ, or its
    views would be the same.
    """
    plan = mixture(0.2, 0.8, epoch_samples=480)
    epochs, samples, repeats = run(plan, 60)
    draws = np.stack([epochs.ravel(), samples.ravel(), repeats.ravel()], 1)
    assert len(np.unique(draws, axis=0)) == len(draws) == 1440
    assert len(np.unique(draws[:, :2], axis=0)) < 1440
    assert repeats[0].max() == 0
    assert repeats[19].max() >= 4  # 384 draws of 70 samples
    assert set(repeats[samples < 83].tolist()) == {0, 1}  # 96 draws of 83


def test_ranks_take_slices_and_each_reads_its_own_lanes_of_every_source() -> None:
    plan = mixture(0.5, 0.5)
    for step in range(plan.steps_per_epoch):
        whole = plan.draws(2, step)
        for world in (1, 2, 3, 4, 8):
            parts = [plan.draws(2, step, *plan.part(rank, world)) for rank in range(world)]
            assert np.array_equal(np.concatenate([p.samples for p in parts]), whole.samples)
            assert np.array_equal(np.concatenate([p.repeats for p in parts]), whole.repeats)
    halves = [plan.draws(0, 0, *plan.part(rank, 2)).samples for rank in range(2)]
    assert [int((h < 83).sum()) for h in halves] == [6, 6]


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    plan = mixture(1.0, epoch_samples=24)
    orders = [np.concatenate([plan.batch(3 * n + k, 0) for k in range(3)]) for n in range(6)]
    assert all((orders[i] == orders[j]).mean() < 0.1 for i in range(6) for j in range(i))
    assert (mixture(1.0, epoch_samples=24, seed=2).batch(0, 0) == plan.batch(0, 0)).mean() < 0.2


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(
        DataError,
        match=r"data.lanes=9 does not divide batch=24; set data.lanes to a divisor such as 8",
    ):
        mixture(1.0, lanes=9)
    with pytest.raises(DataError, match="an epoch of 20 samples is less than batch=24"):
        mixture(1.0, epoch_samples=20)
    with pytest.raises(
        DataError,
        match="b has 70 samples, fewer than its 72 of every batch=80; lower its weight or batch",
    ):
        mixture(0.1, 0.9, batch=80)
    with pytest.raises(IndexError):
        mixture(0.5, 0.5).draws(0, 6)


def test_the_recipe_names_one_origin() -> None:
    with pytest.raises(
        ConfigError, match=r"path and mixture exclude each other; clear one with data.path=''"
    ):
        build({"data": {"path": "x", "mixture": [{"path": "a", "weight": 1}]}})
    with pytest.raises(ConfigError, match=r"data.mixture.0.weight: Input should be greater than 0"):
        build({"data": {"mixture": [{"path": "a", "weight": 0}]}})


# --- through the stream ---------------------------------------------------------------------------


def stream(folders: list[Path], **options: object) -> Stream:
    parts = [
        {"path": str(folder), "weight": weight}
        for folder, weight in zip(folders, (0.75, 0.25), strict=False)
    ]
    settings = {
        "mixture": parts,
        "lanes": 4,
        "window": 2,
        "workers": 0,
        "views": (View(size=16),),
        **options,
    }
    return open_stream(
        DataConfig(**settings), seed=5, batch=12, rank=0, world=1, device=torch.device("cpu")
    )


def test_sample_numbers_run_through_the_folders(tmp_path: Path) -> None:
    folders = [write_shards(tmp_path / "a", (11, 3, 20)), write_shards(tmp_path / "b", (9, 6))]
    for folder in folders:
        (folder / "classes.json").write_text(json.dumps(list("abcdefg")))
    s = stream(folders, epoch_samples=60)
    assert (s.samples, s.steps_per_epoch) == (49, 5)
    batches = list(s.batches(0, 12))
    for b in batches:
        assert int((b.index < 34).sum()) == 9
        assert b.labels.tolist() == [(i if i < 34 else i - 34) % 7 for i in b.index.tolist()]
    epochs, samples, repeats = run(s.plan, 12)
    for step, b in enumerate(batches):
        assert b.index.tolist() == samples[step].tolist()
        assert torch.equal(
            b.keys, rng.hash64(5, int(epochs[step, 0]), b.index, torch.from_numpy(repeats[step]))
        )
    assert s.name(35) == f"{folders[1]}/s-000.tar/00001"
    assert "0.75 of the draws" in s.mixing()
    assert "labels" not in s.mixing()


def test_views_of_a_repeat_are_new(tmp_path: Path) -> None:
    s = stream([write_shards(tmp_path / "a", (13,))], epoch_samples=48)
    pixels: dict[int, list[torch.Tensor]] = {}
    for b in s.batches(0, 4):  # one epoch, nearly four passes
        for row, i in enumerate(b.index.tolist()):
            pixels.setdefault(i, []).append(b.views[0][0, row])
    assert min(map(len, pixels.values())) >= 3
    assert not any(torch.equal(v[0], w) for v in pixels.values() for w in v[1:])


def test_labels_of_other_classes_are_unknown(tmp_path: Path) -> None:
    folders = [write_shards(tmp_path / "a", (20,)), write_shards(tmp_path / "b", (12,))]
    (folders[0] / "classes.json").write_text('["cat"]')
    for other in (None, '["dog"]'):
        if other:
            (folders[1] / "classes.json").write_text(other)
        s = stream(folders)
        assert set(next(iter(s.batches(0, 1))).labels.tolist()) == {-1}
        assert "labels are not used" in s.mixing()


def test_a_list_of_classes_that_cannot_be_read_is_named_at_once(tmp_path: Path) -> None:
    folders = [write_shards(tmp_path / name, (4,)) for name in "ab"]
    for folder in folders:
        (folder / "classes.json").mkdir()
    with pytest.raises(DataError, match=r"a/classes.json cannot be read: Is a directory"):
        ConcatShards([str(folder) for folder in folders])


def test_synthetic_data_have_virtual_epochs_too() -> None:
    s = stream([], path="synthetic", synthetic_samples=5000, epoch_samples=600)
    assert (s.samples, s.steps_per_epoch) == (5000, 50)
    assert len(torch.cat([b.index for b in s.batches(0, 416)]).unique()) == 4992
