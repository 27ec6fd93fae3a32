"""What the monitor is shown of similarities, codes and clusters: right by hand, the same over
ranks, telling in collapse.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from kit import ranks, small
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from scaletrain.config import load, schema
from scaletrain.config.recipe import ConfigError
from scaletrain.core import Clock
from scaletrain.nn.clusters import Assignments
from scaletrain.ops.contrastive import similarities

CLOCK = Clock(0, 20, 0, small.STEPS_PER_EPOCH)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_similarities(n: int) -> None:
    a, b = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(n))
    own = [cosine_similarity(a[i], b[i], 0).item() for i in range(n)]
    others = [cosine_similarity(a[i], b[j], 0).item() for i in range(n) for j in range(n) if i != j]
    shown = similarities(a.requires_grad_(), b)
    assert shown["positive_similarity"].item() == pytest.approx(sum(own) / n, abs=1e-6)
    assert shown["negative_similarity"].item() == pytest.approx(
        sum(others) / max(1, len(others)), abs=1e-6
    )
    assert not any(value.requires_grad for value in shown.values())


def test_swav_shows_collapse() -> None:
    """Samples that all look alike: codes and loss are ln K, and one prototype is everybody's
    nearest.
    """
    cfg = small.config("swav", engine={"precision": "fp64"}, method={"freeze_steps": 0})
    model = small.engine(cfg).method
    z = normalize(
        torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        dim=-1,
    )
    prototypes = model.prototypes.weight.detach()
    _, healthy = model._loss(z, prototypes, CLOCK)  # type: ignore[operator]
    loss, collapsed = model._loss(z[:, :1].expand_as(z), prototypes, CLOCK)  # type: ignore[operator]
    # The three steps of Sinkhorn-Knopp end with columns, so it is even only nearly.
    assert collapsed["code_entropy"].item() == pytest.approx(math.log(6), abs=0.02)
    assert healthy["code_entropy"].item() < 0.9 * math.log(6)
    assert loss.item() > 0.9 * math.log(6)
    assert collapsed["prototypes_used"].item() <= 2 / 6
    assert healthy["prototypes_used"].item() > 0.8


LABELS = torch.tensor([0, 0, 1, 3, 3, -1, 0, 1, 0, 3, 0])  # of five clusters
EARLIER = torch.tensor([2, 2, 1, 4, 4, 4, 2, 1, 2, 4, -1])  # the same under other names


def clusterings() -> dict[str, Tensor]:
    clusters = Assignments(len(LABELS), [4, 5])
    for labels in (EARLIER, LABELS):
        mine = labels[clusters.start : clusters.start + len(clusters.rows)]
        sizes = clusters.renew(1, mine)
    return {
        "sizes": sizes,
        **{name: value[1] for name, value in clusters.named_buffers() if name != "rows"},
    }


def test_clusters_are_described_alike_by_any_number_of_ranks(tmp_path: Path) -> None:
    alone = clusterings()
    assert alone["sizes"].tolist() == [5, 2, 0, 3, 0]
    assert alone["largest"].item() == pytest.approx(0.5)
    assert alone["empty"].item() == pytest.approx(0.4)
    assert alone["nmi"].item() == pytest.approx(1)
    for found in ranks.run(3, clusterings, tmp_path):
        torch.testing.assert_close(found, alone)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["data.foreground.study=points"],
            r"study needs the foreground; add data\.foreground\.masks=true",
        ),
        (
            ["data.foreground.good_crops=0.5"],
            r"good_crops needs the foreground; add data\.foreground\.masks=true",
        ),
        (
            ["method=byol", "method.mask_probability=0.2"],
            r"mask_probability needs the foreground; add data\.foreground\.masks=true",
        ),
    ],
)
def test_studies_of_masks_without_masks_are_refused(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load.load(Path(__file__).parents[3] / "configs" / "byol_r50_in1k.yaml", overrides)


def test_every_objective_shows_more_than_its_loss() -> None:
    """Signals of its own beside the parts of the loss, all finite numbers."""
    for name in (*schema.components("methods"), *small.JOINED):
        cfg = small.config(name)
        engine = small.engine(cfg)
        small.run(engine, cfg, 0, 1)
        scalars = engine.method(small.batch(cfg, 1), CLOCK).scalars
        assert scalars, name
        assert all(
            value.shape == () and value.isfinite() and not value.requires_grad
            for value in scalars.values()
        ), name
