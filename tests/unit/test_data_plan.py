"""The order of samples: permutations, mixing, laziness."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from scaletrain.data.errors import DataError
from scaletrain.data.plan import Plan, bijection, divisor

RAGGED = np.array([13, 1, 40, 7, 0, 22, 17, 31, 9, 60])


def epoch_of(plan: Plan, epoch: int) -> np.ndarray:
    return np.concatenate([plan.batch(epoch, t) for t in range(plan.steps_per_epoch)])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 100, 1009])
def test_bijection_is_one(n: int) -> None:
    for key in range(20):
        out = bijection(np.arange(n), np.full(n, n), np.full(n, key * 7919))
        assert sorted(out.tolist()) == list(range(n))


def test_bijection_sends_every_place_everywhere() -> None:
    """Over many keys each (place, image) pair is equally frequent, and so is each pair of neighbours' order."""
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
    assert (epoch_of(Plan(RAGGED, seed=4, batch=20, lanes=4, window=3), 0) == orders[0]).mean() < 0.05
    assert np.array_equal(epoch_of(Plan(RAGGED, seed=3, batch=20, lanes=4, window=3), 2), orders[2])


def test_uneven_lanes_drop_the_rest_and_never_repeat() -> None:
    plan = Plan(np.array([50, 57]), seed=0, batch=16, lanes=8, window=2)
    assert plan.steps_per_epoch == (107 // 8) // 2 == 6
    order = epoch_of(plan, 0)
    assert len(set(order.tolist())) == 96
    dropped = {tuple(sorted(set(range(107)) - set(epoch_of(plan, e).tolist()))) for e in range(5)}
    assert len(dropped) == 5  # another rest each epoch


def test_a_lane_is_its_cut_of_the_line_and_stays_in_its_window() -> None:
    """Independent reading of design section 5: lane c holds line positions [cN/C, (c+1)N/C)."""
    counts = np.full(40, 25)
    plan = Plan(counts, seed=1, batch=10, lanes=10, window=2)
    shard = np.stack([plan.batch(0, t) // 25 for t in range(plan.steps_per_epoch)])  # [T, lanes]
    for lane in range(10):
        assert np.bincount(shard[:, lane], minlength=40).tolist().count(25) == 4  # whole shards, four of them
        for begin in range(0, 100, 50):  # blocks of two shards
            assert len(set(shard[begin : begin + 50, lane].tolist())) == 2
    flat = {lane: set(shard[:, lane].tolist()) for lane in range(10)}
    again = np.stack([plan.batch(1, t) // 25 for t in range(plan.steps_per_epoch)])
    assert sum(flat[lane] == set(again[:, lane].tolist()) for lane in range(10)) <= 1  # lanes get other shards


def test_ranks_take_slices_of_the_same_global_batch() -> None:
    plan = Plan(RAGGED, seed=3, batch=24, lanes=4, window=3)
    whole = plan.batch(1, 5)
    for world in (1, 2, 3, 4, 6):
        parts = [plan.batch(1, 5, *plan.part(rank, world)) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_batches_mix_shards() -> None:
    """G7 of the goals: a fixture of 40 shards of 500 samples and batch 256; the ideal is 39.9 distinct shards."""
    plan = Plan(np.full(40, 500), seed=0, batch=256, lanes=64, window=16)
    distinct = [len(np.unique(plan.batch(0, t) // 500)) for t in range(20)]
    assert np.mean(distinct) >= 36
    assert "20,000 samples in 40 shards" in plan.mixing()
    assert "64 lanes" in plan.mixing()


def test_300_million_samples_cost_milliseconds() -> None:
    counts = np.full(300_000, 1000)
    begin = time.process_time()
    plan = Plan(counts, seed=0, batch=4096, lanes=64, window=16)
    a = plan.batch(7, plan.steps_per_epoch - 1)
    assert time.process_time() - begin < 5  # generous: the point is that nothing of length N is made
    assert len(np.unique(a)) == 4096
    assert plan.steps_per_epoch == 73242


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(DataError, match=r"data.lanes=64 does not divide batch=96; set data.lanes to a divisor such as 48"):
        Plan(RAGGED, seed=0, batch=96, lanes=64, window=1)
    with pytest.raises(DataError, match="200 samples, fewer than batch=256"):
        Plan(RAGGED, seed=0, batch=256, lanes=64, window=1)
    plan = Plan(RAGGED, seed=0, batch=20, lanes=4, window=1)
    with pytest.raises(DataError, match="3 processes do not divide batch=20; set batch=21 or use 2 processes"):
        plan.part(0, 3)
    with pytest.raises(IndexError):
        plan.batch(0, plan.steps_per_epoch)
    assert divisor(96, 64) == 48
    assert divisor(7, 3) == 1
