"""Signals: which of them ask a run to save and stop, which end it at once, and what stays
ignored.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from scaletrain.runtime import signals as interrupt
from scaletrain.runtime.signals import Interrupt, ending_at_once


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_signal_is_noted_and_the_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupt() as asked:
        assert asked.agreed() == 0
        os.kill(os.getpid(), number)
        assert asked.agreed() == number
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)  # asking again changes nothing
            assert asked.agreed() == number
    assert signal.getsignal(number) == before


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked.agreed() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("signals", "training", "code"),
    [
        (["SIGINT", "SIGINT"], True, 130),  # Ctrl-C twice: now
        (["SIGTERM", "SIGINT"], True, 0),  # the launcher's and the terminal's of one Ctrl-C
        (["SIGTERM", "SIGINT", "SIGINT"], True, 130),
        (["SIGTERM", "SIGTERM"], True, 0),
        (["SIGTERM", "SIGTERM"], False, 143),  # nothing to save yet
    ],
)
def test_insisting(signals: list[str], training: bool, code: int) -> None:
    child = os.fork()
    if child == 0:
        with Interrupt() as asked:
            if training:
                asked.agreed()
            for name in signals:
                os.kill(os.getpid(), getattr(signal, name))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_command_with_nothing_to_save_ends_through_its_cleanup(number: signal.Signals) -> None:
    """Also where the signal is blocked from outside, as in a SLURM task."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    with pytest.raises(SystemExit) as ended, ending_at_once():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("resumable", [True, False])
def test_the_stop_of_what_can_be_resumed_is_noted_for_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, resumable: bool
) -> None:
    monkeypatch.setenv(interrupt.STOPPED_FILE, str(tmp_path / "1.0.stopped"))
    with pytest.raises(SystemExit), ending_at_once(resumable=resumable):
        os.kill(os.getpid(), signal.SIGUSR2)
    noted = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert noted == ({"1.0.stopped": "SIGUSR2"} if resumable else {})
