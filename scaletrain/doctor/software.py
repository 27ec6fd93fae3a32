"""Versions and devices."""

from __future__ import annotations

import platform
import re
from collections import Counter
from pathlib import Path

import torch

from scaletrain.doctor.page import Finding, limit
from scaletrain.runtime.versions import commit, installed

NEEDED = (
    "torchvision",
    "numpy",
    "opencv-python-headless",
    "webdataset",
    "safetensors",
    "pydantic",
    "ruamel.yaml",
    "tensorboard",
)
OPTIONAL = ("deepspeed", "fairscale", "submitit", "timm")
DRIVER = Path("/proc/driver/nvidia/version")


def versions() -> list[Finding]:
    """This package, Python, torch with what it was built for, and the libraries."""
    there = {name: installed(name) for name in (*NEEDED, *OPTIONAL)}
    shown = ", ".join(f"{name} {version}" for name, version in there.items() if version)
    findings = [
        Finding(
            "ok",
            "scaletrain",
            f"{installed('scaletrain') or 'source tree'}, commit {commit() or 'unknown'}",
        ),
        Finding("ok", "python", f"{platform.python_version()}, {platform.platform()}"),
        Finding("ok", "torch", f"{torch.__version__}, {_built_for()}"),
        Finding("ok", "libraries", shown),
    ]

    # a library may be there under another distribution's name, as OpenCV often is
    missing = [name for name in NEEDED if not there[name] and name != "opencv-python-headless"]
    if missing:
        findings.append(
            Finding("fail", "libraries", f"not installed: {', '.join(missing)}", "pip install -e .")
        )

    return findings


def _built_for() -> str:
    if torch.version.cuda is None:
        return "built without CUDA" + (f", ROCm {torch.version.hip}" if torch.version.hip else "")

    try:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    except AttributeError:  # a build without its bindings
        nccl = "none"

    return (
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}, "
        f"driver {_driver()}"
    )


def _driver() -> str:
    if not DRIVER.exists():
        return "none"
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", DRIVER.read_text())
    return found[1] if found else "unknown"


def devices(require: bool) -> list[Finding]:
    """The GPUs that this process sees; without one, a failure if `require`."""
    if not torch.cuda.is_available():
        if not require:
            return [Finding("ok", "devices", "no GPU: training runs on the CPU")]

        fix = (
            "ask the scheduler for one (--gres=gpu:1), and install torch built for CUDA where "
            "'torch' above says it is not"
        )
        return [Finding("fail", "devices", "no GPU, and --require-gpu was given", fix)]

    seen = Counter(_device(number) for number in range(torch.cuda.device_count()))
    return [
        limit(
            not bf16,
            "devices",
            f"{count} x {text}, {'bf16' if bf16 else 'no bf16'}",
            "set engine.precision=fp32",
        )
        for (text, bf16), count in seen.items()
    ]


def _device(number: int) -> tuple[str, bool]:
    facts = torch.cuda.get_device_properties(number)
    text = (
        f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability "
        f"{facts.major}.{facts.minor}"
    )

    # older ones only emulate it
    return text, facts.major >= 8
