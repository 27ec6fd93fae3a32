"""The learning rate against independent closed forms of BYOL's, Barlow Twins' and SwAV's
schedules.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import OptimConfig
from scaletrain.optim.schedule import base_lr, lr


@pytest.mark.parametrize(
    ("rule", "rate", "per", "wanted"),
    [
        ("linear", 0.3, 256, 4.8),
        ("sqrt", 0.075, 1, 4.8),
        ("sqrt", 1.2, 256, 4.8),
        ("none", 0.03, 256, 0.03),
    ],
)
def test_base_at_batch_4096(rule: str, rate: float, per: int, wanted: float) -> None:
    """SimCLR's two rules are equal at 4096."""
    assert base_lr(
        OptimConfig(lr=rate, lr_scaling=rule, lr_reference_batch=per), 4096
    ) == pytest.approx(wanted, rel=1e-15)


def byol(step: int, warmup: int, total: int, base: float) -> float:
    if step < warmup:
        return step / warmup * base
    decay_step = min(step - warmup, total - warmup)
    return base * 0.5 * (1 + math.cos(math.pi * decay_step / (total - warmup)))


def test_byol() -> None:
    optim = OptimConfig(lr=0.2, warmup_epochs=3)
    got = [lr(optim, 512, step, 10, 200) for step in range(205)]
    np.testing.assert_allclose(
        got, [byol(step, 30, 200, 0.4) for step in range(205)], rtol=1e-14, atol=1e-17
    )
    assert got[0] == 0
    assert got[29] == pytest.approx(0.4 * 29 / 30)
    assert got[30] == 0.4
    assert got.count(0.4) == 1
    assert 0 < got[199] < 1e-4
    assert got[200:] == [0] * 5


def test_barlow_twins_final() -> None:
    optim = OptimConfig(lr=0.2, lr_scaling="none", warmup_epochs=1, min_lr_ratio=1e-3)
    for step in range(10, 101):
        q = 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert lr(optim, 64, step, 10, 100) == pytest.approx(
            0.2 * q + 0.2 * 0.001 * (1 - q), rel=1e-14
        )
    assert lr(optim, 64, 100, 10, 100) == pytest.approx(2e-4)


def test_swav_warmup_is_one_step_longer() -> None:
    """np.linspace ends on base; ours reaches base a step later, on the first cosine step, where
    SwAV has it again.
    """
    optim = OptimConfig(
        lr=4.8, lr_scaling="none", warmup_epochs=1, warmup_start=0.3 / 4.8, min_lr_ratio=0.001
    )
    got = [lr(optim, 4096, step, 20, 100) for step in range(100)]
    np.testing.assert_allclose(got[:20], np.linspace(0.3, 4.8, 21)[:20], rtol=1e-14)
    t = np.arange(80)
    np.testing.assert_allclose(
        got[20:], 0.0048 + 0.5 * (4.8 - 0.0048) * (1 + np.cos(np.pi * t / 80)), rtol=1e-13
    )


def test_no_warmup_starts_at_base() -> None:
    assert lr(OptimConfig(lr=0.5, lr_scaling="none", warmup_epochs=0), 64, 0, 10, 100) == 0.5


def test_constant_ignores_final() -> None:
    optim = OptimConfig(
        lr=0.5, lr_scaling="none", warmup_epochs=1, schedule="constant", min_lr_ratio=0.1
    )
    assert [lr(optim, 64, step, 10, 100) for step in (0, 5, 10, 99, 100)] == [
        0,
        0.25,
        0.5,
        0.5,
        0.5,
    ]


def test_part_of_an_epoch_of_warmup() -> None:
    optim = OptimConfig(lr=1.0, lr_scaling="none", warmup_epochs=0.25)
    assert [lr(optim, 64, step, 16, 100) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_warmup_of_the_whole_run_and_beyond() -> None:
    optim = OptimConfig(lr=1.0, lr_scaling="none", warmup_epochs=2)
    assert [lr(optim, 64, step, 5, 10) for step in (0, 9, 10)] == [0, 0.9, 1]
    with pytest.raises(
        ConfigError, match=r"optim\.warmup_epochs=2 means 10 steps .* has only 9; .* at most 1\.8"
    ):
        lr(optim, 64, 0, 5, 9)


def test_stairs() -> None:
    """MoCo v1's: .03, a tenth of it from epoch 120 on and a hundredth from 160 on."""
    optim = OptimConfig(lr=0.03, warmup_epochs=0, schedule="steps", milestones=(120, 160))
    got = [lr(optim, 256, step, 10, 2000) for step in (0, 1199, 1200, 1599, 1600, 2000)]
    np.testing.assert_allclose(got, [0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003], rtol=1e-14)


@pytest.mark.parametrize("optim", [OptimConfig(schedule="steps"), OptimConfig(milestones=(30.0,))])
def test_stairs_and_milestones_belong_together(optim: OptimConfig) -> None:
    with pytest.raises(ConfigError, match=r"optim\.milestones"):
        lr(optim, 256, 0, 1, 100)
