"""Which weights are judged, and that those of another model are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evals_kit import backbone, run_folder, save, settings

from scaletrain import checkpoint, config
from scaletrain.evals import targets
from scaletrain.evals.targets import EvalError, find
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
    checkpoint.export(state, tmp_path / "a.safetensors", targets.describe(cfg, 42))
    subject = find(tmp_path / "a.safetensors")
    assert same(subject.module, state)
    assert (subject.step, subject.size, subject.run, subject.home) == (42, 16, None, tmp_path)
    assert (subject.data.mean, subject.data.std, subject.data.path) == (cfg.data.mean, cfg.data.std, "somewhere")


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
    (tmp_path / "config.yaml").write_text(config.dump(settings("train")))
    assert find(tmp_path, "untrained").step == find(tmp_path, "pixels").step == 0
    with pytest.raises(EvalError, match="no good checkpoint yet"):
        find(tmp_path)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(8, 4, 3, 3)}, r"'layer1.0.conv1.weight' is \[8, 4, 3, 3\], .* \[4, 4, 3, 3\]"),
        ({"layer1.0.conv1.weight": None, "layer4.1.bn2.bias": None}, r"no tensor 'layer1.0.conv1.weight' \[4, 4, 3, 3\]"),
        ({"fc.weight": torch.zeros(10, 32)}, r"the model has no tensor 'fc.weight' \[10, 32\]"),
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
        checkpoint.export(state, target, targets.describe(cfg, 1))
    else:
        save(target, 8, state)
    with pytest.raises(EvalError, match=text) as error:
        find(target)
    assert str(target) in str(error.value)


def test_a_file_that_does_not_tell_its_model(tmp_path: Path) -> None:
    checkpoint.export(backbone(settings("train")), tmp_path / "a.safetensors", {})
    with pytest.raises(EvalError, match=r"a\.safetensors: its metadata .*scaletrain export"):
        find(tmp_path / "a.safetensors")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="neither a run folder"):
        find(tmp_path)
