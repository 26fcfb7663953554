"""Signals that end a process: the first lets it save its work, a second ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["Stopped", "code_of", "received", "stoppable"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_received: list[int] = []


class Stopped(KeyboardInterrupt):
    """The process was asked to end, by Ctrl-C or by another signal; the message says what was saved.

    Args:
        message: for people; empty if nothing was saved.
        number: the signal.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


def received() -> int | None:
    """The signal that asked this process to end, inside the outermost `stoppable`; None if none did.

    An exception that a signal raises inside a library that is being imported may come out as another one.
    """
    return _received[0] if _received else None


def code_of(error: BaseException) -> int:
    """The exit code after an interruption: 128 and the signal's number, as shells have it.

    Example:
        >>> code_of(KeyboardInterrupt()), code_of(Stopped("saved", signal.SIGTERM))
        (130, 143)
    """
    return 128 + getattr(error, "number", signal.SIGINT)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside the block the first SIGINT, SIGTERM or SIGHUP raises `Stopped`, and a second one ends the process at once.

    A handler that somebody else has set stays, and so does a signal that is ignored, as SIGHUP under `nohup`. In
    threads other than the main one, which get no signals, nothing changes.

    Example:
        >>> import os
        >>> with contextlib.suppress(Stopped), stoppable():
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     print("not reached")
        >>> received() is None
        True
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = {getattr(signal, name) for name in _NAMES if hasattr(signal, name)}
    before: dict[int, Any] = {number: signal.getsignal(number) for number in ours}
    free = {number for number in ours if before[number] in (signal.SIG_DFL, signal.default_int_handler)}

    def stop(number: int, _: FrameType | None) -> None:
        _received.append(number)
        for each in free:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped("", number)

    for number in free:
        signal.signal(number, stop)
    try:
        yield
    finally:
        if free:
            _received.clear()
        for number in free:
            signal.signal(number, before[number])
