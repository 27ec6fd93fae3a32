"""From the labels of a listing to classes: numbers or names, never a mixture, numbered without gaps
and alike in all splits.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from kit.data import encode, picture
from kit.importing import contents, run


def photos(root: Path, count: int) -> list[bytes]:
    data = [encode(picture(i)) for i in range(count)]
    for i, image in enumerate(data):
        (root / f"{i}.png").write_bytes(image)
    return data


def write_labels(path: Path, labels: list[str]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["path", "label"], *([f"{i}.png", label] for i, label in enumerate(labels))]
        )
    return path


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        (
            ["1", "0", "NA", "2"],
            "line 4: label 'NA' may mean that there is none; correct it, or give --no-label WORD",
        ),
        (["cat", "none", "dog"], "line 3: label 'none' may mean that there is none"),
        (
            ["1", "0", "", "2"],
            "line 4: no label, where other rows have one; fill it, write -1, or give --no-label ''",
        ),
        (["1", "cat", "0"], "line 3: label 'cat' is a name, where most are numbers"),
        (["cat", "dog", "7", "emu"], "line 4: label '7' is a number, where most are names"),
        (
            ["1", "1.5", "0"],
            "line 3: label '1.5' is no whole number from 0 on, of at most 18 digits",
        ),
        (["0.5", "1.5"], "line 2: label '0.5' is no whole number"),
        (["1", "9" * 19], f"line 3: label '{'9' * 19}' is no whole number"),
        (["1", "-2"], "line 3: label '-2' is no whole number"),
        (["1;x", "0"], "line 2: label 'x' is a name, where most are numbers"),
        (["1", "inf"], "line 3: label 'inf' is no whole number"),
    ],
)
def test_one_odd_label_is_named_with_its_line(
    tmp_path: Path, labels: list[str], fault: str
) -> None:
    photos(tmp_path, len(labels))
    listing = write_labels(tmp_path / "list.csv", labels)
    run("listing", listing, tmp_path / "out", fails=f"{listing}, {fault}")
    assert not list(tmp_path.glob("out*"))


def test_words_for_no_label_and_names_that_look_like_numbers(tmp_path: Path) -> None:
    data = photos(tmp_path, 5)
    listing = write_labels(tmp_path / "list.csv", ["1", "0", "NA", "?", "-1"])
    said = run("listing", listing, tmp_path / "a", "--no-label", "NA", "--no-label", "?")
    assert "5 images in 2 classes, 1 shard; without a label: 3" in said
    assert "renumbered" not in said
    assert contents(tmp_path / "a") == dict(zip(data, (1, 0, -1, -1, -1), strict=True))
    assert json.loads((tmp_path / "a" / "classes.json").read_text()) == ["0", "1"]
    run("listing", listing, tmp_path / "b", "--names")
    assert json.loads((tmp_path / "b" / "classes.json").read_text()) == ["0", "1", "?", "NA"]


def test_sparse_numbers_are_numbered_without_gaps_and_alike_by_the_classes_of_another_split(
    tmp_path: Path,
) -> None:
    data = photos(tmp_path, 4)
    train = write_labels(tmp_path / "train.csv", ["1440764", "7", "1440764", "19"])
    assert "labels are renumbered" in run("listing", train, tmp_path / "train")
    names = tmp_path / "train" / "classes.json"
    assert json.loads(names.read_text()) == ["7", "19", "1440764"]
    assert contents(tmp_path / "train") == dict(zip(data, (2, 0, 2, 1), strict=True))
    test = write_labels(tmp_path / "test.csv", ["1440764", "019", "7", "7"])
    run("listing", test, tmp_path / "apart", "--name", "test")
    run(
        "listing",
        test,
        tmp_path / "more",
        "--name",
        "test",
        "--classes",
        names,
        fails="test.csv, line 3: label '019' is not in",
    )
    write_labels(test, ["1440764", "19", "7", "7"])
    assert "renumbered" not in run(
        "listing", test, tmp_path / "test", "--name", "test", "--classes", names
    )
    assert contents(tmp_path / "test") == dict(zip(data, (2, 1, 0, 0), strict=True))
    assert (tmp_path / "test" / "classes.json").read_bytes() == names.read_bytes()
    words = tmp_path / "words.txt"
    words.write_text("cat\ndog\nemu\n")
    run(
        "listing",
        write_labels(test, ["2", "0", "1", "2"]),
        tmp_path / "by_number",
        "--classes",
        words,
    )
    assert contents(tmp_path / "by_number") == dict(zip(data, (2, 0, 1, 2), strict=True))
    write_labels(test, ["2", "3", "1", "2"])
    run(
        "listing",
        test,
        tmp_path / "x",
        "--classes",
        words,
        fails="line 3: label '3' is outside the 3 classes of --classes",
    )
    write_labels(test, ["2", "emu", "1", "2"])
    run(
        "listing",
        test,
        tmp_path / "x",
        "--classes",
        words,
        fails="line 3: label 'emu' is a name, where most are numbers",
    )
    words.write_text("{}")
    run(
        "listing",
        test,
        tmp_path / "x",
        "--classes",
        words.rename(tmp_path / "w.json"),
        fails="w.json is no JSON list of texts",
    )


def test_headers_are_stripped_and_bytes_of_other_editors_read(tmp_path: Path) -> None:
    data = photos(tmp_path, 2)
    path = tmp_path / "list.csv"
    path.write_bytes(b"\xef\xbb\xbf path , label\t\r\n0.png, 1 \r\n1.png,0\r\n")
    run("listing", path, tmp_path / "out")
    assert contents(tmp_path / "out") == {data[0]: 1, data[1]: 0}
    path.write_bytes(b"path,label, label\n0.png,1,2\n")
    run("listing", path, tmp_path / "x", fails="list.csv has two columns label; rename one of them")
    path.write_bytes(b"path,label\ncaf\xe9.png,1\n")
    run("listing", path, tmp_path / "x", fails="save it as UTF-8")
