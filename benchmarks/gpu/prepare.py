"""Makes .gpu/, what a machine with a GPU but no network lacks: `make gpu-check-prepare`, where pip
works, with DATA=FOLDER for real images and HAS=FILE for another machine's packages.

    gpu_check.sh  starts the check there
    whl/          wheels of the packages that are missing there
    data/         real images, if DATA is given: its cifar10.tar and imagenet_sample.tar

Which packages are missing is worked out: the requirements of this project, and theirs in turn, less
what the machine has. Their versions are those of the environment that runs this, with which the
test suite passes; newer ones, chosen by pip on the day, would be untested.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu.report import PREPARED, ROOT, WHEELS_PYTHON

# Packages that a machine for PyTorch usually has, and the GPU machine of benchmarks/GPU.md had. HAS
# names those of another one, with versions.
USUAL = (
    "torch",
    "torchvision",
    "numpy",
    "numba",
    "opencv-python-headless",
    "tensorboard",
    "safetensors",
    "rich",
    "typer",
    "pyyaml",
    "cloudpickle",
    "packaging",
    "pytest",
    "pytest-timeout",
)
# of the GPU machine
PYTHON = ".".join(map(str, WHEELS_PYTHON))
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# what a check of the machine needs besides the project's own requirements
TESTS = ("pytest", "pytest-timeout")
# archives that are packed well by gzip, and those that are not
COMPRESSED, AS_IT_IS = "cifar10", "imagenet_sample"
LIMIT_MIB = 64


def missing(has: Mapping[str, str | None]) -> dict[str, str]:
    """Versions of the packages that the project needs and the machine does not have; `has` maps its
    packages to their versions, None where any will do.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    queue = [Requirement(text) for text in (*project["dependencies"], *TESTS)]
    found: dict[str, str] = {}

    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in found or satisfied(requirement, has):
            continue

        found[name] = importlib.metadata.version(name)
        needs = map(Requirement, importlib.metadata.requires(name) or [])
        environment = {"extra": "", "python_version": PYTHON, "python_full_version": f"{PYTHON}.0"}
        queue += [r for r in needs if r.marker is None or r.marker.evaluate(environment)]

    return dict(sorted(found.items()))


def satisfied(requirement: Requirement, has: Mapping[str, str | None]) -> bool:
    name = canonicalize_name(requirement.name)
    if name not in has:
        return False
    version = has[name]
    return version is None or requirement.specifier.contains(version, prereleases=True)


def listed(path: Path) -> dict[str, str | None]:
    """Packages and versions of a file that `pip list --format=freeze` wrote."""
    pairs = (line.split("==") for line in path.read_text().splitlines() if "==" in line)
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def download(packages: Mapping[str, str], folder: Path) -> None:
    """The packages as wheels for the GPU machine, one of each."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", "--implementation", "cp"),
            *("--python-version", PYTHON, *platforms, "--dest", str(folder)),
            *(f"{name}=={version}" for name, version in packages.items()),
        ],
        check=True,
    )


def pack(data: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    with (
        (data / f"{COMPRESSED}.tar").open("rb") as source,
        gzip.open(folder / f"{COMPRESSED}.tar.gz", "wb", compresslevel=6) as packed,
    ):
        shutil.copyfileobj(source, packed)
    shutil.copy(data / f"{AS_IT_IS}.tar", folder)


def main(
    data: Annotated[
        Path | None,
        typer.Option(file_okay=False, exists=True, help="With cifar10.tar, imagenet_sample.tar."),
    ] = None,
    has: Annotated[
        Path | None,
        typer.Option(dir_okay=False, exists=True, help="pip list --format=freeze of the machine."),
    ] = None,
) -> None:
    """Make .gpu/ anew."""
    shutil.rmtree(PREPARED, ignore_errors=True)
    PREPARED.mkdir()
    shutil.copy(ROOT / "benchmarks" / "gpu" / "gpu_check.sh", PREPARED)

    packages = missing(dict.fromkeys(USUAL) if has is None else listed(has))
    if packages:
        download(packages, PREPARED / "whl")
    if data is not None:
        pack(data, PREPARED / "data")

    size = sum(path.stat().st_size for path in PREPARED.rglob("*") if path.is_file()) / 2**20
    print(f".gpu: {size:.1f} MiB, with {' '.join(f'{n}=={v}' for n, v in packages.items())}")
    if size >= LIMIT_MIB:
        print(f"error: {LIMIT_MIB} MiB is what may travel to the GPU machine", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
