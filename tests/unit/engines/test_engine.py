"""What the engine does around a step: skipping, refusing, clipping, accumulating, two losses,
precision.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from kit import ranks, small
from kit.toys import Toy, toy_engine
from torch._dynamo.utils import counters

from scaletrain import dist
from scaletrain.checkpoint import reader
from scaletrain.checkpoint import writer as checkpoint
from scaletrain.config.recipe import ConfigError
from scaletrain.core import Clock
from scaletrain.engines.base import Engine, TrainingError

CLOCK = Clock(0, 20, 0, 4)


def snapshot(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: at.tensor.detach().clone() for name, at in engine.placed().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["byol", "swav"])
def test_a_non_finite_step_leaves_no_trace_and_is_named(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = small.config(method)
    engine = small.engine(cfg)
    small.run(engine, cfg, 0, 2)
    before = snapshot(engine)
    good = small.batch(cfg, 2)
    broken = good.views[0].clone()
    broken[1, 5, 0, 3, 3] = float("nan")
    with caplog.at_level(logging.WARNING, "scaletrain"):
        result = engine.step(
            dataclasses.replace(good, views=(broken, *good.views[1:])),
            dataclasses.replace(CLOCK, step=2),
            0.2,
            0.2,
        )
    assert result.skipped
    assert equal(before, snapshot(engine))
    assert caplog.messages == [
        f"step 2 skipped: the loss of rank 0 is not finite; samples {int(good.index[5])}"
    ]


def test_too_many_in_a_row_stop_the_run_and_a_good_one_resets_the_count() -> None:
    cfg = small.config("byol", engine={"max_skipped": 2})
    engine = small.engine(cfg)
    good = small.batch(cfg, 0)
    broken = dataclasses.replace(good, views=(good.views[0] * float("inf"),))
    assert engine.step(broken, CLOCK, 0.1, 0.1).skipped
    assert not engine.step(good, CLOCK, 0.1, 0.1).skipped
    assert engine.step(broken, CLOCK, 0.1, 0.1).skipped
    with pytest.raises(TrainingError, match=r"2 steps in a row .*max_skipped=2"):
        engine.step(broken, CLOCK, 0.1, 0.1)


@pytest.mark.parametrize("method", ["simclr", "swav", "relicv2", "deepcluster_v2"])
def test_accumulation_is_refused_for_losses_over_the_global_batch(method: str) -> None:
    with pytest.raises(ConfigError, match=r"engine.grad_accum_steps=2.*couples all samples"):
        small.engine(small.config(method, engine={"grad_accum_steps": 2}))


def test_accumulation_equals_the_whole_batch_where_normalisation_fits_the_micro_batch() -> None:
    whole, parts = (
        small.config("byol", engine={"grad_accum_steps": n}, model={"norm_group": 4})
        for n in (1, 3)
    )
    a, b = small.engine(whole), small.engine(parts)
    for x, y in zip(small.run(a, whole, 0, 3), small.run(b, parts, 0, 3), strict=True):
        assert x == pytest.approx(y, rel=1e-12)
    state = b.method.state_dict()
    for name, tensor in a.method.state_dict().items():  # running statistics too
        torch.testing.assert_close(tensor, state[name], rtol=1e-9, atol=1e-11, msg=name)


def test_accumulation_that_would_change_the_normalisation_is_refused() -> None:
    for group in (0, 3):  # the whole batch; three samples where a micro-batch has four
        with pytest.raises(ConfigError, match=r"would change the batch norm: set model.norm_group"):
            small.config("byol", engine={"grad_accum_steps": 3}, model={"norm_group": group})


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


def poisoned(poison: bool) -> dict[str, torch.Tensor]:
    """Two good steps, then, if asked, one with a NaN in a sample of rank 1 that is skipped, then a
    good one.
    """
    logging.getLogger("scaletrain").addHandler(lines := Lines())
    cfg = small.config("deepcluster_v2")
    engine = small.engine(cfg)
    engine.sample_name = lambda sample: f"place{sample}"
    small.run(engine, cfg, 0, 2)
    if poison:
        bad = small.batch(cfg, 2)
        if dist.rank() == 1:
            bad.views[0][0, 1, 0, 0, 0] = float("nan")
        assert engine.step(bad, dataclasses.replace(CLOCK, step=2), 0.2, 0.2).skipped
        owner = int(
            dist.gather_nograd(bad.index)[cfg.batch // 2 + 1]
        )  # second sample of the second half
        assert not dist.main() or any(
            line.endswith(f"rank 1 is not finite; samples place{owner}") for line in lines.seen
        )
    small.run(engine, cfg, 3, 4)
    return {f"{name}@{piece.start}": piece.data for name, piece in engine.state().items()}


def test_a_bad_sample_of_another_rank_makes_all_skip_and_is_named(tmp_path: Path) -> None:
    results = []
    for poison in (True, False):
        folder = tmp_path / str(poison)
        folder.mkdir()
        results.append(ranks.run(2, poisoned, folder, poison))
    for skipped, undisturbed in zip(*results, strict=True):
        assert equal(skipped, undisturbed)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # dynamo's own looking around
def test_a_compiled_engine_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compile_module(self, backend="aot_eager", **options),
    )
    counters.clear()
    eager, compiled = (small.config("byol", engine={"compile": c}) for c in (False, True))
    a, b = small.engine(eager), small.engine(compiled)
    assert small.run(b, compiled, 0, 2) == pytest.approx(small.run(a, eager, 0, 2), rel=1e-9)
    assert counters["stats"]["unique_graphs"] >= 5  # both backbones and all heads
    assert sum(counters["graph_break"].values()) == 0
    assert a.state().keys() == b.state().keys()
    torch._dynamo.reset()


def test_clipping_bounds_the_gradient_that_the_optimizer_sees() -> None:
    options = {"optim": {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}}
    free, clipped = (
        small.config("simclr", **options, engine={"max_grad_norm": c}) for c in (0.0, 0.5)
    )
    moved = []
    for cfg in (free, clipped):
        engine = small.engine(cfg)
        before = [p.detach().clone() for p in engine.trained()]
        result = engine.step(small.batch(cfg, 0), CLOCK, 1.0, 1.0)
        moved.append(
            torch.stack(
                [
                    (p.detach() - q).square().sum()
                    for p, q in zip(engine.trained(), before, strict=True)
                ]
            )
            .sum()
            .sqrt()
        )
        assert result.grad_norm > 0.5
    assert moved[0] > 0.5
    assert moved[1] == pytest.approx(0.5, rel=1e-5)


def test_each_of_two_losses_drives_its_own_group() -> None:
    """Against two separate backward passes written out."""
    cfg = small.config(
        "byol", optim={"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    )
    engine, plain = toy_engine(cfg), toy_engine(cfg).method
    assert isinstance(plain, Toy)
    batch = small.batch(cfg, 0)
    out = plain(batch, CLOCK)
    critic = torch.autograd.grad(
        out.losses["critic"], list(plain.critic.parameters()), retain_graph=True
    )
    encoder = torch.autograd.grad(out.losses["encoder"], list(plain.backbone.parameters()))
    result = engine.step(batch, CLOCK, 0.02, 0.1)
    assert set(result.scalars) == {"loss_critic", "loss_encoder"}
    for p, q, g in zip(
        engine.method.critic.parameters(), plain.critic.parameters(), critic, strict=True
    ):  # type: ignore[union-attr,operator]
        torch.testing.assert_close(p, q - 0.05 * g)  # constant base rate 0.1, multiplier 0.5
    for p, q, g in zip(
        engine.method.backbone.parameters(), plain.backbone.parameters(), encoder, strict=True
    ):
        torch.testing.assert_close(p, q - 0.02 * g)


def test_targets_move_after_the_step_on_full_precision_parameters() -> None:
    cfg = small.config("byol", engine={"precision": "bf16"})
    engine = small.engine(cfg)
    before = snapshot(engine)
    views = tuple(v.float() for v in small.batch(cfg, 0).views)
    engine.step(dataclasses.replace(small.batch(cfg, 0), views=views), CLOCK, 0.2, 0.2)
    after = snapshot(engine)
    tau = engine.method.ema(CLOCK)
    names = [n for n, _ in engine.method.get_submodule("target_backbone").named_parameters()]
    assert names
    for name in names:
        target, online = f"method.target_backbone.{name}", f"method.backbone.{name}"
        assert after[target].dtype == torch.float32
        assert not torch.equal(before[online], after[online])
        torch.testing.assert_close(after[target], tau * before[target] + (1 - tau) * after[online])


def test_bfloat16_follows_full_precision() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        cfg = small.config("byol", engine={"precision": precision}, optim={"lr": 0.01})
        engine = small.engine(cfg, perturb=False)
        batches = [
            dataclasses.replace(b, views=tuple(v.float() for v in b.views))
            for b in (small.batch(cfg, s) for s in range(3))
        ]
        losses[precision] = [
            engine.step(b, dataclasses.replace(CLOCK, step=s), 0.01, 0.01).loss
            for s, b in enumerate(batches)
        ]
        assert all(p.dtype == torch.float32 for p in engine.method.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize(
    "optim", [{"name": "sgd", "nesterov": True}, {"name": "adamw"}, {"name": "lars"}]
)
def test_every_optimizer_goes_on_bit_for_bit_from_a_checkpoint(
    optim: dict[str, object], tmp_path: Path
) -> None:
    cfg = small.config("byol", optim={**optim, "lr": 0.01})
    straight, first, second = (small.engine(cfg) for _ in range(3))
    small.run(first, cfg, 0, 2)
    writer = checkpoint.Writer(tmp_path)
    writer.save(2, first.state(), {})
    writer.close()
    saved = reader.latest(tmp_path)
    assert saved is not None
    second.restore(saved)
    assert small.run(straight, cfg, 0, 4)[2:] == small.run(second, cfg, 2, 4)
    assert equal(snapshot(straight), snapshot(second))
    assert any("optim." in name for name in saved.names())
