"""Networks of the timm library as backbones: same function, our batch norm in them, and a clear
word where one does not fit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from kit import evals as evals_kit
from kit import ranks, small
from torch import Tensor, nn
from typer.testing import CliRunner

from scaletrain.checkpoint import files
from scaletrain.cli import main as cli
from scaletrain.config import load
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config, ModelConfig
from scaletrain.core import DeferredState
from scaletrain.evals.encoders import targets
from scaletrain.nn import backbone
from scaletrain.nn.norm import BatchNorm, per_view
from scaletrain.optim.groups import parameter_groups

# plain norms; norms fused with their activation; other eps and momentum; a wider output than the
# last stage; no batch norm
NETWORKS = (
    "resnet10t",
    "regnetx_002",
    "tf_mobilenetv3_small_minimal_100",
    "mobilenetv3_small_050",
    "convnext_atto",
)
OURS = {"width": 1, "stem": "imagenet", "zero_init": False}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_equals_timms(name: str) -> None:
    torch.manual_seed(0)
    ours = backbone.build(ModelConfig(name=f"timm/{name}")).double()
    theirs = timm.create_model(name, pretrained=False, num_classes=0).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    x = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    outputs = [model(x) for model in (ours, theirs)]
    assert outputs[0].shape == (6, ours.features)
    for y in outputs:
        y.square().mean().backward()
    for module in ours.modules():
        if isinstance(module, DeferredState):
            module.commit()
    torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-8)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-8, msg=key)
    for (key, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=key)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_keeps_its_momentum_and_its_lack_of_scale(affine: bool) -> None:
    theirs = nn.BatchNorm2d(4, momentum=0.3, affine=affine)
    ours = backbone._ours(theirs, ModelConfig())
    x = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.commit()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    with pytest.raises(
        ConfigError, match="normalises by a BatchNorm2d that we have no replacement for"
    ):
        backbone._ours(
            nn.BatchNorm2d(4, momentum=None), ModelConfig()
        )  # a plain mean over all steps


def test_views_and_groups_reach_its_norms() -> None:
    net = backbone.build(ModelConfig(name="timm/mobilenetv3_small_050", norm_group=3)).double()
    x = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64)
    alone = torch.stack([torch.cat([net(group) for group in view.split(3)]) for view in x])
    torch.testing.assert_close(per_view(net, x), alone, rtol=1e-9, atol=1e-9)


def test_its_norms_are_neither_decayed_nor_adapted() -> None:
    engine = small.engine(settings(0), perturb=False)
    exempt = {
        name
        for group in parameter_groups(engine.method, settings(0).optim)
        if not group["adapt"]
        for name in group["names"]
    }
    norms = {
        name for name, module in engine.method.named_modules() if isinstance(module, BatchNorm)
    }
    assert {f"{name}.weight" for name in norms if not name.startswith("target")} <= exempt


def settings(group: int) -> Config:
    cfg: Config = small.config(
        "byol", model={**OURS, "name": "timm/mobilenetv3_small_050", "norm_group": group}
    )
    return cfg


def train(group: int) -> dict[str, Tensor]:
    cfg = settings(group)
    engine = small.engine(cfg)
    losses = small.run(engine, cfg, 0, 1)
    state = {name: t.double() for name, t in engine.method.state_dict().items()}
    return {"loss": torch.tensor(losses, dtype=torch.float64), **state}


def both() -> dict[str, Tensor]:
    return {f"{group}/{name}": t for group in (0, 6) for name, t in train(group).items()}


def test_ranks_do_not_matter(tmp_path: Path) -> None:
    """Cross-rank statistics and groups of the global batch: two ranks compute what one process
    does.
    """
    one = both()
    for two in ranks.run(2, both, tmp_path):
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-8, atol=1e-8, msg=name)
    assert not torch.equal(one["0/loss"], one["6/loss"])  # the groups do something


def test_its_export_loads_into_timm_and_is_judged(tmp_path: Path) -> None:
    cfg = evals_kit.settings("data", **{**OURS, "name": "timm/resnet10t"})
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(load.dump(cfg))
    torch.manual_seed(1)
    trained = backbone.build(cfg.model).eval()
    evals_kit.save(run, 7, trained.state_dict())
    file = tmp_path / "encoder.safetensors"
    done = CliRunner().invoke(cli.app, ["export", str(run), str(file)])
    assert done.exit_code == 0, done.output
    tensors, meta = files.load_file(file)
    assert json.loads(meta["model"])["name"] == "timm/resnet10t"
    theirs = timm.create_model("resnet10t", pretrained=False, num_classes=0).eval()
    theirs.load_state_dict(tensors, strict=True)
    x = torch.randn(2, 3, 32, 32)
    for model in (theirs, targets.find(file).module, targets.find(run).module):
        torch.testing.assert_close(model(x), trained(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "timm/resnet50q"}, r"timm has no 'resnet50q'; did you mean 'resnet50"),
        ({"name": "timm/hf-hub:someone/resnet18"}, r"timm has no 'hf-hub:someone/resnet18'"),
        ({"name": "timm/densenet121"}, r"timm/densenet121: its layers are named 'features'"),
        ({"name": "timm/levit_128s"}, r"timm/levit_128s normalises by a BatchNorm1d"),
        (
            {"width": 2},
            r"model\.width=2\.0 is for our own ResNets; with model\.name=timm/resnet18 leave it at "
            r"1\.0",
        ),
        ({"stem": "cifar"}, r"model\.stem=cifar .* leave it at imagenet"),
        ({"sk": True}, r"model\.sk=True .* leave it at False"),
        ({"zero_init": True}, r"model\.zero_init=True .* leave it at False"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        backbone.build(ModelConfig(**{"name": "timm/resnet18", **options}))


def test_without_timm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(
        ConfigError, match=r"timm/resnet18 needs the timm library: pip install timm"
    ):
        backbone.build(ModelConfig(name="timm/resnet18"))
    assert backbone.build(ModelConfig(name="resnet18", width=0.125)).features == 64
