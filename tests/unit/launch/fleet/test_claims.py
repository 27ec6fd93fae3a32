"""Claims: one fleet at a time plans, and what a dead one held is free."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaletrain.evals.errors import EvalError
from scaletrain.launch.fleet.claims import Claim, Claims, Holder
from scaletrain.runtime import locks


def _enter(run: Path, ready: Any, plan: bool) -> None:
    with Claims(run) as claims, claims.alone() if plan else contextlib.nullcontext():
        ready.send(claims.fleet)
        ready.recv()


@pytest.fixture
def other(tmp_path: Path) -> Callable[..., tuple[str, Any]]:
    """Starts a fleet of another process; its name, and the process."""

    def start(*, plan: bool = False) -> tuple[str, Any]:
        context = multiprocessing.get_context("fork")
        mine, theirs = context.Pipe()
        process = context.Process(target=_enter, args=(tmp_path, theirs, plan), daemon=True)
        process.start()
        return mine.recv(), process

    return start


def test_a_fleet_is_alive_until_it_ends_however_it_ends(
    tmp_path: Path, other: Callable[..., tuple[str, Any]]
) -> None:
    with Claims(tmp_path) as mine:
        name, process = other()
        assert mine.alive(mine.fleet)
        assert mine.alive(name)
        process.kill()
        process.join()
        assert not mine.alive(name)
        with Claims(tmp_path) as second:
            assert mine.alive(second.fleet)
        assert not mine.alive(second.fleet)

        _, process = other()
        process.kill()
        process.join()
        with Claims(tmp_path):
            """It deletes what the dead one has left."""
        assert [path.name for path in (tmp_path / "evals" / "claims").glob("*.fleet")] == [
            f"{mine.fleet}.fleet"
        ]


def test_what_a_killed_fleet_had_begun_to_write_is_deleted(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        claims.write("knn@d", Claim(attempts=1))

    folder = tmp_path / "evals" / "claims"
    (folder / ".knn@d.json.0a1b.tmp").write_text('{"attem')
    with Claims(tmp_path) as claims:
        assert claims.read("knn@d") == Claim(attempts=1)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "knn@d.json"]


def test_a_killed_planner_lets_others_plan(
    tmp_path: Path, other: Callable[..., tuple[str, Any]]
) -> None:
    with Claims(tmp_path) as mine:
        _, process = other(plan=True)
        with locks.locked(tmp_path / "evals" / "claims" / ".lock", wait=False) as lock:
            assert lock is None
        process.kill()
        process.join()
        with mine.alone():
            pass


def test_claims_are_kept_and_one_that_says_nothing_has_no_file(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        claim = (
            Claim().failed("out of memory", None).held_by(Holder(fleet="n1-7-ab", launch="0001"))
        )
        claims.write("knn@a-step-3-x", claim)
        assert claims.names() == {"knn@a-step-3-x"}
        assert claims.read("knn@a-step-3-x") == claim
        assert (claim.attempts, claim.error) == (1, "out of memory")
        assert claim.failed("again", 2) == Claim(attempts=2, error="again", refused=True)
        claims.write("knn@a-step-3-x", Claim())
        assert claims.names() == set()
        assert claims.read("knn@a-step-3-x") == Claim()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"attempts": -1}',
        '{"holder": {"fleet": "../../x"}}',
        '{"holder": {"fleet": "a", "launch": "../../../etc"}}',
        '{"holder": {"fleet": "a", "job": "../1"}}',
        '{"surprise": 1}',
    ],
)
def test_other_files_are_no_claims(tmp_path: Path, text: str) -> None:
    with Claims(tmp_path) as claims:
        path = tmp_path / "evals" / "claims" / "x.json"
        path.write_text(text)
        with pytest.raises(EvalError, match=rf"{path} is not a claim of a fleet .*; delete it"):
            claims.read("x")
        path.write_text(" " * (2 << 20))
        with pytest.raises(EvalError, match="too large"):
            claims.read("x")


def test_without_locks_a_fleet_works_and_says_that_it_must_be_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "acquire", refuse)
    said: list[str] = []
    with Claims(tmp_path, said.append) as claims, claims.alone():
        claims.write("x", Claim(attempts=1))
        assert claims.read("x").attempts == 1
    assert len(said) == 1
    assert "let no second fleet work on this run" in said[0]


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "evals").write_text("in the way")
    with pytest.raises(EvalError, match=r"cannot write .*/evals/claims: "):
        Claims(tmp_path).__enter__()
