"""Label subsets: balanced, nested, deterministic, read from published lists, and refused for other
shards.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from kit.data import encode, picture, write_shards
from kit.evals import shards as write_labelled
from kit.importing import keys, run, tree

from scaletrain.data.errors import DataError
from scaletrain.data.reading import subset
from scaletrain.data.reading.concat import shards_of
from scaletrain.data.reading.reader import Shards


def long_tail(seed: int = 0) -> np.ndarray:
    """1,000 samples of 7 classes with 4 to 400 samples, some without a label, in no order."""
    sizes = {0: 400, 1: 250, 2: 120, 5: 90, 6: 60, 9: 20, 11: 4, -1: 56}
    return np.random.default_rng(seed).permutation(np.repeat(list(sizes), list(sizes.values())))


def counts(y: np.ndarray, chosen: np.ndarray) -> dict[int, int]:
    return dict(Counter(y[chosen].tolist()))


def test_a_choice_is_balanced() -> None:
    y = np.arange(1000) % 10
    assert counts(y, subset.by_share(y, 0.1, 3)) == dict.fromkeys(range(10), 10)
    assert sorted(counts(y, subset.choose(y, 47, 3)).values()) == [4] * 3 + [5] * 7
    assert counts(y, subset.per_class(y, 3, 3)) == dict.fromkeys(range(10), 3)


def test_simclrs_sizes() -> None:
    """1 % and 10 % of ImageNet: 12,811 and 128,116 images, 12 to 13 and 128 to 129 a class, as in
    the published lists.
    """
    sizes = np.full(1000, 1281)
    sizes[:167] += 1
    y = np.repeat(np.arange(1000), sizes)
    assert len(y) == 1_281_167
    one, ten = subset.by_share(y, 0.01, 0), subset.by_share(y, 0.1, 0)
    assert (len(one), len(ten)) == (12_811, 128_116)
    assert set(counts(y, one).values()) == {12, 13}
    assert set(counts(y, ten).values()) == {128, 129}
    assert set(one.tolist()) < set(ten.tolist())


def test_classes_that_are_too_small_give_all_and_the_others_more() -> None:
    y = long_tail()
    found = counts(y, subset.choose(y, 200, 0))
    assert found.pop(11) == 4
    assert found.pop(9) == 20
    assert sorted(found.values()) == [35, 35, 35, 35, 36]
    assert counts(y, subset.choose(y, 944, 0)) == {
        c: n for c, n in Counter(y.tolist()).items() if c >= 0
    }


@pytest.mark.parametrize("seed", range(2))
def test_smaller_choices_lie_inside_larger_ones(seed: int) -> None:
    y = long_tail(seed)
    totals = [*range(7, 60), *range(60, 930, 17), 944]
    nested = [set(subset.choose(y, total, seed).tolist()) for total in totals]
    assert [len(chosen) for chosen in nested] == totals
    assert all(a < b for a, b in pairwise(nested))
    assert all((y[list(chosen)] >= 0).all() for chosen in nested)


def test_a_choice_depends_on_the_seed_only() -> None:
    y = long_tail()
    assert np.array_equal(subset.choose(y, 100, 1), subset.choose(y, 100, 1))
    assert not np.array_equal(subset.choose(y, 100, 1), subset.choose(y, 100, 2))
    chosen = subset.choose(np.zeros(10_000, np.int64), 1000, 0)
    assert abs(chosen.mean() - 5000) < 300  # from everywhere
    assert (np.diff(chosen) > 0).all()


def test_files_are_shared_and_refused_for_other_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "train", (30, 40))
    said = run("subset", folder, tmp_path / "ten.json", "--per-class", 2)
    assert "14 of 70 samples, 7 classes of 2 to 2" in said
    shards = Shards(folder)
    found = subset.load(tmp_path / "ten.json", shards)
    assert found.labels.tolist() == [shards.read(i).label for i in found.index]
    assert found.rule == "2 of each class, seed 0"
    assert json.loads((tmp_path / "ten.json").read_text())["key"] == [
        keys(folder)[i] for i in found.index
    ]
    folder.rename(tmp_path / "moved")
    assert np.array_equal(
        subset.load(tmp_path / "ten.json", Shards(tmp_path / "moved")).index, found.index
    )
    others = Shards(write_shards(tmp_path / "other", (40, 30)))
    with pytest.raises(
        DataError,
        match=r"ten.json was made for other shards \('train' with 70 samples\) than .*/other with "
        r"70",
    ):
        subset.load(tmp_path / "ten.json", others)


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("version", 2, "is no subset"),
        ("index", [5, 3], "is no subset"),
        ("index", [3, 900], "is no subset"),
        ("index", [-2, 3], "is no subset"),
        ("label", [1], "is no subset"),
        ("kind", "pairs", "is no subset"),
        ("label", [0, 0], "was altered"),
        ("shards", 3, "is no subset"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, field: str, value: object, fault: str) -> None:
    shards = Shards(write_shards(tmp_path / "train", (20,)))
    path = tmp_path / "two.json"
    subset.save(path, shards, np.array([3, 8]), "two")
    assert subset.load(path, shards).labels.tolist() == [3, 1]
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(DataError, match=fault):
        subset.load(path, shards)
    path.write_text("[1")
    with pytest.raises(DataError, match="is no subset"):
        subset.load(path, shards)


def test_samples_are_listed_without_labels(tmp_path: Path) -> None:
    """Of shards in which few samples have a label: regardless of it, nested for one seed, and no
    file of labels.
    """
    folder = write_labelled(tmp_path / "train", [0, *[None] * 39])
    for percent in (10, 50):
        said = run(
            "subset", folder, tmp_path / f"{percent}.json", "--share", percent, "--kind", "samples"
        )
        assert said.strip().endswith(f"{percent}.json: {percent * 40 // 100} of 40 samples")
    opened = Shards(folder)
    small, large = (subset.load_samples(tmp_path / f"{n}.json", opened) for n in (10, 50))
    assert set(small.index.tolist()) < set(large.index.tolist())
    assert len(large.index) == 20
    assert small.rule == "10 % of all samples, seed 0"
    assert "label" not in json.loads((tmp_path / "10.json").read_text())
    with pytest.raises(DataError, match=r"10\.json lists samples and says nothing about their lab"):
        subset.load(tmp_path / "10.json", opened)
    (tmp_path / "names").write_text("00003\n00007")
    arguments = ("subset", folder, tmp_path / "named.json", "--names", tmp_path / "names")
    run(*arguments, fails="has no label; --kind samples lists samples without labels")
    run(*arguments, "--kind", "samples")
    assert subset.load_samples(tmp_path / "named.json", opened).index.tolist() == [3, 7]


def test_files_of_earlier_versions_list_labels(tmp_path: Path) -> None:
    opened = Shards(write_shards(tmp_path / "train", (20,)))
    path = tmp_path / "two.json"
    subset.save(path, opened, np.array([3, 8]), "two")
    content = json.loads(path.read_text())
    del content["kind"]
    path.write_text(json.dumps(content))
    assert subset.load(path, opened).labels.tolist() == [3, 1]


def test_one_file_lists_samples_of_several_folders(tmp_path: Path) -> None:
    """In the order in which they are named, and only in it."""
    folders = [
        str(write_shards(tmp_path / name, counts)) for name, counts in (("a", (5, 5)), ("b", (10,)))
    ]
    (tmp_path / "names").write_text("00002")
    both = f"[{', '.join(folders)}]"
    run("subset", both, tmp_path / "out.json", "--share", 30, "--kind", "samples")
    opened = shards_of(both)
    chosen = subset.load_samples(tmp_path / "out.json", opened).index
    assert len(chosen) == 6
    assert json.loads((tmp_path / "out.json").read_text())["key"] == [
        f"{number % 10:05d}" for number in chosen
    ]
    with pytest.raises(DataError, match=r"was made for other shards \('a, b' with 20 samples\)"):
        subset.load_samples(tmp_path / "out.json", shards_of(folders[::-1]))
    arguments = ("subset", both, tmp_path / "more.json", "--names", tmp_path / "names")
    run(*arguments, fails="is the name of two samples")


def test_published_lists_of_names(tmp_path: Path) -> None:
    for wnid in ("n01440764", "n01443537"):
        (tmp_path / "src" / wnid).mkdir(parents=True)
        for i in (18, 36, 118):
            (tmp_path / "src" / wnid / f"{wnid}_{i}.JPEG").write_bytes(
                encode(picture(int(wnid[1:]) + i), ".jpg")
            )
    run("folder", tmp_path / "src", tmp_path / "train", "--per-shard", 4)
    names = tmp_path / "1percent.txt"
    names.write_text("n01443537_36.JPEG\nn01440764_18.JPEG\n")
    run("subset", tmp_path / "train", tmp_path / "out.json", "--names", names)
    shards = Shards(tmp_path / "train")
    found = subset.load(tmp_path / "out.json", shards)
    assert {keys(tmp_path / "train")[i].partition("-")[2] for i in found.index} == {
        "n01440764_n01440764_18",
        "n01443537_n01443537_36",
    }
    assert sorted(found.labels.tolist()) == [0, 1]
    for text, fault in (
        ("n01440764_19.JPEG", "n01440764_19.JPEG is the name of no sample"),
        ("n01440764_18.JPEG\nn01440764_18.JPEG", "listed twice"),
        ("18.JPEG", "18.JPEG is the name of two samples"),
        ("8.JPEG", "8.JPEG is the name of no sample"),
    ):
        names.write_text(text)
        run("subset", tmp_path / "train", tmp_path / "more.json", "--names", names, fails=fault)
    assert not (tmp_path / "more.json").exists()


def test_faults_of_the_command(tmp_path: Path) -> None:
    run("folder", tree(tmp_path / "src", {"a": 3, "b": 2}), tmp_path / "train")
    out = tmp_path / "out.json"
    run(
        "subset",
        tmp_path / "train",
        out,
        fails="give one of --share (in per cent), --per-class and --names",
    )
    run("subset", tmp_path / "train", out, "--share", 1, "--per-class", 1, fails="give one of")
    run(
        "subset",
        tmp_path / "train",
        out,
        "--share",
        1,
        fails="1% of 5 labelled samples are 0, fewer than the 2 classes",
    )
    run(
        "subset",
        tmp_path / "train",
        out,
        "--per-class",
        3,
        fails="class 1 has 2 samples, and not 3",
    )
    run(
        "subset", tmp_path / "train", out, "--names", tmp_path / "none", fails="none cannot be read"
    )
    run("subset", tmp_path / "train", out, "--share", 40)
    run("subset", tmp_path / "train", out, "--share", 100, fails="out.json exists already")
    run("subset", tmp_path / "train", out, "--share", 100, "--force")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(encode(picture(0)))
    run("folder", tmp_path / "flat", tmp_path / "unlabelled")
    run(
        "subset",
        tmp_path / "unlabelled",
        tmp_path / "u.json",
        "--per-class",
        1,
        fails="the shards have no labels",
    )
    (tmp_path / "names").write_text("a")
    run(
        "subset",
        tmp_path / "unlabelled",
        tmp_path / "u.json",
        "--names",
        tmp_path / "names",
        fails="has no label",
    )
