"""Folders, patterns and lists of shards: what they choose, what is refused, and that all who take
shards take them alike.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.data import encode, picture, write_shards
from kit.importing import run
from kit.remote import serving

from scaletrain.config import load, recipe, schema
from scaletrain.config.schema import CacheConfig, DataConfig, View
from scaletrain.data.errors import DataError
from scaletrain.data.format import index, selection
from scaletrain.data.loading.loader import eval_batches, open_stream
from scaletrain.data.reading import subset
from scaletrain.data.reading.concat import ConcatShards, shards_of
from scaletrain.data.reading.reader import Shards
from scaletrain.evals.transforms import Transform

CPU = torch.device("cpu")


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """Training and test shards side by side, as published sets often lie: 11 samples and 5."""
    made = write_shards(tmp_path / "made", (4, 3, 4, 2, 3))
    folder = tmp_path / "both"
    folder.mkdir()
    for path, name in zip(
        sorted(made.iterdir()),
        [f"train-{n:06d}" for n in range(3)] + ["test-000000", "test-000001"],
        strict=True,
    ):
        shutil.copy(path, folder / f"{name}.tar")
    index.build(folder)
    return folder


@pytest.mark.parametrize(
    ("pattern", "samples"),
    [
        ("train-{000000..000002}.tar", range(11)),
        ("train-*.tar", range(11)),
        ("train-00000[01].tar", range(7)),
        ("train-00000?.tar", range(11)),
        ("t{rain,est}-000000.tar", [11, 12, 0, 1, 2, 3]),
        ("{train-{000000..000001},test-000001}.tar", [13, 14, 15, *range(7)]),
        ("train-000001.tar", range(4, 7)),
        ("*.tar", [*range(11, 16), *range(11)]),
    ],
)
def test_patterns_choose_shards_in_the_order_of_the_index(
    both: Path, pattern: str, samples: list[int]
) -> None:
    shards = Shards(f"{both}/{pattern}")
    assert [shards.read(i).image for i in range(len(shards))] == [
        encode(picture(n)) for n in samples
    ]
    assert shards.folder == both
    assert index.load(f"{both}/{pattern}").names.tolist() == sorted(
        index.load(f"{both}/{pattern}").names.tolist()
    )


def test_a_selection_has_an_identity_of_its_own(both: Path, tmp_path: Path) -> None:
    train = Shards(f"{both}/train-*.tar")
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in both.glob("train-*.tar"):
        shutil.copy(path, alone)
    assert train.fingerprint == Shards(alone, lambda text: None).fingerprint
    assert train.fingerprint == Shards(f"{both}/train-{{000000..000002}}.tar").fingerprint
    assert (
        train.fingerprint
        != Shards(f"{both}/*.tar").fingerprint
        != Shards(f"{both}/test-*.tar").fingerprint
    )


def test_one_folder_with_several_splits_is_refused(both: Path, tmp_path: Path) -> None:
    words = (
        r"train-\*.tar \(3\) and test-\*.tar \(2\): choose one, such as .*/both/train-\*.tar, "
        r"or all .*/both/\*.tar"
    )
    for use in (
        lambda: Shards(both),
        lambda: Shards(str(both)),
        lambda: list(eval_batches(str(both), transform=Transform(resize="tv", size=8), **NORM)),
    ):
        with pytest.raises(DataError, match=rf"both holds the shards of several splits, {words}"):
            use()
    assert "16 samples in 5 shards" in run("index", both)  # the index has all of them
    assert "16 samples" in run("verify", both)


NORM = {"device": CPU, "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (("train-0.tar", "val-0.tar"), True),
        (("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"), True),
        (("Train_1.tar", "DEV_1.tar"), True),
        (("train2017-0.tar", "val2017-0.tar"), True),
        (("000-train.tar", "000-test.tar"), True),
        (("train.tar", "test.tar"), True),
        (("train-0.tar", "training-1.tar"), False),
        (("val-0.tar", "validation-0.tar", "dev-1.tar"), False),
        (("train-0.tar", "extra-0.tar"), False),
        (("cc3m-0.tar", "laion-0.tar", "00000.tar"), False),
        (("latest-0.tar", "trainee-0.tar", "contest-0.tar", "valley-1.tar"), False),
        (("unlabeled-000000.tar", "train+unlabeled-000000.tar"), False),
    ],
)
def test_what_counts_as_several_splits(names: tuple[str, ...], refused: bool) -> None:
    listed = np.array([name.encode() for name in names])
    if refused:
        with pytest.raises(DataError, match="several splits"):
            selection.one_split("F", listed)
    else:
        selection.one_split("F", listed)


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("train-{000000..000003}.tar", r"train-000003.tar: there is no such shard"),
        ("valid-*.tar", r"valid-\*.tar: no shard has such a name"),
        (
            "train-{0..999999999}.tar",
            r"\{0..999999999\} expands to no shards, or to more than 1,000,000",
        ),
        ("{0..999999}{a,b}.tar", r"expands to more than 1,000,000 shards"),
        ("train-{3..1}.tar", r"\{3..1\} expands to no shards"),
        ("train-{000000.tar", r"a brace is not closed"),
        ("train-{a}.tar", r"\{a\} is neither \{a,b\} nor \{000..127\}"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(both: Path, pattern: str, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        Shards(f"{both}/{pattern}")


def test_patterns_are_of_shards_and_not_of_folders(both: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"no such data folder; patterns stand for the names of shards, in the last part",
    ):
        Shards(f"{both.parent}/*/train-000000.tar")
    odd = both.rename(both.with_name("data[1] {x}"))
    assert len(Shards(f"{odd}/train-*.tar")) == 11
    plain_folder = write_shards(odd.parent / "p*", (2,))
    assert len(Shards(plain_folder)) == 2


def test_lists_of_one_folder_and_of_several(both: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", (6,))
    first, second = f"{both}/train-000000.tar", f"{both}/test-{{000000..000001}}.tar"
    for form in ([second, first], f"[{second}, {first}]", f"['{second}','{first}']"):
        shards = shards_of(form)
        assert isinstance(shards, Shards)
        assert [shards.read(i).image for i in range(9)] == [
            encode(picture(n)) for n in (11, 12, 13, 14, 15, 0, 1, 2, 3)
        ]
    several = shards_of(f"[{first}, {other}, {second}]")
    assert isinstance(several, ConcatShards)
    assert [several.read(i).image for i in range(15)] == [
        encode(picture(n)) for n in (11, 12, 13, 14, 15, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5)
    ]
    assert several.name(9) == f"{other}/s-000.tar/00000"
    with pytest.raises(
        DataError, match=rf"{both} and {other} are two folders, and one is needed here"
    ):
        Shards([first, str(other)])
    for wrong in ("[]", "[a,,b]"):
        with pytest.raises(
            DataError, match="a list of shards that is empty, or has an empty entry"
        ):
            shards_of(wrong)


def test_recipes_take_patterns_and_lists(both: Path, tmp_path: Path) -> None:
    def path(*overrides: str) -> str:
        return load.load(Path("configs/byol_r50_in1k.yaml"), overrides).data.path

    assert path(f"data.path={both}/train-*.tar") == f"{both}/train-*.tar"
    assert path("data=/x/t-{00..12}.tar") == "/x/t-{00..12}.tar"
    assert (
        path("data.path=[/a/b, '/c/t-{0,1}.tar']")
        == path("data.path='[/a/b, /c/t-{0,1}.tar]'")
        == "[/a/b, /c/t-{0,1}.tar]"
    )
    with pytest.raises(
        recipe.ConfigError, match=r"data.path: .*'a,b' has a comma, where a path of a list ends"
    ):
        path("data.path=['a,b', c]")
    field = load.schema()["$defs"]["DataConfig"]["properties"]["path"]
    assert [kind["type"] for kind in field["anyOf"]] == ["string", "array"]
    saved = tmp_path / "config.yaml"
    before = load.load(
        Path("configs/byol_r50_in1k.yaml"),
        [f"data.path=[{both}, 'x,{{1,2}}.tar']".replace("x,", "x")],
    )
    saved.write_text(load.dump(before))
    assert load.load(saved) == before


def test_paths_are_made_absolute_part_by_part(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(both.parent)
    assert (
        schema.absolute("both/train-{000000..000002}.tar") == f"{both}/train-{{000000..000002}}.tar"
    )
    assert (
        schema.absolute("[both/train-*.tar, http://h/a/x-{0,1}.tar]")
        == f"[{both}/train-*.tar, http://h/a/x-{{0,1}}.tar]"
    )
    for as_it_is in ("synthetic", "http://h/a", "s3://b/c/"):
        assert schema.absolute(as_it_is) == as_it_is


def test_streams_train_on_the_chosen_shards(both: Path, tmp_path: Path) -> None:
    def seen(path: object) -> list[torch.Tensor]:
        data = DataConfig(path=path, lanes=2, window=2, workers=0, views=(View(size=8),))
        s = open_stream(data, seed=3, batch=4, rank=0, world=1, device=CPU)
        return [x for b in s.batches(0, 6) for x in (b.index, b.labels, b.views[0])]

    alone = tmp_path / "alone"
    alone.mkdir()
    for path in both.glob("train-*.tar"):
        shutil.copy(path, alone)
    assert all(map(torch.equal, seen(f"{both}/train-*.tar"), seen(str(alone))))
    other = write_shards(tmp_path / "other", (5, 4))
    indices = torch.cat(seen([f"{both}/train-*.tar", str(other)])[::3])
    assert indices.unique().tolist() == list(range(20))
    several = open_stream(
        DataConfig(path=[f"{both}/train-*.tar", str(other)], lanes=2, workers=0),
        seed=3,
        batch=4,
        rank=0,
        world=1,
        device=CPU,
    )
    assert [(one["path"], one["samples"]) for one in several.sources()] == [
        (str(both), 11),
        (str(other), 9),
    ]
    assert several.sources()[0]["sha256"] == Shards(f"{both}/train-*.tar").fingerprint
    mixed = DataConfig(
        mixture=({"path": f"{both}/test-*.tar", "weight": 1},),
        lanes=2,
        workers=0,
        views=(View(size=8),),
    )
    assert open_stream(mixed, seed=3, batch=4, rank=0, world=1, device=CPU).samples == 5


def test_the_commands_take_them_too(both: Path, tmp_path: Path) -> None:
    assert "11 samples in 3 shards" in run("index", f"{both}/train-*.tar")
    said = run("verify", f"{both}/train-*.tar")
    assert f"{both}/train-*.tar: 3 shards, 11 samples" in said
    assert "2 shards, 5 samples" in run(
        "verify", *sorted(both.glob("test-*.tar"))
    )  # as a shell expands it
    run("verify", "http://host/train", fails="only shards on a disk can be verified")
    run("subset", f"{both}/train-*.tar", tmp_path / "few.json", "--per-class", 1)
    assert len(subset.load(tmp_path / "few.json", Shards(f"{both}/train-*.tar")).index) == 7
    with pytest.raises(DataError, match="made for other shards"):
        subset.load(tmp_path / "few.json", Shards(f"{both}/*.tar"))
    assert json.loads((tmp_path / "few.json").read_text())["shards"]["samples"] == 11


def test_addresses_take_them_too(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    local = Shards(f"{both}/train-*.tar")
    with serving(both) as web:
        for pattern in ("train-{000000..000002}.tar", "train-*.tar"):
            remote = Shards(f"{web.url}/{pattern}", cache=CacheConfig(path=str(tmp_path)))
            assert remote.fingerprint == local.fingerprint
            assert remote.read(10) == local.read(10)
            remote.close()
        assert not web.asked["test-000000.tar"]
        with pytest.raises(DataError, match=r"holds the shards of several splits"):
            Shards(web.url, cache=CacheConfig(path=str(tmp_path)))
        with pytest.raises(DataError, match=r"train-000003.tar: there is no such shard"):
            Shards(f"{web.url}/train-{{000000..000003}}.tar", cache=CacheConfig(path=str(tmp_path)))
