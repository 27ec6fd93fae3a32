"""Which weights are evaluated, and that those of another model are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kit.evals import backbone, run_folder, save, settings

from scaletrain.checkpoint import files
from scaletrain.config import load, schema
from scaletrain.evals.encoders import targets
from scaletrain.evals.encoders.targets import find
from scaletrain.evals.errors import EvalError
from scaletrain.nn import resnet
from scaletrain.nn.norm import BatchNorm


def same(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    mine = module.state_dict()
    return set(mine) == set(state) and all(torch.equal(mine[name], state[name]) for name in state)


def test_the_newest_step_or_the_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path, "train", step=7)
    old, new = backbone(settings("train")), backbone(settings("train"), seed=12)
    save(run, 9, new)
    latest, named = find(run), find(run / "checkpoints" / "step-00000007")
    assert (latest.step, named.step) == (9, 7)
    assert same(latest.module, new)
    assert same(named.module, old)
    monkeypatch.chdir(run / "checkpoints")
    relative = find(Path("step-00000007"))
    assert relative.run == run
    assert relative.home == run / "evals"
    assert not latest.module.training
    assert not any(p.requires_grad for p in latest.module.parameters())


def test_an_exported_file_needs_no_run(tmp_path: Path) -> None:
    cfg = settings("somewhere")
    state = backbone(cfg)
    files.export(state, tmp_path / "a.safetensors", targets.describe(cfg, 42))
    subject = find(tmp_path / "a.safetensors")
    assert same(subject.module, state)
    assert (subject.step, subject.size, subject.run, subject.home) == (42, 16, None, tmp_path)
    assert (subject.data.mean, subject.data.std, subject.data.path) == (
        cfg.data.mean,
        cfg.data.std,
        cfg.data.path,
    )


@pytest.mark.parametrize(
    "views", [((16, 2), (32, 2)), ((32, 2), (16, 2)), ((64, 0), (16, 4), (32, 1))]
)
def test_the_size_is_that_of_the_largest_view_in_use(
    tmp_path: Path, views: tuple[tuple[int, int], ...]
) -> None:
    """In the order of the recipe, of a run and of a file; a file keeps the size that it was
    exported with.
    """
    listed = tuple(schema.View(size=size, count=count) for size, count in views)
    run = run_folder(tmp_path, "train", views=listed, max_pixels=1234, on_bad="skip")
    assert find(run).size == find(run, "untrained").size == find(run, "pixels").size == 32
    cfg = load.load(run / "config.yaml")
    files.export(backbone(cfg), tmp_path / "new.safetensors", targets.describe(cfg, 1))
    new = find(tmp_path / "new.safetensors")
    assert (new.size, new.data.max_pixels, new.data.on_bad) == (32, 1234, "skip")
    facts = {
        "size": 48,
        "mean": cfg.data.mean,
        "std": cfg.data.std,
        "path": "x",
    }  # as all files had them once
    old = targets.describe(cfg, 1) | {"data": json.dumps(facts)}
    files.export(backbone(cfg), tmp_path / "old.safetensors", old)
    assert (
        find(tmp_path / "old.safetensors").size,
        find(tmp_path / "old.safetensors").data.on_bad,
    ) == (48, "raise")
    for size in (7, 10**9, "large"):
        files.export(
            backbone(cfg),
            tmp_path / "odd.safetensors",
            old | {"data": json.dumps(facts | {"size": size})},
        )
        with pytest.raises(EvalError, match=r"odd\.safetensors: its metadata does not describe"):
            find(tmp_path / "odd.safetensors")


def test_weights_are_known_by_name_type_shape_and_value(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "train")
    first = find(run).weights
    assert (
        first
        == find(run / "checkpoints" / "step-00000007").weights
        != find(run, "untrained").weights
    )
    state = backbone(settings("train"))
    name = "layer1.0.conv1.weight"
    save(run, 8, state | {name: state[name] + 1e-6})
    assert find(run).weights != first
    save(run, 9, state)
    assert find(run).weights == first


def test_untrained_is_the_seed_alone(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "train")
    torch.manual_seed(3)  # the run's seed
    fresh = resnet.ResNet(settings("train").model).state_dict()
    state = torch.get_rng_state()
    subject = find(run, "untrained")
    assert torch.equal(torch.get_rng_state(), state)
    assert same(subject.module, fresh)
    assert subject.step == 0
    norms = [m for m in subject.module.modules() if isinstance(m, BatchNorm)]
    assert len(norms) == 20
    assert all((m.running_mean == 0).all() and (m.running_var == 1).all() for m in norms)


def test_pixels_are_the_flat_image(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    subject = find(run_folder(tmp_path, "train"), "pixels")
    torch.testing.assert_close(subject.module(x), x.reshape(2, 768) / 768**0.5)
    assert (subject.step, subject.size) == (0, 16)


def test_baselines_need_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(load.dump(settings("train")))
    assert find(tmp_path, "untrained").step == find(tmp_path, "pixels").step == 0
    with pytest.raises(EvalError, match="no good checkpoint yet"):
        find(tmp_path)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"layer1.0.conv1.weight": torch.zeros(8, 4, 3, 3)},
            r"'layer1.0.conv1.weight' is \[8, 4, 3, 3\], .* \[4, 4, 3, 3\]",
        ),
        (
            {"layer1.0.conv1.weight": None, "layer4.1.bn2.bias": None},
            r"no tensor 'layer1.0.conv1.weight' \[4, 4, 3, 3\]",
        ),
        ({"fc.weight": torch.zeros(10, 32)}, r"has no tensor 'fc.weight' \[10, 32\]"),
    ],
)
def test_another_model_is_refused_by_name(
    tmp_path: Path, change: dict[str, torch.Tensor | None], text: str, exported: bool
) -> None:
    cfg = settings("train")
    state = {name: t for name, t in {**backbone(cfg), **change}.items() if t is not None}
    target = run_folder(tmp_path, "train")
    if exported:
        target = tmp_path / "a.safetensors"
        files.export(state, target, targets.describe(cfg, 1))
    else:
        save(target, 8, state)
    with pytest.raises(EvalError, match=text) as error:
        find(target)
    assert str(target) in str(error.value)


def test_a_file_that_does_not_tell_its_model(tmp_path: Path) -> None:
    files.export(backbone(settings("train")), tmp_path / "a.safetensors", {})
    with pytest.raises(EvalError, match=r"a\.safetensors: its metadata .*scaletrain export"):
        find(tmp_path / "a.safetensors")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="neither a run folder"):
        find(tmp_path)
