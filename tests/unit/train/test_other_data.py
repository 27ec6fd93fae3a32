"""Whether the data of a run is still the same: maps are part of it, and runs from before there were
maps resume.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from kit.data import write_shards

from scaletrain.checkpoint import files, reader
from scaletrain.config import load
from scaletrain.config.recipe import ConfigError
from scaletrain.train.loop import train
from scaletrain.train.resume import other_data

RECIPE = """
batch: 12
steps: {steps}
threads: 1
data:
  path: {folder}
  lanes: 4
  window: 2
  workers: 0
  views: [{{size: 16, count: 2}}]
  {masks}
model: {{name: resnet18, width: 0.0625, stem: cifar}}
method: {{name: relicv2, hidden: 16, dim: 8, negatives: 2}}
optim: {{warmup_epochs: 0}}
checkpoint: {{every_steps: 1}}
monitor: {{images_every: 0}}
"""


def test_a_run_with_masks_from_before_the_section_resumes(tmp_path: Path) -> None:
    """Its configuration has the earlier keys, its checkpoint says only that there were masks."""
    folder = write_shards(tmp_path / "d", (24,), masks=True)
    now = "foreground: {masks: true, good_crops: 0.5, good_cover: 0.3, study: box, study_share: 1}"
    before = "masks: true\n  good_crops: 0.5\n  good_cover: 0.3\n  mask_study: box\n  mask_share: 1"

    def recipe(steps: int) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(steps=steps, folder=folder, masks=now))
        return path

    run = tmp_path / "run"
    train(load.load(recipe(1)), run)
    (run / "config.yaml").write_text(RECIPE.format(steps=2, folder=folder, masks=before))
    (manifest,) = run.glob("checkpoints/step-*/manifest.json")
    saved = json.loads(files.unseal(manifest))
    assert saved["meta"]["data"].pop("maps") == [{"kind": "foreground", "path": "key.mask.png"}]
    saved["meta"]["data"]["masks"] = True
    manifest.chmod(0o600)
    manifest.write_bytes(files.seal(json.dumps(saved)))

    train(load.load(recipe(2)), run)
    newest = reader.latest(run / "checkpoints")
    assert newest is not None
    assert newest.step == 2
    assert newest.meta["data"]["maps"] == [{"kind": "foreground", "path": "key.mask.png"}]
    assert load.load(run / "config.yaml") == load.load(recipe(2))


def test_other_maps_are_other_data() -> None:
    own = {"kind": "foreground", "path": "key.mask.png"}
    there = {"kind": "grey", "path": "/maps", "samples": 12, "sha256": "a" * 64}
    assert other_data({"masks": True}, {"maps": [own]}) == []
    assert other_data({"masks": False}, {"maps": []}) == []
    assert other_data({"maps": [there]}, {"maps": [{**there, "path": "/moved"}]}) == []
    (line,) = other_data({"maps": [own, there]}, {"maps": [own, {**there, "sha256": "b" * 64}]})
    assert line == (
        "maps: /maps (12 samples, kind grey, sha256 aaaaaaaaaaaa) -> /maps (12 samples, kind grey, "
        "sha256 bbbbbbbbbbbb)"
    )
    (line,) = other_data({"masks": True}, {"maps": []})
    assert line == "maps: key.mask.png (of each sample, kind foreground) -> nothing"
    assert len(other_data({"maps": [there]}, {"maps": [{**there, "kind": "classes"}]})) == 1


def test_changed_maps_stop_the_resume(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "d", (24,))
    maps = write_shards(tmp_path / "maps", (24,))
    text = RECIPE.format(steps=1, folder=folder, masks=f"maps: [{{path: {maps}, kind: grey}}]")
    (tmp_path / "recipe.yaml").write_text(text)
    config = load.load(tmp_path / "recipe.yaml")
    train(config, tmp_path / "run")
    maps.rename(tmp_path / "elsewhere")
    write_shards(maps, (12, 12))
    with pytest.raises(ConfigError, match=rf"maps: {re.escape(str(maps))} \(24 .* -> .*\(24 "):
        train(config, tmp_path / "run")
