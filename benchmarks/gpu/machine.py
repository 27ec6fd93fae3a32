"""What the machine can do, and whether the project's own checks of an installation pass on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tomllib

import torch
from packaging.requirements import Requirement

from benchmarks.gpu.report import ROOT, Settings, attempt, check, median_seconds, python, say

GIB = 2**30
# of the square matrices that are multiplied
SIDE = 8192


def run(settings: Settings) -> None:
    say(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    attempt("requirements", requirements)
    if settings.cuda:
        attempt("ceilings", lambda: ceilings(settings))

    attempt("tests", lambda: tests(settings))
    attempt("doctor", lambda: doctor(settings))


def requirements() -> None:
    """Which of the project's dependencies are missing here or too old."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    unmet = []
    for requirement in map(Requirement, project["dependencies"]):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version == "missing" or not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement} ({version})")

    check(
        not unmet,
        "requirements: "
        + (
            f"{', '.join(unmet)}. Save `python3 -m pip list --format=freeze` of this machine to a "
            "file and run `make gpu-check-prepare HAS=FILE`"
            if unmet
            else "all are met"
        ),
    )


def ceilings(settings: Settings) -> None:
    """The most that this GPU can copy and multiply, which other figures are compared with."""
    p = torch.cuda.get_device_properties(0)
    say(
        f"device {p.name}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} SMs, "
        f"cuDNN {torch.backends.cudnn.version()}"
    )

    say(f"copy {copy_rate(settings) / 1e12:.2f} TB/s, read and written")
    say(f"bf16 product of {SIDE} x {SIDE} {product_rate(settings) / 1e12:.0f} TFLOP/s")
    say(f"pinned host memory to device {upload_rate(settings) / 1e9:.1f} GB/s")


def copy_rate(settings: Settings) -> float:
    """Bytes per second, those read and those written, of a copy within the device."""
    source = torch.randn(GIB // 2, device=settings.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(settings, lambda: target.copy_(source))


def product_rate(settings: Settings) -> float:
    """Floating-point operations per second of a matrix product."""
    a, b = (torch.randn(SIDE, SIDE, device=settings.device).bfloat16() for _ in range(2))
    return 2 * SIDE**3 / median_seconds(settings, lambda: a @ b)


def upload_rate(settings: Settings) -> float:
    """Bytes per second from pinned memory of the host."""
    source = torch.empty(GIB // 4, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=settings.device)

    def upload() -> None:
        target.copy_(source, non_blocking=True)

    return source.nbytes / median_seconds(settings, upload)


def tests(settings: Settings) -> None:
    words = ["-m", "pytest", "-rfE", "-p", "no:cacheprovider", "tests/unit/test_cuda.py"]
    code, text = python(words, settings.seconds)
    check(code == 0, f"tests/unit/test_cuda.py: {' '.join(text.splitlines()[-1:])}")


def doctor(settings: Settings) -> None:
    require = ["--require-gpu"] if settings.cuda else []
    folder = str(settings.work / "doctor")
    code, text = python(["-m", "scaletrain", "doctor", *require, "--run", folder], settings.seconds)
    for line in text.splitlines():
        say(f"  {line}")
    check(code == 0, f"scaletrain doctor: exit code {code}")
