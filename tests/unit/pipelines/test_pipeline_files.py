"""What a pipeline file may say, and how everything else is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scaletrain.config import recipe
from scaletrain.config.recipe import ConfigError
from scaletrain.pipelines import load
from scaletrain.pipelines.load import Stage

# Divide and Contrast: an expert for each cluster, and a student of all
DIVIDED = """
options: {data: null, experts: 3}
stages:
- {name: student, train: r.yaml, set: {data.path: "${data}", teachers: "${expert.runs}"}}
- {name: base, train: r.yaml}
- name: clusters
  do: subset
  foreach: ${experts}
  set: {shards: "${data}", share: 10}
  after: [base]
- name: expert
  train: r.yaml
  foreach: ${experts}
  set: {seed: "${item}", data: {path: "${clusters.output}/subset.json"}}
  continue: ${base.run}
  resources: {nodes: 2}
- {name: last, do: evaluate, set: {target: "${expert-1.run}/checkpoints", benchmarks: [knn]}}
"""


def stages(tmp_path: Path, text: str, *words: str) -> dict[str, Stage]:
    (tmp_path / "r.yaml").write_text("method: byol\n")
    (tmp_path / "p.yaml").write_text(text)
    found = load.load(tmp_path / "p.yaml", tmp_path / "work", words).stages
    return {stage.name: stage for stage in found}


def test_a_pipeline_is_resolved_and_ordered(tmp_path: Path) -> None:
    found = stages(tmp_path, DIVIDED, "data=/d", "student.optim.lr=0.1", "experts=2")
    work = tmp_path / "work"
    assert list(found) == [
        "base",
        "clusters-0",
        "clusters-1",
        "expert-0",
        "expert-1",
        "student",
        "last",
    ]
    expert, student = found["expert-1"], found["student"]
    assert expert.overrides == ("seed=1", f'data={{"path": "{work}/clusters-1/subset.json"}}')
    assert (expert.folder, expert.continues) == (work / "expert-1", str(work / "base"))
    assert set(expert.inputs) == {"clusters-1", "base"}
    assert expert.resources.nodes == 2
    teachers = json.dumps([f"{work}/expert-0", f"{work}/expert-1"])
    assert student.overrides == ('data.path="/d"', f"teachers={teachers}", "optim.lr=0.1")
    assert found["clusters-0"].after == ("base",)
    assert found["clusters-0"].inputs == ()
    assert found["clusters-0"].config.share == 10  # type: ignore[union-attr]
    assert found["last"].config.target == f"{work}/expert-1/checkpoints"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stages: []", "stages: Tuple should have at least 1 item"),
        ("stages: [{name: a, train: r.yaml, cotinue: x}]", "did you mean 'continue'?"),
        ("stages: [{name: a, train: r.yaml, resources: {node: 1}}]", "did you mean 'nodes'?"),
        ("stages: [{name: A-1, train: r.yaml}]", "'A-1' is not a name"),
        ("stages: [{name: item, train: r.yaml}]", "'item' is not a name"),
        ("stages: [{name: a}]", "give exactly one of `train` and `do`"),
        ("stages: [{name: a, train: r.yaml, do: subset}]", "give exactly one of `train` and `do`"),
        ("stages: [{name: a, train: r.yaml}, {name: a, do: subset}]", "'a' names two stages"),
        ("stages: [{name: a, do: subset, init: x}]", "belong to a stage with `train`"),
        ("stages: [{name: a, train: r.yaml, init: x, continue: y}]", "exclude each other"),
        ("stages: [{name: a, train: absent}]", "stage 'a': there is neither a file nor a recipe"),
        ("stages: [{name: a, do: subsett}]", "unknown computation 'subsett' (did you mean"),
        ("stages: [{name: a, do: subset, set: {shards: s, shar: 1}}]", "did you mean 'share'?"),
        ("stages: [{name: a, do: subset, set: {shards: s}}]", "exactly one of share and per_class"),
        ("stages: [{name: a, train: r.yaml, after: [b]}]", "unknown stage 'b'; available: a"),
        (
            'stages: [{name: a, train: r.yaml, init: "${b.run}"}]',
            "stage 'a': the reference ${b.run}: unknown stage 'b'",
        ),
        ('stages: [{name: a, train: r.yaml, init: "${daat}"}]\noptions: {data: 1}', "'data'?"),
        ('stages: [{name: a, train: r.yaml, init: "${item}"}]', "${item} needs `foreach`"),
        ('stages: [{name: a, train: r.yaml, init: "${a.ran}"}]', "did you mean 'run'?"),
        (
            'stages: [{name: a, train: r.yaml}, {name: b, train: r.yaml, init: "${a.output}"}]',
            "stage 'a' has no output; ${a.run} is its folder",
        ),
        (
            "stages: [{name: a, train: r.yaml, foreach: 2}, "
            '{name: b, train: r.yaml, foreach: 3, init: "${a.run}"}]',
            "'a' has 2 stages; ${a.runs} is the list of all, and ${a-0.run} is one of them",
        ),
        (
            "stages: [{name: a, train: r.yaml, foreach: 2}, "
            '{name: b, train: r.yaml, init: "x${a.runs}"}]',
            "${a.runs} is a list and cannot be a part of",
        ),
        ("stages: [{name: a, train: r.yaml, foreach: 0}]", "foreach is a number of at least 1"),
        ("stages: [{name: a, train: r.yaml, foreach: []}]", "foreach is a number of at least 1"),
        ("stages: [{name: a, train: r.yaml, foreach: 1000000000}]", "more than 1000 stages"),
        (
            "stages: [{name: a, train: r.yaml, after: [c]}, {name: b, train: r.yaml, after: [a]}, "
            "{name: c, train: r.yaml, after: [b]}]",
            "stages need each other: a -> c -> b -> a",
        ),
        (
            "options: {data: null}\nstages: [{name: a, train: r.yaml}]",
            "the option 'data' has no value: add data=VALUE",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        stages(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'p.yaml'}: ")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("dat=1", "'dat=1' changes no option and no stage; did you mean 'data'?"),
        ("bas.seed=1", "did you mean 'base'?"),
        ("base=1", "changes no option and no stage"),
        ("base.seed", "an override has the form"),
    ],
)
def test_a_change_of_nothing_is_refused(tmp_path: Path, word: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        stages(tmp_path, DIVIDED, "data=/d", word)
    assert says in str(error.value)


def test_pipelines_are_found_by_name_and_their_stages_have_recipes(tmp_path: Path) -> None:
    names = [path.stem for path in sorted((recipe.CONFIGS / "pipelines").glob("*.yaml"))]
    assert "rotation_finetune_cifar10" in names
    for name in names:
        assert load.find(name) == recipe.CONFIGS / "pipelines" / f"{name}.yaml"
        assert load.load(name, tmp_path, ["data=/d"]).stages
    with pytest.raises(
        ConfigError, match=r"nor a pipeline named 'rotation'; available: .*rotation"
    ):
        load.find("rotation")
