"""Every study of configs/studies is a grid of the recipe that its head names, and each of its runs is a valid configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scaletrain import config
from scaletrain.recipe import ConfigError
from scaletrain.slurm import grid
from scaletrain.train import build_method, facts_of

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


def test_there_are_studies() -> None:
    assert {"simclr_false_negatives", "byol_good_crops", "relicv2_views", "relicv2_negatives"} <= {p.stem for p in STUDIES}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_runs(path: Path) -> None:
    head = " ".join(line.strip("# \\") for line in path.read_text().splitlines() if line.startswith("#"))
    command = re.search(rf"--grid configs/studies/{path.name} +--config (\S+) data\.path=SHARDS/train ?(\S*=\S*)?", head)
    assert command, "the head gives the command"
    assert "Published" in head
    small = ("model.name=resnet18", "model.width=0.0625", "data.path=synthetic", *filter(None, command.groups()[1:]))
    elements = grid.combinations([str(path)], 1)
    assert len(elements) > 3
    for overrides in elements:
        chosen = config.load(ROOT / command[1], (*small, *overrides))
        build_method(chosen, facts_of(chosen, 5000, 1))
        assert len(grid.folder(Path(), overrides).name) < 255


def test_views_of_the_study() -> None:
    recipe = ROOT / "configs" / "relicv2_r50_in1k.yaml"
    found = [
        facts_of(config.load(recipe, overrides), 5000, 1).views
        for overrides in grid.combinations([str(ROOT / "configs/studies/relicv2_views.yaml")], 1)
    ]
    pairs = [(2, 0), (2, 2), (2, 6), (4, 0), (4, 2), (6, 2), (8, 2)]
    assert found == [((224, large), (96, small)) if small else ((224, large),) for large, small in pairs]


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    for text in ("", "a: 1\n", "- optim.lr=1\n", "- [optim.lr]\n", "- []\n", "- [1]\n"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match="write a list of lists of overrides"):
            grid.combinations([str(tmp_path / "x.yaml")], 1)
    with pytest.raises(ConfigError, match="No such file"):
        grid.combinations([str(tmp_path / "y.yaml")], 1)
