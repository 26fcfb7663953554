"""Signals: the first raises, a second is the system's; handlers of others, and ignored signals, stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from metateleport import cli
from metateleport.interruption import Stopped, code_of, received, stoppable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_raises_and_the_second_is_the_systems(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with stoppable():
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), number)
        assert code_of(caught.value) == 128 + number
        assert received() == number
        assert [signal.getsignal(each) for each in SIGNALS] == [signal.SIG_DFL] * 3
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert received() is None


def test_a_handler_of_somebody_else_and_an_ignored_signal_stay() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, ignored)
    assert seen == [signal.SIGTERM]


def test_one_block_inside_another_leaves_the_outer_one() -> None:
    with stoppable():
        outer = signal.getsignal(signal.SIGTERM)
        with stoppable():
            assert signal.getsignal(signal.SIGTERM) is outer
        assert signal.getsignal(signal.SIGTERM) is outer


def test_a_thread_changes_nothing() -> None:
    found: list[Any] = []

    def run() -> None:
        with stoppable():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def stop_and(then: Callable[[], Any]) -> Callable[..., Any]:
    def run(*_: Any, **__: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            return then()

    return run


def broken() -> None:
    raise ImportError("numpy.core.multiarray failed to import")


def test_what_a_library_makes_of_a_signal_is_told_as_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metateleport.cli.tasks.run", stop_and(broken))
    assert cli.main(["tasks"]) == 143
    assert capsys.readouterr().err == "metateleport: interrupted\n"


def test_the_package_that_takes_signals_is_imported_without_what_is_slow() -> None:
    code = (
        "import sys, metateleport.cli\n"
        "assert not {'torch', 'numpy', 'rich', 'argparse'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
