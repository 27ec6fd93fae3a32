"""The listing importer: CSV and Parquet; no, one and many labels; names; faults."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from kit.data import encode, picture
from kit.importing import contents, files, run

from scaletrain.config.schema import DataConfig
from scaletrain.data.format import offsets
from scaletrain.data.format.tar import Reader
from scaletrain.data.loading.dataset import Images
from scaletrain.data.reading.reader import Shards


def photos(root: Path, count: int) -> list[bytes]:
    root.mkdir(parents=True, exist_ok=True)
    data = [encode(picture(i)) for i in range(count)]
    for i, image in enumerate(data):
        (root / f"{i}.png").write_bytes(image)
    return data


def write_csv(path: Path, rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def members(folder: Path) -> dict[str, bytes]:
    return {m.name: m.data for shard in sorted(folder.glob("*.tar")) for m in Reader(shard)}


def test_none_one_and_many_labels(tmp_path: Path) -> None:
    data = photos(tmp_path / "images", 5)
    rows = [
        ["0.png", "4"],
        ["1.png", ""],
        ["2.png", "7;1"],
        ["3.png", "-1"],
        [str(tmp_path / "images" / "4.png"), "2.0"],
    ]
    listing = write_csv(tmp_path / "list.csv", [["path", "label"], *rows])
    said = run(
        "listing", listing, tmp_path / "out", "--root", tmp_path / "images", "--no-label", ""
    )
    assert "5 images in 4 classes, 1 shard; without a label: 2" in said
    assert (
        "labels are renumbered, without gaps; give other splits these classes: --classes "
        f"{tmp_path}/out/classes.json" in said
    )
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["1", "2", "4", "7"]
    assert contents(tmp_path / "out") == {
        data[0]: 2,
        data[1]: -1,
        data[2]: -1,
        data[3]: -1,
        data[4]: 1,
    }
    found = members(tmp_path / "out")
    assert {key: json.loads(value) for key, value in found.items() if key.endswith(".json")} == {
        "000000002-2.json": {"labels": [0, 3]}
    }
    assert sorted(key.partition("-")[0] for key in found if key.endswith(".cls")) == [
        "000000000",
        "000000004",
    ]
    assert "5 samples, 2 labelled" in run("verify", tmp_path / "out")


def test_samples_with_many_labels_train_as_unlabelled(tmp_path: Path) -> None:
    from scaletrain.data.sampling.plan import Plan

    photos(tmp_path, 4)
    listing = write_csv(
        tmp_path / "list.csv",
        [["file", "labels"], *([f"{i}.png", "1;2" if i % 2 else "3"] for i in range(4))],
    )
    run("listing", listing, tmp_path / "out")
    shards = Shards(tmp_path / "out")
    data = DataConfig.model_validate(
        {
            "path": str(tmp_path / "out"),
            "lanes": 4,
            "window": 1,
            "views": [{"size": 16, "count": 1}],
        }
    )
    raw = Images(data, shards, Plan(shards.counts, seed=0, batch=4, lanes=4, window=1), 0, 4)[0, 0]
    assert sorted(raw.labels.tolist()) == [-1, -1, 2, 2]  # of the classes 1, 2, 3


@pytest.mark.parametrize(
    ("text", "label"),
    [
        *(
            ('{"labels": [5]}', 5),
            ('{"labels": []}', -1),
            ('{"labels": [1, 2]}', -1),
            ('{"labels": [1, 2], "label": 2}', 2),
        ),
        *(
            ('{"labels": [-1]}', -1),
            ('{"labels": [-1, 5]}', 5),
            ('{"labels": [5], "label": null}', 5),
        ),
    ],
)
def test_json_members_of_others(text: str, label: int) -> None:
    assert offsets._single(json.loads(text)) == label


@pytest.mark.parametrize(
    "text", ['{"labels": 3}', '{"labels": ["dog"]}', '{"labels": [true]}', '{"labels": [-2, 1]}']
)
def test_malformed_json_labels_are_refused(text: str) -> None:
    assert offsets._single(json.loads(text)) is None


def test_names_as_labels(tmp_path: Path) -> None:
    data = photos(tmp_path, 3)
    rows = [["0.png", "golden retriever"], ["1.png", "cat"], ["2.png", "cat;axolotl"]]
    listing = write_csv(tmp_path / "list.csv", [["image", "tags"], *rows])
    run("listing", listing, tmp_path / "out", "--label", "tags")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == [
        "axolotl",
        "cat",
        "golden retriever",
    ]
    assert contents(tmp_path / "out") == {data[0]: 2, data[1]: 1, data[2]: -1}
    (tmp_path / "names.txt").write_text("cat\ngolden retriever\naxolotl\n")
    run(
        "listing",
        listing,
        tmp_path / "given",
        "--label",
        "tags",
        "--classes",
        tmp_path / "names.txt",
    )
    assert contents(tmp_path / "given") == {data[0]: 1, data[1]: 0, data[2]: -1}
    (tmp_path / "names.txt").write_text("cat\naxolotl\n")
    few = ("--label", "tags", "--classes", tmp_path / "names.txt")
    run(
        "listing",
        listing,
        tmp_path / "more",
        *few,
        fails="label 'golden retriever' is not in --classes",
    )


def test_parquet_gives_the_shards_of_the_same_csv(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    photos(tmp_path / "images", 6)
    labels = [[3], [], [1, 5], None, [0], [2]]
    (tmp_path / "parts").mkdir()
    for part in range(2):
        rows = slice(3 * part, 3 * part + 3)
        columns = {
            "path": [f"{i}.png" for i in range(6)][rows],
            "noise": [0.5] * 3,
            "labels": labels[rows],
        }
        parquet.write_table(
            arrow.table(columns), tmp_path / "parts" / f"part-{part}.parquet", row_group_size=2
        )
    texts = [";".join(map(str, row or [])) for row in labels]
    listing = write_csv(
        tmp_path / "list.csv",
        [["path", "labels"], *([f"{i}.png", text] for i, text in enumerate(texts))],
    )
    for name, source in (("a", tmp_path / "parts"), ("b", listing)):
        run(
            "listing",
            source,
            tmp_path / name,
            "--root",
            tmp_path / "images",
            *(("--no-label", "") if name == "b" else ()),
        )
    assert files(tmp_path / "a") == files(tmp_path / "b")
    flat = {
        "path": ["0.png", "1.png"],
        "label": np.array([4.0, np.nan]),
    }  # whole numbers with gaps, as pandas saves them
    parquet.write_table(arrow.table(flat), tmp_path / "images" / "flat.parquet")
    run("listing", tmp_path / "images" / "flat.parquet", tmp_path / "flat")
    assert sorted(contents(tmp_path / "flat").values()) == [-1, 0]
    assert json.loads((tmp_path / "flat" / "classes.json").read_text()) == ["4"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    run("listing", tmp_path / "bad.parquet", tmp_path / "more", fails="bad.parquet cannot be read")


def test_faults_of_listings_are_named(tmp_path: Path) -> None:
    photos(tmp_path, 2)
    path, out = tmp_path / "list.csv", tmp_path / "out"

    def fails(text: str, fault: str, *options: object) -> None:
        path.write_text(text)
        run("listing", path, out, *options, fails=fault)

    fails(
        "",
        "has no column path or url or image or file, only an empty first line; choose with --image",
    )
    fails("a,b\n", "only a, b; choose with --image")
    fails("path,b\n", "has no column c, only path, b; choose with --label", "--label", "c")
    fails("path\n", "lists no images")
    fails("path,label\n0.png,1\n1.png\n", "line 3: 1 cells, and 2 columns")
    fails('path,label\n"0.png,1\n', "cannot be read: unexpected end of data")
    fails("path,label\n,1\n", "line 2: no path or address")
    fails("path\n0.png\ngone.png\n", f"{tmp_path}/gone.png: cannot be read: No such file")
    fails(
        "path\nfile:///etc/hostname\n", "only http:// and https:// addresses are fetched, not file:"
    )
    run("listing", tmp_path / "none.csv", out, fails="none.csv cannot be read")
    (tmp_path / "void").mkdir()
    run("listing", tmp_path / "void", out, fails="holds neither .csv nor .parquet files")
    assert not list(tmp_path.glob("out*"))
