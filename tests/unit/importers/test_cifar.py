"""CIFAR's Python releases, read without unpickling: as they were published, and as an attacker
would write them.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from kit.data import picture
from kit.importing import contents, run

from scaletrain.data.errors import DataError
from scaletrain.data.format import numpy_pickle
from scaletrain.data.transforms import image


def text(value: str) -> bytes:
    return b"U" + bytes([len(value)]) + value.encode()


def python2(columns: dict[str, list[int] | list[str] | np.ndarray]) -> bytes:
    """A dict as Python 2's cPickle with protocol 2 wrote it, by hand after the disassembly of a
    published batch.
    """
    body = b"\x80\x02}q\x01("
    for name, value in columns.items():
        body += text(name)
        if isinstance(value, np.ndarray):
            raw = value.tobytes()
            body += (
                b"cnumpy.core.multiarray\n_reconstruct\nq\x08cnumpy\nndarray\nq\tK\x00\x85"
                b"U\x01b\x87Rq\n(K\x01"
            )
            body += (
                b"M"
                + struct.pack("<H", value.shape[0])
                + b"M"
                + struct.pack("<H", value.shape[1])
                + b"\x86"
            )
            body += (
                b"cnumpy\ndtype\nq\x0bU\x02u1K\x00K\x01\x87Rq\x0c(K\x03U\x01|NNN"
                b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            )
            body += b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
        else:
            items = b"".join(b"K" + bytes([v]) if isinstance(v, int) else text(v) for v in value)
            body += b"]q\x05(" + items + b"e"
    return body + b"u."


def planes(numbers: range) -> np.ndarray:
    return np.stack([picture(n, 32, 32).transpose(2, 0, 1).reshape(-1) for n in numbers])


def wanted(numbers: range, classes: int) -> dict[bytes, int]:
    return {picture(n, 32, 32).tobytes(): n % classes for n in numbers}


def decoded(folder: Path) -> dict[bytes, int]:
    return {image.decode(data, 10**6).tobytes(): label for data, label in contents(folder).items()}


def test_cifar10_python_release(tmp_path: Path) -> None:
    names = [f"class{i}" for i in range(10)]
    for part in range(5):
        numbers = range(part * 8, part * 8 + 8)
        batch = {
            "batch_label": [],
            "labels": [n % 10 for n in numbers],
            "data": planes(numbers),
            "filenames": ["x.png"] * 8,
        }
        (tmp_path / f"data_batch_{part + 1}").write_bytes(python2(batch))
    (tmp_path / "test_batch").write_bytes(
        python2({"data": planes(range(50, 60)), "labels": [n % 10 for n in range(50, 60)]})
    )
    (tmp_path / "batches.meta").write_bytes(python2({"num_vis": [0], "label_names": names}))
    run("cifar10", tmp_path, tmp_path / "out")
    assert decoded(tmp_path / "out" / "train") == wanted(range(40), 10)
    assert decoded(tmp_path / "out" / "test") == wanted(range(50, 60), 10)
    assert json.loads((tmp_path / "out" / "test" / "classes.json").read_text()) == names
    (tmp_path / "batches.meta").write_bytes(python2({"num_vis": [0]}))
    run(
        "cifar10",
        tmp_path,
        tmp_path / "more",
        fails="batches.meta: no list 'label_names' of type str",
    )


def test_cifar100_in_both_releases_and_with_both_labels(tmp_path: Path) -> None:
    fine, coarse = [f"fine{i}" for i in range(7)], [f"coarse{i}" for i in range(3)]
    python, binary = tmp_path / "python", tmp_path / "binary"
    for folder in (python, binary):
        folder.mkdir()
    meta = {"fine_label_names": fine, "coarse_label_names": coarse}
    (python / "meta").write_bytes(python2(meta))
    for key, names in meta.items():
        (binary / f"{key}.txt").write_text("\n".join(names))
    for split, numbers in (("train", range(21)), ("test", range(30, 42))):
        columns = {
            "fine_labels": [n % 7 for n in numbers],
            "coarse_labels": [n % 3 for n in numbers],
        }
        (python / split).write_bytes(python2({"data": planes(numbers), **columns}))
        (binary / f"{split}.bin").write_bytes(
            b"".join(bytes([n % 3, n % 7]) + planes(range(n, n + 1)).tobytes() for n in numbers)
        )
    for folder in (python, binary):
        for options, classes, names in (((), 7, fine), (("--coarse",), 3, coarse)):
            out = tmp_path / f"{folder.name}{len(options)}"
            run("cifar100", folder, out, *options)
            assert decoded(out / "train") == wanted(range(21), classes)
            assert decoded(out / "test") == wanted(range(30, 42), classes)
            assert json.loads((out / "train" / "classes.json").read_text()) == names


@pytest.mark.parametrize("protocol", [3, 4])
def test_numpys_own_pickles_are_read(tmp_path: Path, protocol: int) -> None:
    path, pixels = tmp_path / "batch", planes(range(3))
    path.write_bytes(
        pickle.dumps({"data": pixels, "labels": [1, 2, 300], "more": (None, True, [])}, protocol)
    )
    content = numpy_pickle.load(path)
    assert np.array_equal(numpy_pickle.array(content["data"], path), pixels)
    assert content["labels"] == [1, 2, 300]
    assert content["more"] == (None, True, [])


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


ATTACKS = {
    "global": b"cposix\nsystem\n(U\x0etouch PWNED.txttR.",
    "builtins": b"\x80\x02c__builtin__\neval\nU\x011\x85R.",
    "inst": b"(U\x0etouch PWNED.txtiposix\nsystem\n.",
    "obj": b"(cposix\nsystem\nU\x05touchoR.",
    "newobj": b"\x80\x02cnumpy\ndtype\nU\x02u1\x85\x81.",
    "persistent": b"U\x01aQ.",
    "extension": b"\x80\x02\x82\x01.",
    "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
    "call text": b"\x80\x02U\x06systemU\x01a\x85R.",
    "call ndarray": b"\x80\x02cnumpy\nndarray\nK\x01\x85R.",
    "build a dict": b"\x80\x02}}b.",
    "state of a name": b"\x80\x02cnumpy\nndarray\n}b.",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(
    tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(ATTACKS[attack])
    said = run("cifar10", tmp_path, tmp_path / "out", fails=f"{tmp_path}/data_batch_1: the pickle")
    assert "refused" in said
    assert [p.name for p in tmp_path.iterdir()] == ["data_batch_1"]


def test_a_working_exploit_is_refused(tmp_path: Path) -> None:
    data = pickle.dumps({"data": Evil(tmp_path / "pwned"), "labels": [1]}, 2)
    pickle.loads(data)
    assert (tmp_path / "pwned").exists()  # it does work on Python's own reader
    (tmp_path / "pwned").unlink()
    (tmp_path / "data_batch_1").write_bytes(data)
    run(
        "cifar10",
        tmp_path,
        tmp_path / "out",
        fails="names 'posix system', which is no part of an array: refused, nothing was run",
    )
    assert not (tmp_path / "pwned").exists()


DAMAGED = (
    *(
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x02(.",
        b"\x80\x02e.",
        b"\x80\x02h\x07.",
        b"\x80\x02K\x01.",
        b"\xff\xd8\xff",
    ),
    *(
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02}K\x01K\x02s.",
        b"\x80\x02t.",
        b"\x80\x02q\x00.",
    ),
    b"\x80\x02T\xff\xff\xff\x7fa.",
)


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged_pickles_are_one_clear_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "batch").write_bytes(data)
    with pytest.raises(DataError, match="batch"):
        numpy_pickle.load(tmp_path / "batch")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3), np.int16),
        np.zeros((2, 3), object),
        np.zeros(3),
        np.asfortranarray(np.eye(3, dtype=np.uint8)),
    ],
)
def test_only_arrays_of_bytes_are_taken(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": array}, 4))
    with pytest.raises(DataError, match="no array of bytes"):
        numpy_pickle.array(numpy_pickle.load(path)["data"], path)


def test_a_shape_that_the_bytes_do_not_fill_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    whole = python2({"data": planes(range(2))})
    path.write_bytes(whole.replace(b"M\x02\x00", b"M\xff\x00"))
    with pytest.raises(DataError, match="no array of bytes"):
        numpy_pickle.array(numpy_pickle.load(path)["data"], path)
