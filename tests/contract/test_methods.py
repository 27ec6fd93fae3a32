"""What every method of the folder must do in training: pure forward passes, targets, parameter
groups, skipped steps and resuming. Its file is checked by test_method_files.py.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from kit import small
from torch import Tensor

from scaletrain.config import schema as configuration
from scaletrain.config.schema import components
from scaletrain.core import Batch, Clock, DeferredState, MethodOutput, Piece
from scaletrain.engines.base import Engine
from scaletrain.optim.groups import parameter_groups

METHODS = components("methods")
TOTAL = 20
WITHIN_AN_EPOCH = 3
# steps after which a run is cut: before a frozen group moves, within an epoch, at its end
CUTS = (1, WITHIN_AN_EPOCH, small.STEPS_PER_EPOCH)
CLOCK = Clock(0, TOTAL, 0, small.STEPS_PER_EPOCH)
each_objective = pytest.mark.parametrize("method", [*METHODS, *small.JOINED])


# --- forward --------------------------------------------------------------------------------------


def values(engine: Engine) -> dict[str, Tensor]:
    """Everything that a step may change: parameters, buffers, optimizer state."""
    return {name: at.tensor.detach().clone() for name, at in engine.placed().items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def staged(engine: Engine) -> list[DeferredState]:
    return [module for module in engine.method.modules() if isinstance(module, DeferredState)]


def traces_of_forward(engine: Engine, batch: Batch) -> list[str]:
    """What two forward passes with a discard in between have changed, in words: nothing, where
    forward is pure.
    """
    before, chance = values(engine), torch.get_rng_state()
    outs = []
    for _ in range(2):
        outs.append(engine.method(batch, CLOCK))
        for module in staged(engine):
            module.discard()
    found = changed(before, values(engine))
    for module in staged(engine):
        module.commit()
    found += [
        f"still staged: {name}" for name in changed(before, values(engine)) if name not in found
    ]
    found += ["chance"] * (not torch.equal(chance, torch.get_rng_state()))
    return found + [
        f"loss {name}"
        for name, loss in outs[0].losses.items()
        if not torch.equal(loss, outs[1].losses[name])
    ]


@dataclasses.dataclass
class InMemory:
    """What a checkpoint gives back, without a disk."""

    pieces: dict[str, Piece]

    def names(self) -> Sequence[str]:
        return sorted(self.pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.pieces[name].shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.pieces[name].data[start:stop].clone()


def save(engine: Engine) -> InMemory:
    state = engine.state()
    assert all(
        piece.start == 0 and piece.data.shape == (torch.Size(piece.shape).numel(),)
        for piece in state.values()
    )
    return InMemory(
        {name: dataclasses.replace(piece, data=piece.data.clone()) for name, piece in state.items()}
    )


@functools.cache
def uninterrupted(method: str) -> tuple[list[float], dict[str, Tensor], dict[int, InMemory]]:
    """Six steps of a method, once for all tests: the losses, every value at the end, and the
    states that were saved on the way.
    """
    cfg = small.config(method)
    engine, losses, saved = small.engine(cfg), [], {}
    for step in range(6):
        losses += small.run(engine, cfg, step, step + 1)
        if step + 1 in CUTS:
            saved[step + 1] = save(engine)
    return losses, values(engine), saved


def trained(method: str, steps: int = 3) -> tuple[configuration.Config, Engine]:
    """An engine whose queues, memories and momenta are in use."""
    cfg = small.config(method)
    engine = small.engine(cfg)
    engine.restore(uninterrupted(method)[2][steps])
    return cfg, engine


@each_objective
def test_forward_only_stages_what_it_would_write(method: str) -> None:
    cfg, engine = trained(method)
    batch = small.batch(cfg, 3)
    assert traces_of_forward(engine, batch) == []
    before = values(engine)
    engine.method(batch, CLOCK)
    assert changed(before, values(engine)) == []
    for module in staged(engine):
        module.commit()
    moved = changed(before, values(engine))
    assert any("running_mean" in name for name in moved)  # or the comparison would prove nothing
    assert not {f"method.{name}" for name, _ in engine.method.named_parameters()} & set(moved)


def impure_buffer(engine: Engine) -> None:
    next(b for n, b in engine.method.named_buffers() if n.endswith("running_mean")).add_(1)


def impure_parameter(engine: Engine) -> None:
    with torch.no_grad():
        next(engine.method.parameters()).mul_(1.01)


def leftover(engine: Engine) -> None:
    norm = next(m for m in staged(engine) if hasattr(m, "running_mean"))
    norm.discard = lambda: None  # type: ignore[method-assign]


def chance(engine: Engine) -> None:
    torch.rand(1)


@pytest.mark.parametrize("spoil", [impure_buffer, impure_parameter, leftover, chance])
def test_an_impure_forward_is_found(spoil: Callable[[Engine], None]) -> None:
    cfg, engine = trained(METHODS[0], 1)
    engine.method.register_forward_pre_hook(lambda *_: spoil(engine))
    assert traces_of_forward(engine, small.batch(cfg, 3))


@each_objective
def test_what_forward_returns(method: str) -> None:
    cfg, engine = trained(method)
    batch = small.batch(cfg, 3)
    out: MethodOutput = engine.method(batch, CLOCK)
    names = {"all", *method.split("+")[1:]} | {group.name for group in engine.method.groups()}
    assert out.losses.keys() <= names
    assert all(
        loss.dim() == 0 and loss.requires_grad and loss.isfinite() for loss in out.losses.values()
    )
    assert all(s.dim() == 0 and not s.requires_grad and s.isfinite() for s in out.scalars.values())
    assert out.embedding is not None
    assert out.embedding.shape == (len(batch), engine.method.backbone.features)
    assert not out.embedding.requires_grad


# --- declarations ---------------------------------------------------------------------------------


@each_objective
def test_targets_are_moved_by_their_average_alone(method: str) -> None:
    cfg, engine = trained(method)
    model = engine.method
    own = {
        f"{target}.{name}"
        for target in model.targets
        for name, _ in model.get_submodule(target).named_parameters()
    }
    optimised = {name for group in engine.optimizer.param_groups for name in group["names"]}
    assert not own & optimised
    others = {name for name, _ in model.named_parameters()} - own - optimised
    # such as a teacher
    assert not others or not small.pretrains(method)
    assert not any(model.get_parameter(name).requires_grad for name in others)
    before = values(engine)
    clock = Clock(3, TOTAL, 0, small.STEPS_PER_EPOCH)
    out = model(small.batch(cfg, 3), clock)
    torch.stack(list(out.losses.values())).sum().backward()
    assert all(
        model.get_parameter(name).grad is None and not model.get_parameter(name).requires_grad
        for name in own
    )
    for module in staged(engine):
        module.discard()
    engine.optimizer.zero_grad()
    engine.step(small.batch(cfg, 3), clock, 0.2, 0.2)
    for target, online in model.targets.items():
        tau = model.ema(clock)
        assert 0 <= tau < 1
        pairs = zip(
            model.get_submodule(target).named_parameters(),
            model.get_submodule(online).named_parameters(),
            strict=True,
        )
        for (name, new), (same, followed) in pairs:
            assert name == same
            old = before[f"method.{target}.{name}"]
            torch.testing.assert_close(
                new, tau * old + (1 - tau) * followed, rtol=1e-12, atol=1e-14
            )
            assert not torch.equal(new, old)


@each_objective
def test_groups_take_parameters(method: str) -> None:
    cfg, engine = trained(method, 1)
    groups = parameter_groups(engine.method, cfg.optim)
    assert {group.name for group in engine.method.groups()} <= {group["name"] for group in groups}
    names = [name for group in groups for name in group["names"]]
    assert len(names) == len(set(names))


# --- skipped steps and resume ---------------------------------------------------------------------


def broken(batch: Batch, sample: int) -> Batch:
    views = [v.clone() for v in batch.views]
    views[0][0, sample, 1, 2, 2] = float("nan")
    return dataclasses.replace(batch, views=tuple(views))


@each_objective
def test_a_skipped_step_leaves_no_trace(method: str, caplog: pytest.LogCaptureFixture) -> None:
    (cfg, plain), (_, tried) = trained(method), trained(method)
    clock = Clock(3, TOTAL, 0, small.STEPS_PER_EPOCH)
    bad, good = broken(small.batch(cfg, 9), 4), small.batch(cfg, 3)
    with caplog.at_level(logging.WARNING, "scaletrain"):
        assert tried.step(bad, clock, 0.2, 0.2).skipped
    named = re.findall(
        r"step (\d+) skipped: the loss of rank (\d+) is not finite; samples ([\d, ]+)", caplog.text
    )
    assert [(step, rank) for step, rank, _ in named] == [("3", "0")]
    assert str(int(bad.index[4])) in named[0][2].split(", ")
    results = [engine.step(good, clock, 0.2, 0.2) for engine in (plain, tried)]
    assert not any(result.skipped for result in results)
    assert results[0].loss == results[1].loss
    assert changed(values(plain), values(tried)) == []
    assert small.run(plain, cfg, 4, 5) == small.run(tried, cfg, 4, 5)


def test_a_gradient_that_is_not_finite_is_named_although_the_loss_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cfg, engine = trained(METHODS[0], 1)
    next(iter(engine.method.backbone.parameters())).register_hook(
        lambda gradient: gradient * float("inf")
    )
    before = values(engine)
    with caplog.at_level(logging.WARNING, "scaletrain"):
        assert engine.step(
            small.batch(cfg, 1), dataclasses.replace(CLOCK, step=1), 0.2, 0.2
        ).skipped
    assert "step 1 skipped: the gradient of rank 0 is not finite; samples " in caplog.text
    assert changed(before, values(engine)) == []


@pytest.mark.parametrize(
    ("method", "cut"),
    [
        (method, cut)
        for method in [*METHODS, *small.JOINED]
        for cut in (CUTS if method in small.RESUMED else [WITHIN_AN_EPOCH])
    ],
)
def test_a_restored_engine_continues_bit_for_bit(method: str, cut: int) -> None:
    losses, end, saved = uninterrupted(method)
    cfg = small.config(method)
    engine = small.engine(cfg)
    # another start, all of which must be overwritten
    for tensor in engine.method.state_dict().values():
        tensor.fill_(3)
    engine.restore(saved[cut])
    assert small.run(engine, cfg, cut, 6) == losses[cut:]
    assert changed(end, values(engine)) == []


@each_objective
def test_every_saved_tensor_counts(method: str) -> None:
    """Restoring without one of them must be refused, whichever it is."""
    whole = uninterrupted(method)[2][WITHIN_AN_EPOCH].pieces
    engine = small.engine(small.config(method))
    missing = [name for name in whole if name.startswith("method.")]
    for name in missing[:: max(1, len(missing) // 6)]:
        with pytest.raises(ValueError, match=re.escape(name)):
            engine.restore(InMemory({k: v for k, v in whole.items() if k != name}))
