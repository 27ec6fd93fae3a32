"""The order of samples: permutations, mixing, laziness."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy import stats

from scaletrain.data.errors import DataError
from scaletrain.data.sampling import plan as plan_module
from scaletrain.data.sampling.mixture import Mixture, MixtureSource
from scaletrain.data.sampling.plan import ROUNDS, Batches, EverySample, Plan, bijection, divisor

RAGGED = np.array([13, 1, 40, 7, 0, 22, 17, 31, 9, 60])


def epoch_of(plan: Plan, epoch: int) -> np.ndarray:
    return np.concatenate([plan.batch(epoch, t) for t in range(plan.steps_per_epoch)])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 100, 1009])
def test_bijection_is_one(n: int) -> None:
    for key in range(20):
        out = bijection(np.arange(n), np.full(n, n), np.full(n, key * 7919))
        assert sorted(out.tolist()) == list(range(n))


def test_bijection_sends_every_place_everywhere() -> None:
    """Over many keys each (place, image) pair is equally frequent, and so is each pair of
    neighbours' order.
    """
    n, keys = 12, 6000
    x, key = np.tile(np.arange(n), keys), np.repeat(np.arange(keys), n)
    out = bijection(x, np.full(len(x), n), key).reshape(keys, n)
    table = np.stack([np.bincount(out[:, i], minlength=n) for i in range(n)])
    assert stats.chisquare(table.ravel()).pvalue > 1e-3
    assert abs((out[:, 0] < out[:, 1]).mean() - 0.5) < 0.025


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    plan = Plan(RAGGED, seed=3, batch=20, lanes=4, window=3)
    assert plan.steps_per_epoch == 10
    orders = [epoch_of(plan, e) for e in range(4)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(200))
    for i in range(4):
        for j in range(i):
            assert (orders[i] == orders[j]).mean() < 0.05
    assert (
        epoch_of(Plan(RAGGED, seed=4, batch=20, lanes=4, window=3), 0) == orders[0]
    ).mean() < 0.05
    assert np.array_equal(epoch_of(Plan(RAGGED, seed=3, batch=20, lanes=4, window=3), 2), orders[2])


def test_uneven_lanes_drop_the_rest_and_never_repeat() -> None:
    plan = Plan(np.array([50, 57]), seed=0, batch=16, lanes=8, window=2)
    assert plan.steps_per_epoch == (107 // 8) // 2 == 6
    order = epoch_of(plan, 0)
    assert len(set(order.tolist())) == 96
    dropped = {tuple(sorted(set(range(107)) - set(epoch_of(plan, e).tolist()))) for e in range(5)}
    assert len(dropped) == 5  # another rest each epoch


@pytest.mark.parametrize("kind", ["plain", "mixture"])
@pytest.mark.parametrize("batch", [8, 40, 200])
def test_every_sample_comes_once_and_the_last_batch_is_filled_up(kind: str, batch: int) -> None:
    usual: Batches = Plan(RAGGED, seed=3, batch=batch, lanes=8, window=2)
    if kind == "mixture":
        parts = [MixtureSource("a", RAGGED[:6], 0.5), MixtureSource("b", RAGGED[6:], 0.5)]
        usual = Mixture(parts, seed=3, batch=8, lanes=8, window=2, epoch_samples=16)
    plan = usual.every()
    for epoch in (0, 5):
        found = []
        for step in range(plan.steps_per_epoch):
            filling = plan.filling(step, 0, plan.size)
            found += plan.batch(epoch, step).tolist()[: plan.size - filling]
            # ranks agree, however many rows each has left
            halves = (
                plan.filling(step, 0, plan.size // 2),
                plan.filling(step, plan.size // 2, plan.size),
            )
            assert sum(halves) == filling
        assert filling == -200 % plan.size
        assert sorted(found) == list(range(200))
        assert found != sorted(found)
    assert isinstance(plan.every(), EverySample)


def test_a_lane_is_its_cut_of_the_line_and_stays_in_its_window() -> None:
    """Independent reading of design section 5: lane c holds line positions [cN/C, (c+1)N/C)."""
    counts = np.full(40, 25)
    plan = Plan(counts, seed=1, batch=10, lanes=10, window=2)
    shard = np.stack([plan.batch(0, t) // 25 for t in range(plan.steps_per_epoch)])  # [T, lanes]
    for lane in range(10):
        assert (
            np.bincount(shard[:, lane], minlength=40).tolist().count(25) == 4
        )  # whole shards, four of them
        for begin in range(0, 100, 50):  # blocks of two shards
            assert len(set(shard[begin : begin + 50, lane].tolist())) == 2
    flat = {lane: set(shard[:, lane].tolist()) for lane in range(10)}
    again = np.stack([plan.batch(1, t) // 25 for t in range(plan.steps_per_epoch)])
    assert (
        sum(flat[lane] == set(again[:, lane].tolist()) for lane in range(10)) <= 1
    )  # lanes get other shards


def test_ranks_take_slices_of_the_same_global_batch() -> None:
    plan = Plan(RAGGED, seed=3, batch=24, lanes=4, window=3)
    whole = plan.batch(1, 5)
    for world in (1, 2, 3, 4, 6):
        parts = [plan.batch(1, 5, *plan.part(rank, world)) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_batches_mix_shards() -> None:
    """G7 of the goals: a fixture of 40 shards of 500 samples and batch 256; the ideal is 39.9
    distinct shards.
    """
    plan = Plan(np.full(40, 500), seed=0, batch=256, lanes=64, window=16)
    distinct = [len(np.unique(plan.batch(0, t) // 500)) for t in range(20)]
    assert np.mean(distinct) >= 36
    assert "20,000 samples in 40 shards" in plan.mixing()
    one = Plan(np.array([8]), seed=0, batch=1, lanes=1, window=1).mixing()
    assert one == "8 samples in 1 shard over 1 lane; a batch of 1 mixes 1 shard and keeps 1 in use"
    assert "64 lanes" in plan.mixing()


def test_300_million_samples_are_never_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: benchmarks/plan.py has the seconds."""
    hashed, right = Counter[str](), plan_module.keyed

    def counted(*parts: Any) -> Any:
        hashed["numbers"] += max([1, *(len(p) for p in parts if isinstance(p, np.ndarray))])
        return right(*parts)

    monkeypatch.setattr(plan_module, "keyed", counted)
    counts = np.full(30_000, 10_000)
    tracemalloc.start()
    try:
        plan = Plan(counts, seed=0, batch=4096, lanes=64, window=16)
        last = plan.batch(7, plan.steps_per_epoch - 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(np.unique(last)) == 4096
    assert plan.steps_per_epoch == 73242
    assert peak < 100 * 30_000  # bytes per shard; one per sample would be 100 times that
    assert hashed["numbers"] < 4096 * (1 + ROUNDS * 2)  # half the cells are never walked again
    hashed.clear()
    assert plan.batch(7, 1234, 17, 18) == plan.batch(7, 1234)[17]
    hashed.clear()
    plan.batch(7, 1234, 17, 18)
    assert hashed["numbers"] < 10 * ROUNDS


def test_order_and_ranks_of_shards_change_every_epoch() -> None:
    """Which of 8 ranks reads a shard in the next epoch is chance: a match in 1 of 8, within three
    standard deviations.
    """
    plan, ranks = Plan(np.full(640, 32), seed=0, batch=512, lanes=64, window=4), 8

    def rank_of_shards(epoch: int) -> np.ndarray:
        found = np.zeros((ranks, 640), int)
        for step in range(plan.steps_per_epoch):
            shards = plan.batch(epoch, step) // 32
            for rank in range(ranks):
                np.add.at(found[rank], shards[slice(*plan.part(rank, ranks))], 1)
        assert (found.max(0) == 32).mean() > 0.98  # a shard is read by about one rank
        return found.argmax(0)

    epochs = [rank_of_shards(epoch) for epoch in range(3)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs((epochs[i] == epochs[j]).mean() - 1 / ranks) < 3 * np.sqrt(7 / 64 / 640)
    firsts = [plan.order._shards_of(epoch)[0].copy() for epoch in range(3)]
    assert all((firsts[i] == firsts[j]).mean() < 0.02 for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    ("shards", "lanes", "window"), [(100, 8, 3), (100, 8, 16), (37, 16, 1), (5, 16, 4)]
)
def test_the_cache_that_is_announced_is_the_one_that_is_used(
    shards: int, lanes: int, window: int
) -> None:
    rng = np.random.default_rng(shards)
    counts = rng.integers(30, 60, shards)
    plan = Plan(counts, seed=2, batch=lanes * 2, lanes=lanes, window=window)
    starts = np.cumsum(counts) - counts
    lane = plan.samples / lanes
    blocks = max(1, round(shards / lanes / window))  # of a lane
    steps = int(lane / blocks / 2)
    touched = {
        int(s) for t in range(steps) for s in np.searchsorted(starts, plan.batch(0, t), "right") - 1
    }
    distinct, held = plan.in_use()
    assert distinct == len(np.unique(np.searchsorted(starts, plan.batch(0, 0), "right")))
    assert 0.97 * held <= len(touched) <= held
    assert f"keeps {held:,} in use, {held / 1000:,.3g} GB over all nodes" in plan.mixing(1e6)


def test_batches_hold_the_classes_of_uniform_sampling() -> None:
    """G7: 1,281 shards, 1,000 classes, batch 4,096, at a twentieth of the samples; shards written
    with the global shuffle.
    """
    counts = np.full(1281, 50)
    shuffled = np.random.default_rng(0).permutation(np.arange(1281 * 50) * 1000 // (1281 * 50))
    plan = Plan(counts, seed=0, batch=4096, lanes=64, window=16)
    distinct = [len(np.unique(shuffled[plan.batch(0, t)])) for t in range(plan.steps_per_epoch)]
    uniform = 1000 * (1 - (1 - 1 / 1000) ** 4096)
    assert np.mean(distinct) >= 0.95 * uniform


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(
        DataError,
        match=r"data.lanes=64 does not divide batch=96; set data.lanes to a divisor such as 48",
    ):
        Plan(RAGGED, seed=0, batch=96, lanes=64, window=1)
    with pytest.raises(DataError, match="200 samples, fewer than batch=256"):
        Plan(RAGGED, seed=0, batch=256, lanes=64, window=1)
    plan = Plan(RAGGED, seed=0, batch=20, lanes=4, window=1)
    with pytest.raises(
        DataError, match="3 processes do not divide batch=20; set batch=21 or use 2 processes"
    ):
        plan.part(0, 3)
    with pytest.raises(IndexError):
        plan.batch(0, plan.steps_per_epoch)
    assert divisor(96, 64) == 48
    assert divisor(7, 3) == 1
