"""The demonstration, from images to an evaluated encoder on this machine:

    python launchers/demo.py [FOLDER] [key=value ...]

Every stage is skipped if its result is there and complete, so a stopped demonstration resumes where
it was. All files are below demo/; delete that folder to begin again.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from scaletrain.data.reading.reader import Shards
from scaletrain.runtime import locks, tables

if TYPE_CHECKING:
    from scaletrain.evals.encoders.targets import EncoderKind

HOME, RECIPE = Path("demo"), Path("configs/demo_fashion_mnist.yaml")
SHARDS, RUN, VERIFIED = HOME / "shards", HOME / "run", HOME / "verified.json"
SPLITS = ("train", "test")
PACKAGE, SYSTEM = "dataset-fashion-mnist", Path("usr/share/datasets/fashion-mnist")
FILES = tuple(
    f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
ENCODERS: dict[EncoderKind, str] = {
    "pixels": "raw pixels",
    "untrained": "untrained encoder",
    "trained": "trained encoder",
}
# The probe sees each image once encoded; with crops, as in the papers' card, it would take longer
# than the training.
PROBE = ("linear.augment=false", "linear.epochs=20")

console = Console(highlight=False, markup=False, soft_wrap=True)


class DemoError(ValueError):
    """A stage cannot be done; the text says why and what to do."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which unlike the terminal's Ctrl-C reaches this process only."""


def main(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FOLDER] [KEY=VALUE]...",
            help=f"FOLDER holds {', '.join(FILES)}; the rest changes the recipe.",
        ),
    ] = None,
) -> None:
    """Fetch Fashion-MNIST, write and verify shards, train on two processes, evaluate, and say what
    to do next.
    """
    changes = [text for text in arguments or () if "=" in text]
    folders = [Path(text).expanduser().absolute() for text in arguments or () if "=" not in text]
    if len(folders) > 1:
        raise DemoError(f"give one folder of images, not {len(folders)}")

    os.chdir(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGTERM, _interrupt)
    HOME.mkdir(exist_ok=True)
    with _alone():
        try:
            write_shards(*folders)
            verify()
            train(changes)
            summary(evaluate())
        except KeyboardInterrupt:
            console.print("\nstopped; rerun the same command to resume")
            raise typer.Exit(130) from None


# --- stages ---------------------------------------------------------------------------------------


def write_shards(source: Path | None = None) -> None:
    _headline(1, "images: Fashion-MNIST, 60,000 for training and 10,000 for testing")
    # the importer renames the finished folder into place
    there = SHARDS.is_dir()
    found = None if there else find(source)
    console.print(f"from {found}" if found else "skipped: the shards are written")
    _headline(2, "shards: tar files with an index")

    if found:
        _python("shards/fashion_mnist.py", str(found), str(SHARDS))
    else:
        console.print(f"skipped: {SHARDS} is there")


def verify() -> None:
    _headline(3, "verification: every byte against the index, every image decoded")
    now = {split: Shards(SHARDS / split).fingerprint for split in SPLITS}
    if VERIFIED.is_file() and VERIFIED.read_text() == json.dumps(now):
        console.print("skipped: these shards were found sound before")
        return

    for split in SPLITS:
        _python("shards/verify.py", str(SHARDS / split))

    VERIFIED.write_text(json.dumps(now))


def train(changes: Sequence[str]) -> None:
    _headline(4, "training: a narrow ResNet-18 on local processes, without labels")
    settings = [f"data.path={SHARDS / 'train'}", *changes]
    if _trained(settings):
        console.print(f"skipped: {RUN} is complete")
        return

    import torch

    procs = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    _python("launchers/local.py", "--procs", str(procs), str(RECIPE), *settings, "--run", str(RUN))


def evaluate() -> dict[str, dict[str, str]]:
    """Metrics in per cent, each with its 95 % interval, by encoder."""
    _headline(5, "evaluation on frozen features: nearest neighbours and a linear probe")
    from scaletrain.checkpoint import reader
    from scaletrain.evals import run
    from scaletrain.launch.fleet.curves import Curves

    if reader.latest(RUN / "checkpoints") is None:
        raise DemoError(
            f"{RUN} holds no good checkpoint; delete {RUN} and run the demonstration again"
        )

    metrics: dict[str, dict[str, str]] = {}
    for encoder, label in ENCODERS.items():
        console.print(f"{label} ...")
        results = run.run(
            RUN,
            ["knn", "linear"],
            train=SHARDS / "train",
            test=SHARDS / "test",
            overrides=PROBE,
            encoder=encoder,
            notice=lambda text: console.print(f"skipped: {text}"),
        )

        metrics[encoder] = {
            name: "{:.1f} [{:.1f}, {:.1f}]".format(value, *result["intervals"][name])
            for result in results
            for name, value in result["metrics"].items()
        }

    # Evaluations write no TensorBoard: the fleet does.
    Curves(RUN).refresh()
    return metrics


def summary(metrics: dict[str, dict[str, str]]) -> None:
    rows = [
        (label, *(metrics[encoder][name] for name in ("knn_20", "linear")))
        for encoder, label in ENCODERS.items()
    ]
    console.print()
    title = "Fashion-MNIST, top-1 in % [95 % interval]"
    tables.show((title, "kNN, k = 20", "linear"), rows)
    console.print()

    tool = (
        Path(os.path.relpath(sys.executable)).parent
        if Path(sys.executable).is_relative_to(Path.cwd())
        else Path()
    )

    for what, where in {
        "run": f"{RUN}  (config.yaml, checkpoints/, metrics.jsonl, evals/)",
        "shards": f"{SHARDS / 'train'}  {SHARDS / 'test'}",
        "TensorBoard": f"{RUN / 'tensorboard'}",
    }.items():
        console.print(f"{what:13}{where}")

    console.print("\nnext:")
    for command in (
        f"{tool / 'tensorboard'} --logdir {RUN / 'tensorboard'}",
        f"{tool / 'scaletrain'} eval {RUN} knn linear --set linear.augment=false",
        f"{tool / 'python'} shards/folder.py YOUR_IMAGES data/train",
        f"{tool / 'python'} launchers/local.py --procs 2 configs/byol_r18_cifar10.yaml "
        "data.path=data/train --run runs/mine",
    ):
        console.print(f"  {command}")


# --- Fashion-MNIST --------------------------------------------------------------------------------


def find(source: Path | None) -> Path:
    """A folder of the four files: the one given, the system's, an earlier download, or a new one.
    Raises DemoError.
    """
    if source is not None:
        if missing := [name for name in FILES if not (source / name).is_file()]:
            raise DemoError(
                f"{source} has no {missing[0]}; give the folder that holds {', '.join(FILES)}"
            )
        return source

    downloads = HOME / "data"
    for folder in (Path("/") / SYSTEM, downloads):
        if all((folder / name).is_file() for name in FILES):
            return folder

    for what, fetch in (
        (f"Debian package {PACKAGE}", _from_debian),
        ("torchvision's download", _from_torchvision),
    ):
        console.print(f"{what} ...")
        try:
            return fetch(downloads)
        except (
            OSError,
            RuntimeError,
            subprocess.SubprocessError,
        ) as error:  # urllib's errors are OSErrors
            console.print(
                f"{what}: not available "
                f"({(str(error).strip().splitlines() or [type(error).__name__])[-1]})"
            )

    raise DemoError(
        f"Fashion-MNIST could not be fetched. Give a folder that holds {', '.join(FILES)}: make "
        "demo FASHION_MNIST=FOLDER"
    )


def _from_debian(dest: Path) -> Path:
    """Download the package and unpack it, without root and without installing it."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"there is no {tool} here")

    with tempfile.TemporaryDirectory(dir=HOME) as temporary:
        place = Path(temporary).absolute()
        quick = (
            "-o",
            "Acquire::Retries=1",
            "-o",
            "Acquire::http::Timeout=30",
            "-o",
            "APT::Sandbox::User=root",
        )

        try:
            _quiet(place, "apt-get", *quick, "download", PACKAGE)
        except (
            RuntimeError
        ):  # the system's package lists are missing or old: fetch lists of our own
            own = (
                *quick,
                "-o",
                f"Dir::State::Lists={place / 'lists'}",
                "-o",
                f"Dir::Cache={place / 'cache'}",
            )

            for folder in ("lists", "cache"):
                (place / folder / "partial").mkdir(parents=True)

            _quiet(place, "apt-get", *own, "update")
            _quiet(place, "apt-get", *own, "download", PACKAGE)

        package = next(place.glob("*.deb"))
        _quiet(place, "dpkg-deb", "-x", str(package), "unpacked")
        return _keep(place / "unpacked" / SYSTEM, dest)


def _from_torchvision(dest: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    with tempfile.TemporaryDirectory(dir=HOME) as temporary:
        # checks md5 sums
        FashionMNIST(temporary, download=True)
        return _keep(Path(temporary) / "FashionMNIST" / "raw", dest)


def _keep(found: Path, dest: Path) -> Path:
    """Move what was fetched into place, only now that it is complete: `find` goes by names."""
    shutil.rmtree(dest, ignore_errors=True)
    return found.rename(dest)


# --- processes and paths --------------------------------------------------------------------------


def _trained(settings: Sequence[str]) -> bool:
    """Whether the run is at its last step with these very settings; others are the trainer's to
    refuse.
    """
    if not (RUN / "checkpoints").is_dir():
        return False

    from scaletrain.checkpoint import reader
    from scaletrain.config import load

    saved = reader.latest(RUN / "checkpoints")
    if saved is None or saved.step < saved.meta["clock"]["total"]:
        return False

    return not load.diff(load.load(RUN / "config.yaml"), load.load(RECIPE, settings))


def _headline(number: int, text: str) -> None:
    console.print(f"\n[{number}/5] {text}", style="bold")


def _python(*command: str) -> None:
    """Run one of the project's scripts in view. Its error text is on the screen already when it
    fails.
    """
    console.print(f"$ python {' '.join(command)}", style="dim")

    with subprocess.Popen([sys.executable, *command], preexec_fn=_follow) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt as reason:
            if isinstance(reason, _Terminated):
                process.terminate()
            process.wait()
            raise

    if code in (130, 143):
        raise KeyboardInterrupt
    if code:
        raise DemoError(
            f"{command[0]} ended with exit code {code}; run this again, or delete {HOME} to start "
            "over"
        )


def _quiet(folder: Path, *command: str) -> None:
    """Run a system tool in `folder` without output. Raises RuntimeError with the last line of its
    complaint.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"{command[0]} failed")


def _follow() -> None:
    """A stage ends with the demonstration, however that ends: a second one must not meet it at
    work.
    """
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


@contextmanager
def _alone() -> Iterator[None]:
    with locks.locked(HOME / ".lock", wait=False) as lock:
        if lock is None:
            raise DemoError(
                f"another demonstration is at work in {HOME.absolute()}; wait for it or stop it"
            )

        yield


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
