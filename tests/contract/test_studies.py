"""Every study of configs/studies is a grid of the recipe that its head names, and each of its runs
is a valid configuration.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scaletrain.config import load
from scaletrain.config.recipe import ConfigError
from scaletrain.report import grid
from scaletrain.train.build import build_method, run_info_of

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


def test_there_are_studies() -> None:
    assert {"simclr_false_negatives", "byol_good_crops", "relicv2_views", "relicv2_negatives"} <= {
        p.stem for p in STUDIES
    }


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_runs(path: Path) -> None:
    head = " ".join(
        line.strip("# \\") for line in path.read_text().splitlines() if line.startswith("#")
    )
    command = re.search(
        rf"--grid configs/studies/{path.name} +--config (\S+) data\.path=SHARDS/train ?(\S*=\S*)?",
        head,
    )
    assert command, "the head gives the command"
    assert "Published" in head
    small = (
        "model.name=resnet18",
        "model.width=0.0625",
        "data.path=synthetic",
        *filter(None, command.groups()[1:]),
    )
    elements = grid.combinations([str(path)], 1)
    assert len(elements) > 1
    listed = re.search(r"Published[^.]*?: ((?:\d\d\.\d+, )+\d\d\.\d+) %", head)
    assert path.stem == "relicv2_box_masks" or (
        listed and len(listed[1].split(", ")) == len(elements)
    ), "a figure for each run"
    for overrides in elements:
        chosen = load.load(ROOT / command[1], (*small, *overrides))
        build_method(chosen, run_info_of(chosen, 5000, 1))
        assert len(grid.folder(Path(), overrides).name) < 255


def studied(name: str, *keys: str) -> list[tuple[object, ...]]:
    """What the runs of a study have in `keys` of the method and the data."""
    found = []
    for overrides in grid.combinations([str(ROOT / "configs" / "studies" / f"{name}.yaml")], 1):
        chosen = load.load(
            ROOT / "configs" / "relicv2_r50_in1k_100ep.yaml",
            ("data.foreground.masks=true", *overrides),
        )
        values = {**chosen.data.foreground.model_dump(), **chosen.method.model_dump()}
        found.append(tuple(values[key] for key in keys))
    return found


def test_a_study_of_tau_keeps_it() -> None:
    assert all(start == end for start, end in studied("relicv2_ema", "tau", "tau_end"))


@pytest.mark.parametrize("kind", ["points", "rectangle", "centred", "add", "remove", "box"])
def test_studies_of_masks_mask_as_many_views_in_every_run(kind: str) -> None:
    runs = studied(
        f"relicv2_{kind}_masks", "study", "study_share", "mask_minimum", "mask_probability"
    )
    assert all(run[2:] == (0, 0.1) for run in runs)
    if kind == "box":
        assert [run[0] for run in runs] == ["box", ""]
    else:
        last = 10 if kind in ("add", "remove") else 9
        assert [run[:2] for run in runs] == [(kind, share / 10) for share in range(1, last + 1)]


def test_views_of_the_study() -> None:
    recipe = ROOT / "configs" / "relicv2_r50_in1k.yaml"
    found = [
        run_info_of(load.load(recipe, overrides), 5000, 1).views
        for overrides in grid.combinations([str(ROOT / "configs/studies/relicv2_views.yaml")], 1)
    ]
    pairs = [(2, 0), (2, 2), (2, 6), (4, 0), (4, 2), (6, 2), (8, 2)]
    assert found == [
        ((224, large), (96, small)) if small else ((224, large),) for large, small in pairs
    ]


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    for text in ("", "a: 1\n", "- optim.lr=1\n", "- [optim.lr]\n", "- []\n", "- [1]\n"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match="write a list of lists of overrides"):
            grid.combinations([str(tmp_path / "x.yaml")], 1)
    with pytest.raises(ConfigError, match="No such file"):
        grid.combinations([str(tmp_path / "y.yaml")], 1)
