"""`show memory` and `show comm`: what they predict for N ranks is what N gloo ranks hold
and send.
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as c10d
from kit import ranks, small
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from scaletrain import dist
from scaletrain.cli import main as cli
from scaletrain.config.schema import Config
from scaletrain.engines.base import Engine
from scaletrain.estimate import comm, memory
from scaletrain.nn.norm import BatchNorm

CONFIGS = Path(__file__).parents[3] / "configs"
MANY = [
    {"size": 16, "count": 4},
    {"size": 8, "count": 2},
]  # sizes that `show comm` leaves as they are
PAIR = [{"size": 8, "count": 2}]
ZERO_3 = {
    "zero_optimization": {"stage3_param_persistence_threshold": 100}
}  # so that some stay whole and some do not
ADAMW = {"name": "adamw"}
CASES: dict[
    str, tuple[str, str, dict[str, Any], dict[str, Any]]
] = {  # method, column of `show memory`, engine, optimizer
    "ddp": ("relicv2", "ddp", {"name": "ddp", "bucket_mb": 0.05}, {}),
    "ddp swav": (
        "swav",
        "ddp",
        {"name": "ddp", "precision": "bf16", "activation_checkpointing": [2]},
        ADAMW,
    ),
    "fsdp2": ("relicv2", "fsdp2", {"name": "fsdp2"}, ADAMW),
    "fsdp2 whole": (
        "swav",
        "fsdp2 whole",
        {"name": "fsdp2", "reshard": False, "activation_checkpointing": True},
        {},
    ),
    "hsdp": ("relicv2", "fsdp2", {"name": "fsdp2", "replicate": 2, "precision": "bf16"}, {}),
    "oss": ("relicv2", "fairscale", {"name": "fairscale"}, ADAMW),
    "ddp moco": ("moco", "ddp", {"name": "ddp"}, {}),
    "ddp suncet": ("supcon+suncet", "ddp", {"name": "ddp"}, {}),
    "zero 0": ("byol", "zero 0", {"name": "deepspeed", "precision": "fp32", "stage": 0}, {}),
    "zero 1": ("byol", "zero 1", {"name": "deepspeed", "precision": "fp32", "stage": 1}, {}),
    "zero 2": (
        "relicv2",
        "zero 2",
        {"name": "deepspeed", "precision": "fp32", "stage": 2, "bucket_mb": 0.1},
        {},
    ),
    "zero 3": (
        "relicv2",
        "zero 3",
        {"name": "deepspeed", "precision": "fp32", "stage": 3, "deepspeed": ZERO_3},
        ADAMW,
    ),
}


RANKS = {  # few cases: ranks are slow
    2: ("ddp", "ddp moco", "ddp suncet", "fsdp2", "oss", "zero 0", "zero 1", "zero 3"),
    4: ("ddp swav", "fsdp2 whole", "hsdp", "zero 2"),
}
ALL = [(world, case) for world, cases in RANKS.items() for case in cases]


def recipe(case: str) -> Config:
    method, _, engine, optim = CASES[case]
    views = MANY if method in ("relicv2", "swav") else PAIR
    more: dict[str, Any] = {"model": {"width": 5 / 64}}  # 5, 10, 20 and 40 channels
    if method == "moco":
        more = {"model": {**more["model"], "norm_group": 6}, "method": {"shuffle": True}}
    return small.config(method, data={"views": views}, engine=engine, optim=optim, **more)


# --- on real ranks --------------------------------------------------------------------------------


def storages(tensors: Iterable[Tensor]) -> dict[int, Any]:
    return {
        t.untyped_storage()._cdata: t.untyped_storage()
        for t in tensors
        if not isinstance(t, DTensor)
    }


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of what lies beneath the tensors, each once."""
    return sum(storage.nbytes() for storage in storages(tensors).values())


def elements(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


class Watched:
    """An engine whose last step is measured on its way."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.found = engine, dict[str, int]()
        self.forward, self.backward, self.gradient_norm = (
            engine.forward,
            engine.backward,
            engine.gradient_norm,
        )
        engine.forward, engine.backward, engine.gradient_norm = (
            self._forward,
            self._backward,
            self._norm,
        )  # type: ignore
        self.zero_1, self.zero_3 = ("stage", 1) in engine.config, ("stage", 3) in engine.config
        for p in engine.method.parameters() if self.zero_1 else ():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._whole_gradient)

    def _forward(self, *args: Any) -> Any:
        kept: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            if (
                not storages([tensor]).keys()
                <= storages(
                    [*self.engine.method.parameters(), *self.engine.method.buffers()]
                ).keys()
            ):
                kept.update(storages([tensor]))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = self.forward(*args)
        self.found["activations"] = sum(storage.nbytes() for storage in kept.values())
        return out

    def _backward(self, *args: Any) -> None:
        whole: Iterable[Tensor] = self.engine.method.parameters()
        if self.zero_3:
            self.found["gathered"] = elements(p.data for p in whole if not p.ds_persist)  # type: ignore[attr-defined]
        elif self.engine.config.name == "fsdp2":
            self.found["gathered"] = size(whole)
        self.backward(*args)

    def _norm(self) -> Tensor:
        if not self.zero_1:
            self.found["gradients"] = elements(
                p.grad for p in self.engine.trained() if p.grad is not None
            )
        return self.gradient_norm()

    def _whole_gradient(self, _: Tensor) -> None:
        self.found["gradients"] = elements(
            p.grad for p in self.engine.method.parameters() if p.grad is not None
        )

    def held(self) -> dict[str, int]:
        """After the step: what was found on its way and what stays."""
        engine, places = self.engine, self.engine.shards
        trained = {name for group in engine.optimizer.param_groups for name in group["names"]}

        def lasting(names: Iterable[str]) -> int:
            names = list(names)
            modules: list[Any] = [engine.method.get_parameter(name) for name in names]
            if self.zero_3:
                whole = sum(p.data.nbytes for p in modules if p.ds_persist)
                return (
                    size([p.ds_tensor for p in modules] + [places[name].tensor for name in names])
                    + whole
                )
            return size([*modules, *(places[name].tensor for name in names)])

        states = [value for state in engine.optimizer.state.values() for value in state.values()]
        return {
            **self.found,
            "parameters": lasting(trained),
            "frozen": lasting(places.keys() - trained),
            "optimizer": elements(states),
            "buffers": size(engine.method.buffers()),
        }


def measured(port: int) -> dict[str, Tensor]:
    """What every case holds and sends on this rank; on the first also what it is predicted
    to send.
    """
    dist.shutdown()
    os.environ["MASTER_PORT"] = str(port)
    found = {}
    with comm.joined():
        with watching() as watched:
            for case in RANKS[dist.world()]:
                calls = comm.count(recipe(case))
                found[case] = {"sent": [vars(call) for call in calls], "held": watched[-1].held()}
        if dist.main():
            silence()
            for case in RANKS[dist.world()]:
                found[case]["predicted"] = [vars(call) for call in comm.count(recipe(case))]
    return {case: torch.tensor(list(json.dumps(value).encode())) for case, value in found.items()}


def silence() -> None:
    """From now on this process mirrors itself. DeepSpeed keeps its groups, so they cannot be
    others.
    """
    comm._faked = lambda store: True  # type: ignore[assignment]
    for group in list(c10d.distributed_c10d._world.pg_map):
        if isinstance(group, comm.RecordingGroup):
            group.inner = None


@contextmanager
def watching(prepare: Callable[[Engine], object] = id) -> Iterator[list[Watched]]:
    """Collects the engines that are built inside."""
    build, watched = comm.build, list[Watched]()

    def watch(*args: Any) -> Engine:
        engine = build(*args)
        prepare(engine)
        watched.append(Watched(engine))
        return engine

    comm.build = watch
    try:
        yield watched
    finally:
        comm.build = build


Real = Callable[[int, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    """(ranks, case) -> what each rank held and sent."""
    runs = {}
    for world in RANKS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        runs[world] = ranks.run(world, measured, tmp_path_factory.mktemp(f"costs{world}"), port)
    return lambda world, case: [json.loads(bytes(found[case].tolist())) for found in runs[world]]


@pytest.mark.parametrize(("world", "case"), ALL)
def test_memory_is_what_real_ranks_hold(real: Real, world: int, case: str) -> None:
    predicted = memory.measure(recipe(case), world)["engines"][CASES[case][1]]
    fullest = Counter[str]()
    for found in real(world, case):
        fullest |= Counter(found["held"])
    assert predicted["activations"] == pytest.approx(fullest.pop("activations"), rel=0.01)
    assert {kind: predicted[kind] for kind in fullest} == dict(fullest)


@pytest.mark.parametrize(("world", "case"), ALL)
def test_messages_are_what_real_ranks_send(real: Real, world: int, case: str) -> None:
    first, *others = real(world, case)
    assert len(first["sent"]) > 10
    assert all(found["sent"] == first["sent"] for found in others)
    assert summary(first["predicted"]) == summary(
        first["sent"]
    )  # gradients of one layer may change places


def summary(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return comm.summary([comm.Call(**call) for call in calls])


@pytest.mark.parametrize(
    "case", ["ddp", "fsdp2 whole"]
)  # relicv2, and swav with stages that are run again
def test_many_views_take_two_forwards_and_one_message_per_norm_direction_and_size(
    case: str,
) -> None:
    """[4, 2] views. The target network sees the large views and no backward; the heads see all
    views at once.
    """
    forwards = Counter[int]()

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        forwards[args[0].shape[-1]] += 1

    with (
        comm.mirrored(6),
        watching(lambda engine: engine.method.backbone.register_forward_pre_hook(watch)) as watched,
    ):
        calls = comm.count(recipe(case))
    steps = comm.WARM + 1 + case.startswith("ddp")  # which warms up
    assert forwards == {16: steps, 8: steps}
    norms = Counter(
        name.split(".")[0]
        for name, m in watched[0].engine.method.named_modules()
        if isinstance(m, BatchNorm)
    )
    messages = {
        "backbone": 2 * 2,
        "projector": 2,
        "predictor": 2,
        "target_backbone": 1,
        "target_projector": 1,
    }
    sent = sum(call.reason == "batch norm" for call in calls)
    assert sent == sum(messages[network] * layers for network, layers in norms.items()) >= 50


def run(*arguments: str) -> Any:
    done = CliRunner(env={"RANK": None, "WORLD_SIZE": None}).invoke(
        cli.app, ["show", *arguments, "--json"]
    )
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_show_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """ResNet-50 4x: 375 million parameters and two heads on 64 ranks, of which nothing is
    allocated.
    """
    found = run("memory", str(CONFIGS / "byol_r50x4_in1k.yaml"), "--ranks", "64")
    engines = found["engines"]
    heads = sum(a * 4096 + 3 * 4096 + 4096 * 256 + 256 for a in (8192, 256))
    assert (found["batch"], found["ranks"], found["samples_per_rank"]) == (4096, 64, 64)
    assert round((engines["ddp"]["parameters"] / 4 - heads) / 1e6) == 375
    assert engines["zero 3"]["optimizer"] * 64 == pytest.approx(
        engines["ddp"]["optimizer"], rel=1e-3
    )
    assert len({held["activations"] for held in engines.values()}) == 1
    monkeypatch.setenv("COLUMNS", "80")
    memory.show(found)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].rstrip() == "byol, resnet50, fp32: GB of each of 64 ranks, 64 samples each"
    total = f"{sum(engines['zero 2'].values()) / 1e9:,.3f}"
    assert [line.split()[-1] for line in lines if line.startswith("zero 2")] == [total]
    monkeypatch.setenv("COLUMNS", "40")
    memory.show(found)
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 40
    assert narrow.isascii()
    assert {f"{sum(held.values()) / 1e9:,.3f}" for held in engines.values()} <= {*narrow.split()}


def test_show_comm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = (str(CONFIGS / "relicv2_r18_cifar10.yaml"), "batch=128", "model.width=0.25")
    found = run("comm", *recipe, "--ranks", "64")
    assert (found["engine"], found["ranks"], found["counted"]) == ("ddp", 64, False)
    largest = found["messages"][0]
    assert (largest["reason"], largest["kind"], largest["ranks"]) == ("gradients", "all_reduce", 64)
    assert largest["sent"] == round(largest["bytes"] * 2 * 63 / 64)
    monkeypatch.setenv("COLUMNS", "80")
    comm.show(found)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "a step of ddp on 64 ranks, batch 128, predicted"
    assert (
        f"gradients all_reduce 64 {largest['calls']} {largest['bytes'] / 1e6:,.3f} "
        f"{largest['sent'] / 1e6:,.3f}" in lines
    )
    monkeypatch.setenv("COLUMNS", "40")
    comm.show(found)
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 40
    assert {f"{row['sent'] / 1e6:,.3f}" for row in found["messages"]} <= {*narrow.split()}


@pytest.mark.parametrize("command", ["memory", "comm"])
def test_a_batch_that_does_not_divide_is_refused(command: str) -> None:
    done = CliRunner(env={"RANK": None, "WORLD_SIZE": None}).invoke(
        cli.app,
        ["show", command, str(CONFIGS / "byol_r18_cifar10.yaml"), "batch=64", "--ranks", "3"],
    )
    assert done.exit_code == 2
    assert "batch=64 does not divide over 3 ranks: choose another --ranks or batch" in done.output
