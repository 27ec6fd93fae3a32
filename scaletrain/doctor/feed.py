"""Images per second that one core makes ready from the data folder, and the cores that feed a run
whose throughput was checked.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from scaletrain.config import load
from scaletrain.config.schema import DataConfig
from scaletrain.data.errors import DataError
from scaletrain.data.format import index, selection
from scaletrain.data.loading.dataset import Failure, Images
from scaletrain.data.reading.maps import open_maps
from scaletrain.data.reading.reader import Shards
from scaletrain.data.sampling.plan import Plan
from scaletrain.doctor.machine import cores_per_process
from scaletrain.doctor.page import Finding, guarded, limit, measured, spread
from scaletrain.runtime.tables import plural
from scaletrain.train import throughput_check
from scaletrain.train.progress import number

# of the measurement, at most one batch more
SECONDS = 3.0
# images of a measured batch
ROWS = 16


def loader(data: Path, run: Path) -> list[Finding]:
    """Read, decode and augment as the run's recipe does, or with two views of 224 pixels. Every
    rank calls it.
    """
    cores = cores_per_process()
    values, findings = measured(
        "loader", lambda: _measure(data, run), "index the shards once: scaletrain shards index DATA"
    )

    if not values:
        return findings

    views = plural(round(max(values["views"])), "view")
    what = f"{views} as in the run folder" if max(values["recipe"]) else f"{views} of 224 px"
    text = (
        f"{what}: {spread(values['core'], 'images/s')} per core, "
        f"{spread(values['clock'], 'images/s')} per process by the clock"
    )
    needs = guarded("loader", lambda: needed(run, min(values["core"]), cores))

    return [*findings, Finding("ok", "loader", text), *needs]


def needed(run: Path, rate: float, cores: float) -> list[Finding]:
    """What the throughput check in the run folder asks of the loader, where a process has `cores`
    of `rate` images/s each.
    """
    path = run / throughput_check.FILE
    if not path.exists():
        return []

    asked = json.loads(path.read_text())["loader_images_per_second"]
    process, node = float(asked["process"]), float(asked["node"])
    text = (
        f"the run as measured needs {number(process)} images/s per process, {number(node)} per "
        "node: "
    )
    text += f"{process / rate:.1f} cores per process, which has {cores:g}"
    fix = (
        "ask for more cores, store smaller images (the importers' resize option), or use fewer "
        "views"
    )

    return [limit(process > rate * cores, "loader", text, fix)]


def _measure(folder: Path, run: Path) -> dict[str, float]:
    """One process, loading in its main thread: by its own time on a core, and by the clock, which
    waits for the disk too.
    """
    if not (index.home(Path(selection.one_folder(folder).folder)) / index.MANIFEST).exists():
        raise DataError(f"{folder} has no index, and making it is not the doctor's work")

    recipe = run / "config.yaml"
    data = load.load(recipe).data if recipe.exists() else DataConfig()
    # maps of other shards may belong to another folder than this one
    data = data.plain(foreground=data.foreground)
    shards = Shards(folder)
    lanes = min(data.lanes, len(shards))
    plan = Plan(shards.counts, seed=0, batch=lanes, lanes=lanes, window=data.window)
    dataset = Images(data, shards, plan, 0, min(ROWS, lanes), maps=open_maps(data, shards))
    images, core, clock = 0, 0.0, 0.0

    for step in range(plan.steps_per_epoch):
        used, begin = time.process_time(), time.perf_counter()
        batch = dataset[(0, step)]
        if isinstance(batch, Failure):
            raise batch.error

        # the first opens files and fills tables
        if step or plan.steps_per_epoch == 1:
            images, core, clock = (
                images + len(batch.samples),
                core + time.process_time() - used,
                clock + time.perf_counter() - begin,
            )

        if clock > SECONDS:
            break

    views = sum(view.count for view in data.views)
    return {
        "core": images / core,
        "clock": images / clock,
        "views": views,
        "recipe": recipe.exists(),
    }
