"""Progress on stderr: live where a person watches a terminal, a line every ten seconds where it is piped."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["EVERY", "Lines", "bars", "status"]

EVERY = 10.0
"""Seconds between two lines where nobody watches a terminal."""


class Lines:
    """Rows of progress as lines of text: what is being done, every few seconds.

    A thread prints, so that a line comes even while nothing is updated: what is said last then is still going on.

    Args:
        every: seconds between two lines.
    """

    def __init__(self, every: float = EVERY) -> None:
        self.every, self.started = every, time.monotonic()
        self._rows: list[str] = []
        self._doing: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._print_now_and_then, daemon=True)

    def add_task(self, description: str, total: float = 1.0, status: str = "") -> TaskID:
        """Adds a row and returns its number."""
        self._rows.append(description)
        return TaskID(len(self._rows) - 1)

    def update(self, row: TaskID, completed: float = 0.0, status: str = "") -> None:
        """Sets the share of a row that is done, and what is said of it."""
        self.say(f"{self._rows[row]}: {completed:.0%}, {status}")

    def say(self, doing: str) -> None:
        """Sets the text of the next lines."""
        self._doing = doing

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if kind is None and time.monotonic() - self.started >= self.every:
            self._print()

    def _print_now_and_then(self) -> None:
        while not self._over.wait(self.every):
            self._print()

    def _print(self) -> None:
        if self._doing is not None:
            print(f"[{time.monotonic() - self.started:.0f} s] {self._doing}", file=sys.stderr, flush=True)


def bars() -> AbstractContextManager[Progress | Lines]:
    """A context in which rows of progress are shown: bars on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        return Lines()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


@contextmanager
def status(doing: str) -> Iterator[Callable[[str], None]]:
    """A context that shows what is being done; what it gives is called with something else that is being done now."""
    if sys.stderr.isatty():
        with Console(stderr=True).status(doing) as shown:
            yield shown.update
        return
    with Lines() as lines:
        lines.say(doing)
        yield lines.say
