"""What the file of a method must contain and must not, and that a new method needs no other file to
be changed.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
import test_methods as contract
from kit import small

from scaletrain.config import load, recipe
from scaletrain.config.schema import ComponentConfig, component_config, components
from scaletrain.report import catalogue
from scaletrain.train.build import build_method, run_info_of

METHODS = components("methods")
ROOT = Path(__file__).parents[2]
FOLDER = Path(importlib.import_module("scaletrain.methods").__path__[0])
each_method = pytest.mark.parametrize("method", METHODS)


def test_the_folder_is_listed() -> None:
    assert {p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "base")} == set(
        METHODS
    )
    assert {"byol", "deepcluster_v2", "relicv2", "simclr", "swav"} <= set(METHODS)


# What one sitting of reading takes: some 100 lines of a method, and as many again of documented
# options, blank lines between the steps and imports.
LINES = 200
FORBIDDEN = {
    r"torch\.distributed|\bc10d\b": "torch.distributed: go through scaletrain.dist",
    r"scaletrain(\.| import .*\b)(engines|data|monitor|train)\b": "a package to its right",
    r"\.cuda\(|\.cpu\(|\bis_cuda\b|[\"'](cuda|cpu)[\"':]": "a device by name",
    r"device=(?!\w+(\.\w+)*\.device\b)|\bself\.device\b|torch\.device\(": "a device other than a "
    "tensor's own",
    r"\bif\b[^:\n]*\b(distributed|is_initialized)\b": "a decision about ranks",
    r"\bif\b[^:\n]*\b(rank|world|main)\(\)": "a decision about ranks",
    r"\bprint\(|\blogging\b|\blog\.(info|warning)\b": "logging",
    r"torch\.(manual_seed|rand\w*|bernoulli)\b|\.(bernoulli_|random_)\(": "unkeyed chance",
    r"\bF\.dropout|\bnn\.Dropout": "unkeyed chance",
    r"math\.(cos|pi)\b": "schedule arithmetic: Clock has it",
}


def faults(source: str) -> list[str]:
    """What a method's file must not contain; comments and texts do not count."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body[0] = ast.Pass()
    code = ast.unparse(tree)
    found = [why for pattern, why in FORBIDDEN.items() if re.search(pattern, code)]
    if len(source.splitlines()) > LINES:
        found.append("too long")
    return found


@each_method
def test_the_file_reads_alone_like_the_papers_algorithm(method: str) -> None:
    source = (FOLDER / f"{method}.py").read_text()
    assert faults(source) == []
    assert ast.get_docstring(ast.parse(source)), "the first line cites the paper"


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as c10d",
        "from torch.distributed import all_reduce",
        "from scaletrain.engines import ddp",
        "from scaletrain.train import monitor",
        "x = x.cuda()",
        "x = x.to('cuda:0')",
        "x = torch.zeros(3, device='meta')",
        "x = torch.zeros(3, device=self.device)",
        "if distributed:\n    pass",
        "if dist.world() > 1:\n    pass",
        "y = x if dist.rank() == 0 else z",
        "print(x)",
        "x = torch.randn(3)",
        "lr = math.cos(math.pi * t)",
        "\n" * (LINES + 1),
    ],
)
def test_a_forbidden_line_is_found(source: str) -> None:
    assert faults(source)


def test_an_allowed_file_passes() -> None:
    code = '"""No torch.distributed here."""\nfrom scaletrain import dist\n'
    assert (
        faults(
            code + "x = torch.arange(3, device=keys.device) + dist.rank() * 3 / dist.world()  # if "
            "distributed"
        )
        == []
    )


@each_method
def test_the_defaults_are_valid_and_say_their_name(method: str) -> None:
    """Only pretraining needs no options; what others require is in their `miniature`."""
    config = component_config("methods", method)
    assert issubclass(config, ComponentConfig)
    assert config.__module__ == f"scaletrain.methods.{method}"
    fields = config.model_fields.items()
    required = {key for key, field in fields if field.is_required()} - {"name"}
    assert not required or not small.pretrains(method)
    options = {"name": method, **{key: config.miniature[key] for key in required}}
    assert config.model_validate(options) == load.build({"method": options}).method
    with pytest.raises(recipe.ConfigError, match="nonsense"):
        load.build({"method": {"name": method, "nonsense": 1}})


@each_method
def test_two_views_are_declared(method: str) -> None:
    """A method that takes exactly two views refuses further ones; any other trains with them."""
    model = importlib.import_module(f"scaletrain.methods.{method}").Model
    further = small.config(method, data={"views": [{"size": 16, "count": 2}, {"size": 8}]})
    info = run_info_of(further, small.SAMPLES, small.STEPS_PER_EPOCH)
    if model.two_views:
        with pytest.raises(ValueError, match=f"method {method} takes (exactly )?two views"):
            build_method(further, info)
    else:
        build_method(further, info)


# --- a new method ---------------------------------------------------------------------------------

TOY = '''"""Toy: both views of a sample attract (Nobody, 2026)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from scaletrain.config.schema import ComponentConfig, Count
from scaletrain.core import Backbone, Batch, Clock, MethodOutput, RunInfo
from scaletrain.methods.base import Projected
from scaletrain.nn.heads import mlp
from scaletrain.nn.norm import per_view
from scaletrain.ops.contrastive import cosine_distance


class Config(ComponentConfig):
    dim: Count = 2048

    miniature: ClassVar[Mapping[str, Any]] = {"dim": 8}


class Model(Projected):
    """Two views; the distance of their projections is the loss."""

    kind = "joint"
    two_views = True

    def __init__(
        self, config: Config, make_backbone: Callable[[], Backbone], run_info: RunInfo
    ) -> None:
        super().__init__(make_backbone, lambda width: mlp((width, config.dim, 4)), run_info)

    def forward(self, batch: Batch, clock: Clock) -> MethodOutput:
        h = per_view(self.backbone, batch.views[0])
        z1, z2 = per_view(self.projector, h)
        return MethodOutput({"all": cosine_distance(z1, z2)}, {}, h[0].detach())
'''


def add(name: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a method of this source into a folder and make it known."""
    (folder / f"{name}.py").write_text(source)
    methods = importlib.import_module("scaletrain.methods")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, f"scaletrain.methods.{name}", raising=False)


def test_a_new_method_is_a_file_and_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything else finds it: configuration, catalogue, and what the suite asks of each method.
    Beside these two it needs a reference test, its golden values (`make golden`) and a line of the
    changelog.
    """
    add("toy", TOY, tmp_path, monkeypatch)
    (tmp_path / "toy_r50_in1k.yaml").write_text(
        f"published: 1 % (nowhere)\nbase: {ROOT / 'configs/base/in1k.yaml'}\nmethod: toy\n"
    )
    assert components("methods") == tuple(sorted([*METHODS, "toy"]))
    assert faults(TOY) == []
    test_the_defaults_are_valid_and_say_their_name("toy")
    test_two_views_are_declared("toy")

    (entry,) = (e for e in catalogue.entries("methods", tmp_path) if e.name == "toy")
    assert (entry.paper, entry.kind) == (TOY[3:].partition('"""')[0], "joint")
    assert entry.recipes == {"toy_r50_in1k": "1 % (nowhere)"}
    assert load.load(tmp_path / "toy_r50_in1k.yaml").method.name == "toy"

    contract.test_forward_only_stages_what_it_would_write("toy")
    contract.test_what_forward_returns("toy")
    contract.test_targets_are_moved_by_their_average_alone("toy")
    contract.test_groups_take_parameters("toy")


STUDENT = (
    TOY.replace('kind = "joint"', 'kind = "distillation"')
    .replace("    dim: Count = 2048\n", "    teacher: str\n    dim: Count = 2048\n")
    .replace('{"dim": 8}', '{"dim": 8, "teacher": "run"}')
    .replace(
        "config.dim, 4)), run_info)\n",
        "config.dim, 4)), run_info)\n"
        "        self.teacher = make_backbone().eval().requires_grad_(False)\n",
    )
)


def test_a_method_of_another_kind_may_require_options_and_keep_a_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pretraining, both would be faults."""
    add("toy_student", STUDENT, tmp_path, monkeypatch)
    test_the_defaults_are_valid_and_say_their_name("toy_student")
    contract.test_targets_are_moved_by_their_average_alone("toy_student")
    model = importlib.import_module("scaletrain.methods.toy_student").Model
    monkeypatch.setattr(model, "kind", "joint")
    for test in (
        test_the_defaults_are_valid_and_say_their_name,
        contract.test_targets_are_moved_by_their_average_alone,
    ):
        with pytest.raises(AssertionError):
            test("toy_student")


def test_no_other_file_lists_the_methods() -> None:
    """A file that must name every method would have to be changed for a new one. What is optional
    is left out: documents, and benchmarks/methods.yaml.
    """
    allowed = re.compile(
        r"configs/\w+\.yaml|scaletrain/methods/\w+\.py|tests/golden/methods/\w+\.json"
        r"|tests/reference/\w+\.py|benchmarks/methods\.yaml"
    )
    # the latest methods, of which no other test makes an example
    names = re.compile(r"\b(c_byol|c_simclr|pirl_\w+|supcon_\w+|nnclr_\w+|triplet_\w+)\b")
    found = []
    for folder in ("scaletrain", "configs", "tests", "launchers", "shards", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            name = str(path.relative_to(ROOT))
            if path.suffix in (".py", ".json", ".yaml") and not allowed.fullmatch(name):
                found += [name] if names.search(path.read_text()) and path != Path(__file__) else []
    assert found == []
