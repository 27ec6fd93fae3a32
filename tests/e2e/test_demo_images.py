"""Where the demonstration takes Fashion-MNIST from: a folder, the system, a download,
Debian's package, torchvision.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torchvision

from launchers import demo

APT = """#!/bin/sh
# Finds the package only with fresh lists of one's own, as where lists were never fetched.
case "$*" in
*Dir::State::Lists=*download*) test -e "$0.updated" && cp {package} . ;;
*Dir::State::Lists=*update) touch "$0.updated" ;;
*) echo "E: Unable to locate package" >&2; exit 100 ;;
esac
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty demo/ and a system without the data set, without apt and without a network."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "demo").mkdir()
    monkeypatch.setattr(demo, "HOME", tmp_path / "demo")
    monkeypatch.setattr(demo, "SYSTEM", tmp_path.relative_to("/") / "system")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def unreachable(root: str, *, download: bool) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nno network")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", unreachable)
    return tmp_path


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in demo.FILES:
        (folder / name).write_bytes(b"")
    return folder


def test_the_given_folder_goes_first(place: Path) -> None:
    fill(place / "system")
    assert demo.find(fill(place / "mine")) == place / "mine"
    (place / "mine" / demo.FILES[2]).unlink()
    with pytest.raises(
        demo.DemoError, match=rf"mine has no {demo.FILES[2]}; give the folder that holds"
    ):
        demo.find(place / "mine")


def test_then_the_system_and_then_earlier_downloads(place: Path) -> None:
    fill(place / "demo" / "data")
    assert demo.find(None) == place / "demo" / "data"
    fill(place / "system")
    assert demo.find(None) == place / "system"
    (place / "system" / demo.FILES[0]).unlink()
    assert demo.find(None) == place / "demo" / "data"


@pytest.mark.skipif(not shutil.which("dpkg-deb", path=os.defpath), reason="no dpkg-deb")
@pytest.mark.parametrize("leftover", [False, True])
def test_the_debian_package_is_unpacked_and_kept(
    place: Path, leftover: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(place / "tree" / demo.SYSTEM)
    (place / "tree" / "DEBIAN").mkdir()
    (place / "tree" / "DEBIAN" / "control").write_text(
        f"Package: {demo.PACKAGE}\nVersion: 1\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: none\n"
    )
    package = place / f"{demo.PACKAGE}_1_all.deb"
    monkeypatch.setenv("PATH", f"{place / 'bin'}{os.pathsep}{os.defpath}")
    subprocess.run(
        ["dpkg-deb", "--build", str(place / "tree"), str(package)], check=True, capture_output=True
    )
    (place / "bin" / "apt-get").write_text(APT.format(package=package))
    (place / "bin" / "apt-get").chmod(0o755)
    if leftover:  # of an attempt that ended half-way
        (place / "demo" / "data").mkdir()
        (place / "demo" / "data" / demo.FILES[0]).write_bytes(b"half")
    assert demo.find(None) == place / "demo" / "data"
    assert {path.name for path in (place / "demo" / "data").iterdir()} == set(demo.FILES)
    assert [path.name for path in (place / "demo").iterdir()] == ["data"], (
        "no temporary folder stays"
    )
    package.unlink()
    assert demo.find(None) == place / "demo" / "data"


def test_then_torchvision(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a download that broke off has left is not taken for the data set."""
    ends = iter([ConnectionResetError("reset"), None])

    def fetch(root: str, *, download: bool) -> Any:
        assert download
        fill(Path(root) / "FashionMNIST" / "raw")
        if end := next(ends):
            raise end

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fetch)
    with pytest.raises(demo.DemoError):
        demo.find(None)
    assert demo.find(None) == place / "demo" / "data"
    assert [path.name for path in (place / "demo").iterdir()] == ["data"]
    out = capsys.readouterr().out
    assert (
        out.count("Debian package dataset-fashion-mnist: not available (there is no apt-get here)")
        == 2
    )
    assert "torchvision's download: not available (reset)" in out


def test_without_any_the_error_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(demo.DemoError, match="make demo FASHION_MNIST=FOLDER") as error:
        demo.find(None)
    assert "\n" not in str(error.value)
    assert "torchvision's download: not available (no network)" in capsys.readouterr().out
