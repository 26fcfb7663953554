"""Progress that nobody watches on a terminal is told in lines, also while nothing is updated."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from metateleport.cli import progress
from metateleport.cli.progress import Lines, bars, status


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lines.__init__, "__defaults__", (0.05,))


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [re.sub(r"^\[\d+ s\] ", "", line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_every_few_seconds_though_nothing_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    with status("tuning adam") as doing:
        time.sleep(0.18)
        doing("running adam")
        time.sleep(0.12)
    lines = said(capsys)
    assert lines.count("tuning adam") >= 2
    assert lines[-1] == "running adam"
    assert set(lines) == {"tuning adam", "running adam"}


def test_rows_show_their_share(capsys: pytest.CaptureFixture[str]) -> None:
    with bars() as shown:
        first = shown.add_task("learned", total=1.0, status="")
        second = shown.add_task("step-only", total=1.0, status="")
        shown.update(first, completed=1.0, status="meta-step 9")
        shown.update(second, completed=0.25, status="meta-step 2")
        time.sleep(0.12)
    assert set(said(capsys)) == {"step-only: 25%, meta-step 2"}


def test_what_is_over_at_once_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lines.__init__, "__defaults__", (5.0,))
    with status("reading"):
        pass
    assert said(capsys) == []


def test_an_error_ends_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), status("reading"):
        raise ValueError("no")
    time.sleep(0.1)
    assert said(capsys) == []


def test_a_line_is_there_while_the_work_goes_on() -> None:
    """It does not wait in a buffer until the process ends."""
    code = f"import time; from {progress.__name__} import Lines, status; Lines.__init__.__defaults__ = (0.05,)\n"
    code += "with status('working'): time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "working" in process.stderr.readline()
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
