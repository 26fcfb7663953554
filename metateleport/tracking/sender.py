"""A thread that sends what is logged while the work goes on, and never stops it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from metateleport.tracking.delivery import Delivery
from metateleport.tracking.journal import Journal
from metateleport.tracking.store import connect, database_of, reason_of
from metateleport.tracking.sync import synchronise

__all__ = ["EVERY", "PATIENCE", "Sender"]

EVERY = 8.0
"""Seconds from one batch to the next."""

PATIENCE = 5.0
"""Seconds that are spent on a store that does not answer, before it is said and at the end of a run."""

_LONG = 90.0
"""Seconds that the slow parts may take at the end of a run: making a new store, and storing files."""

_SLOW = ("connecting", "storing", "making the run")

_unreachable: dict[str, float] = {}
"""When each store was last seen not to answer: the next run of a process need not wait for it anew."""


class Sender:
    """Sends a journal's operations to a store, every few seconds, in a thread of its own.

    Where the store does not answer, it is said once and tried again, ever more rarely.

    Args:
        uri: the store.
        say: called with messages, from the thread too.
    """

    def __init__(self, uri: str, say: Callable[[str], None]) -> None:
        self.uri, self.say = uri, say
        self.journal: Journal | None = None
        self._wake, self._ended, self._closing = threading.Event(), threading.Event(), threading.Event()
        self._doing, self._since = "connecting", time.monotonic()
        self._failing: float | None = None
        self._said = False
        self._thread = threading.Thread(target=self._work, name="metateleport-tracking", daemon=True)
        self._thread.start()

    def send(self, journal: Journal) -> None:
        """Begins with a journal."""
        self.journal = journal
        self._wake.set()

    def wake(self) -> None:
        """Sends soon what is there."""
        self._wake.set()

    def check(self) -> None:
        """Says so if the store has not answered for a while; called by the thread that logs."""
        if not self._said and self._doing == "sending" and time.monotonic() - self._since > PATIENCE:
            self._say_unreachable("no answer")

    def finish(self) -> bool:
        """Sends what is left, and says whether all is sent; gives up on a store that does not answer."""
        began = time.monotonic()
        self._closing.set()
        self._wake.set()
        while not self._ended.wait(0.05):
            # It may have been idle for long before.
            since = max(self._since, began) if self._failing is None else self._failing
            if time.monotonic() - since > self._patience():
                break
        return self._ended.is_set() and (self.journal is None or self.journal.empty)

    def _patience(self) -> float:
        if self._failing is not None and time.monotonic() - _unreachable.get(self.uri, -60.0) < 60.0:
            return 0.0
        if self._failing is not None:
            return PATIENCE
        # A batch that is under way may take its time on a busy machine.
        return _LONG if self._doing in _SLOW else 2 * PATIENCE

    def _beat(self, doing: str) -> None:
        self._doing, self._since = doing, time.monotonic()
        if doing == "sent":
            if self._failing is not None and self._said:
                self.say("MLflow's store is back; what was kept is sent")
            self._failing, self._said = None, False
            _unreachable.pop(self.uri, None)

    def _work(self) -> None:
        with contextlib.suppress(ImportError):
            # This takes a second or more, and says nothing of the store.
            import mlflow  # noqa: F401
        client, delivery, pause, others = None, None, EVERY, True
        while True:
            try:
                if client is None:
                    self._beat("connecting" if _is_new(self.uri) else "sending")
                    client = connect(self.uri, self.say)
                    self._beat("idle")
                if self.journal is not None:
                    delivery = delivery or Delivery(client, self.journal, self.say, self._beat)
                    _drain(self.journal, delivery)
                    if others:
                        # What earlier runs have left is sent once the store is seen to answer.
                        others = False
                        self._beat("storing")
                        synchronise(None, self.uri)
                self._doing, self._since = "idle", time.monotonic()
                pause = EVERY
            except Exception as error:
                self._failed(error)
                pause = min(2 * pause, 60.0) if self._said else 0.5
            if self._closing.is_set():
                if self.journal is None or self.journal.empty:
                    break
                if self._failing is not None and time.monotonic() - self._failing > self._patience():
                    break
                pause = min(pause, 0.5)
            # What is logged first is sent at once, so that a page that is open shows the run.
            self._wake.wait(pause)
            self._wake.clear()
        self._ended.set()

    def _failed(self, error: BaseException) -> None:
        now = time.monotonic()
        # The attempt has taken its time already.
        self._failing = self._since if self._failing is None else self._failing
        self._doing, self._since = "waiting", now
        if not self._said and now - self._failing >= PATIENCE:
            self._say_unreachable(reason_of(error))

    def _say_unreachable(self, why: str) -> None:
        self._said = True
        _unreachable[self.uri] = time.monotonic()
        self._failing = time.monotonic() if self._failing is None else self._failing
        kept = "in memory" if self.journal is None or self.journal.trouble else f"in {self.journal.folder}"
        self.say(
            f"MLflow's store {self.uri} cannot be reached ({why}): the work goes on, what is logged is kept {kept} and "
            "is sent when the store is back, or by: metateleport sync"
        )


def _is_new(uri: str) -> bool:
    database = database_of(uri)
    return database is not None and not database.exists()


def _drain(journal: Journal, delivery: Delivery) -> None:
    """Sends all that a journal holds."""
    while True:
        operations, mark = journal.read()
        if not operations and not mark:
            return
        if not operations and journal.empty:
            return
        delivery.send(operations)
        journal.done(mark)
