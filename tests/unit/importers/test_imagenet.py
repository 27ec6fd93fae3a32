"""The ImageNet importer on the layouts that users have, and on ILSVRC's known oddities."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from kit.data import add, encode, picture
from kit.importing import contents, files, keys, run
from PIL import Image

from scaletrain.data.transforms import image

WNIDS = ("n01440764", "n02105855", "n01751748")  # not in their order


def jpeg(number: int) -> bytes:
    return encode(picture(number), ".jpg")


def train(root: Path, per_class: int = 3) -> dict[bytes, str]:
    """SRC/train/WNID/*.JPEG; the wnid of every image."""
    found = {}
    for c, wnid in enumerate(WNIDS):
        (root / "train" / wnid).mkdir(parents=True)
        for i in range(per_class):
            data = jpeg(10 * c + i)
            (root / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(data)
            found[data] = wnid
    return found


def val(root: Path) -> list[str]:
    """Five images in a flat SRC/val; their wnids."""
    (root / "val").mkdir(parents=True)
    for i in range(1, 6):
        (root / "val" / f"ILSVRC2012_val_{i:08d}.JPEG").write_bytes(jpeg(100 + i))
    return [WNIDS[i % 3] for i in range(1, 6)]


def named(folder: Path) -> dict[bytes, str]:
    classes = json.loads((folder / "classes.json").read_text())
    return {data: classes[label] for data, label in contents(folder).items()}


def test_classes_are_numbered_by_sorted_wnid(tmp_path: Path) -> None:
    wanted = train(tmp_path / "src")
    said = run("imagenet", tmp_path / "src", tmp_path / "out")
    assert "9 images in 3 classes" in said
    assert json.loads((tmp_path / "out" / "train" / "classes.json").read_text()) == sorted(WNIDS)
    assert named(tmp_path / "out" / "train") == wanted
    assert not (tmp_path / "out" / "val").exists()
    assert any(key.endswith("-n02105855_n02105855_2") for key in keys(tmp_path / "out" / "train"))


@pytest.mark.parametrize("form", ["kaggle", "pairs", "commas", "lines"])
def test_flat_val_with_every_form_of_labels(tmp_path: Path, form: str) -> None:
    train(tmp_path / "src")
    truth = val(tmp_path / "src")
    pairs = [(f"ILSVRC2012_val_{i:08d}", wnid) for i, wnid in enumerate(truth, 1)]
    text = {
        "kaggle": [
            "ImageId,PredictionString",
            *(f"{i},{w} 85 1 499 272 {w} 1 2 3 4" for i, w in reversed(pairs)),
        ],
        "pairs": [f"{i}.JPEG {w}" for i, w in pairs],
        "commas": [f"val/{i}.JPEG,{w}" for i, w in pairs],
        "lines": truth,
    }[form]
    (tmp_path / "truth").write_text("\n".join(text) + "\n")
    run("imagenet", tmp_path / "src", tmp_path / "out", "--val-labels", tmp_path / "truth")
    assert named(tmp_path / "out" / "val") == {jpeg(100 + i): w for i, w in enumerate(truth, 1)}


def test_faults_of_val_are_named(tmp_path: Path) -> None:
    source, truth = tmp_path / "src", tmp_path / "truth"
    train(source)
    labels = val(source)

    def fails(lines: list[str], text: str) -> None:
        truth.write_text("\n".join(lines))
        run("imagenet", source, tmp_path / "out", "--val-labels", truth, fails=text)

    run(
        "imagenet",
        source,
        tmp_path / "out",
        fails=f"{source}/val has no class folders: --val-labels FILE must say",
    )
    fails(labels[:-1], "4 lines for the 5 images")
    fails(
        ["490", "361", "171", "822", "297"],
        "the numbers of the development kit do not follow the sorted wnids",
    )
    fails(
        ["ILSVRC2012_val_00000001.JPEG n01440764"],
        "does not say the class of ILSVRC2012_val_00000002",
    )
    fails(["n99999999"] * 5, "has class n99999999, which")
    run(
        "imagenet",
        source,
        tmp_path / "out",
        "--val-labels",
        tmp_path / "none",
        fails="none cannot be read",
    )
    assert not list(tmp_path.glob("out*"))


def test_a_list_of_classes_keeps_and_numbers_these(tmp_path: Path) -> None:
    wanted = train(tmp_path / "src")
    for i, wnid in enumerate((*WNIDS, "n09999999")):
        (tmp_path / "src" / "val" / wnid).mkdir(parents=True)
        (tmp_path / "src" / "val" / wnid / f"{i}.JPEG").write_bytes(jpeg(200 + i))
    listed = tmp_path / "hundred.txt"
    listed.write_text("n02105855 Shetland sheepdog\nn01440764\n\n")
    run("imagenet", tmp_path / "src", tmp_path / "out", "--classes", listed)
    assert json.loads((tmp_path / "out" / "val" / "classes.json").read_text()) == [
        "n01440764",
        "n02105855",
    ]
    assert named(tmp_path / "out" / "train") == {
        d: w for d, w in wanted.items() if w != "n01751748"
    }
    assert contents(tmp_path / "out" / "val") == {jpeg(200): 0, jpeg(201): 1}
    for text, fault in (
        ("tench", "'tench' is no wnid such as n01440764"),
        ("n01440764\nn01440764", "is listed twice"),
        ("n01440765", f"n01440765 has no images in {tmp_path}/src/train"),
    ):
        listed.write_text(text)
        run("imagenet", tmp_path / "src", tmp_path / "more", "--classes", listed, fails=fault)


def test_straight_from_the_tar_of_tars(tmp_path: Path) -> None:
    """The same shards as from the folders, member for member."""
    train(tmp_path / "folders")
    labels = val(tmp_path / "folders")
    (tmp_path / "truth").write_text("\n".join(labels))
    (tmp_path / "tars").mkdir()
    with tarfile.open(
        tmp_path / "tars" / "ILSVRC2012_img_train.tar", "w", format=tarfile.GNU_FORMAT
    ) as outer:
        for wnid in sorted(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for path in sorted((tmp_path / "folders" / "train" / wnid).iterdir()):
                    add(tar, path.name, path.read_bytes())
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(
        tmp_path / "tars" / "ILSVRC2012_img_val.tar", "w", format=tarfile.GNU_FORMAT
    ) as tar:
        for path in sorted((tmp_path / "folders" / "val").iterdir()):
            add(tar, path.name, path.read_bytes())
    for form in ("folders", "tars"):
        run(
            "imagenet",
            tmp_path / form,
            tmp_path / f"from_{form}",
            "--val-labels",
            tmp_path / "truth",
        )
    assert files(tmp_path / "from_tars") == files(tmp_path / "from_folders")
    whole = (tmp_path / "tars" / "ILSVRC2012_img_train.tar").read_bytes()
    (tmp_path / "tars" / "ILSVRC2012_img_train.tar").write_bytes(whole[:20000])
    run(
        "imagenet",
        tmp_path / "tars",
        tmp_path / "cut",
        "--val-labels",
        tmp_path / "truth",
        fails="truncated or damaged",
    )


def test_oddities_of_ilsvrc_survive(tmp_path: Path) -> None:
    """n02105855_2933.JPEG is a PNG, and 22 JPEGs are CMYK."""
    folder = tmp_path / "src" / "train" / "n02105855"
    folder.mkdir(parents=True)
    y, x = np.mgrid[0:40, 0:60]
    rgb = np.stack([y * 6, x * 4, 255 - x * 4], -1).astype(np.uint8)
    (folder / "n02105855_2933.JPEG").write_bytes(encode(rgb))
    cmyk = io.BytesIO()
    Image.fromarray(rgb).convert("CMYK").save(cmyk, "JPEG", quality=95)
    (folder / "n02105855_1.JPEG").write_bytes(cmyk.getvalue())
    run("imagenet", tmp_path / "src", tmp_path / "out")
    run("verify", tmp_path / "out" / "train")
    found = {
        image.kind(data): image.decode(data, 10**6) for data in contents(tmp_path / "out" / "train")
    }
    assert set(found) == {"png", "jpg"}
    assert np.array_equal(found["png"], rgb)
    assert np.abs(found["jpg"].astype(int) - rgb).mean() < 3


def test_faults_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    run(
        "imagenet",
        tmp_path / "src",
        tmp_path / "out",
        fails="has none of train/, val/, ILSVRC2012_img_train.tar",
    )
    (tmp_path / "src" / "train" / "dogs").mkdir(parents=True)
    run("imagenet", tmp_path / "src", tmp_path / "out", fails="'dogs' is no wnid")
    (tmp_path / "src" / "train" / "dogs").rename(tmp_path / "src" / "train" / "n01440764")
    run("imagenet", tmp_path / "src", tmp_path / "out", fails="holds no images")
