"""How failures of commands end: their text, their exit code, and who says it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.commands import call

from scaletrain import exit_codes
from scaletrain.checkpoint import files
from scaletrain.core import Batch
from scaletrain.data.errors import DataError, LoaderError

ROOT = Path(__file__).parents[2]


def raising(error: BaseException) -> Callable[..., None]:
    def train(*_: Any, **__: Any) -> None:
        raise error

    return train


def split_unevenly(*_: Any, **__: Any) -> None:
    Batch((torch.zeros(1, 3, 3, 8, 8),), torch.zeros(3), torch.zeros(3), torch.zeros(2, 3)).split(2)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (raising(DataError("a.tar at byte 512: truncated")), "a.tar at byte 512: truncated"),
        (
            raising(PermissionError(13, "Permission denied", "/run")),
            "[Errno 13] Permission denied: '/run'",
        ),
        (
            split_unevenly,
            "3 samples per rank do not split into 2 equal micro-batches",
        ),  # a plain ValueError of our own code
    ],
)
def test_expected_failures_are_one_line(
    recipe: Path, training: Any, fault: Callable[..., None], text: str
) -> None:
    training(fault)
    result = call("train", recipe)
    assert (result.exit_code, result.stderr) == (2, f"error: {text}\n")
    for shown in (call("--debug", "train", recipe), call("train", recipe, SCALETRAIN_DEBUG="1")):
        assert isinstance(
            shown.exception, ValueError | OSError
        )  # it gets through, with its traceback


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ECONNRESET, "Connection reset by peer"), 75),
        (OSError(errno.ENOSPC, "No space left on device", "metrics"), 75),
        (OSError(errno.ESTALE, "Stale file handle"), 75),
        (TimeoutError("no answer"), 75),
        (MemoryError("4 GiB"), 75),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 75),
        (LoaderError("worker 1 was killed"), 75),
        (files.CheckpointError("step 3 was not saved", 75), 75),
        (files.CheckpointError("step 3 is damaged"), 2),
        (OSError(errno.EACCES, "Permission denied"), 2),
        (OSError(errno.ENOENT, "No such file or directory"), 2),
    ],
)
def test_exit_codes(recipe: Path, training: Any, error: Exception, code: int) -> None:
    training(raising(error))
    result = call("train", recipe)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_what_failed_passingly_underneath_may_be_tried_again() -> None:
    error = DataError("shard 7 cannot be read")
    assert exit_codes.of(error) == 2
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    assert exit_codes.of(error) == 75


@pytest.mark.parametrize(
    "error",
    [TypeError("defect"), ValueError("of another library"), RuntimeError("defect"), KeyError("x")],
)
def test_defects_keep_their_traceback(recipe: Path, training: Any, error: Exception) -> None:
    training(raising(error))
    result = call("train", recipe)
    assert (result.exit_code, result.exception) == (1, error)


def test_bad_recipe_and_bad_usage(recipe: Path) -> None:
    result = call("train", recipe, "optim.lrr=1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        result.stderr == "error: command line: unknown key 'optim.lrr'; did you mean 'optim.lr'?\n"
    )
    for arguments in (("train",), ("train", recipe, "--rum", "x"), ("trian",), ("eval", "run"), ()):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "Usage: " in result.output
        assert "Traceback" not in result.output


def test_interrupt_is_quiet(recipe: Path, training: Any) -> None:
    training(raising(KeyboardInterrupt()))
    result = call("train", recipe)
    assert (result.exit_code, result.stderr) == (130, "")


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("bad shard"), 2), (RuntimeError("defect"), 1)]
)
def test_first_rank_speaks_for_all(
    recipe: Path, training: Any, tmp_path: Path, error: Exception, code: int
) -> None:
    place = str(tmp_path / "first-failure")
    training(raising(error))
    first = call("train", recipe, RANK="1", SCALETRAIN_ERROR_FILE=place)
    assert first.exit_code == code
    assert first.stderr == "error: bad shard\n" if code == 2 else first.exception is error
    training(raising(RuntimeError("connection closed by peer")))
    later = call("train", recipe, RANK="2", SCALETRAIN_ERROR_FILE=place)
    assert (later.exit_code, later.output) == (code, "")
    usage = call("train", recipe, "--rum", RANK="3", SCALETRAIN_ERROR_FILE=place)
    assert (usage.exit_code, usage.output) == (code, "")
