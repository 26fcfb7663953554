"""Sends what runs have left in their journals, and ends the runs of processes that are gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from metateleport.tracking.delivery import Delivery
from metateleport.tracking.journal import Journal, journals
from metateleport.tracking.store import TrackingError, connect, reason_of

__all__ = ["Synchronised", "synchronise"]


class Synchronised(NamedTuple):
    """What came of it: ids of runs that were sent, and why others were not, by the journal's folder."""

    sent: list[str]
    left: dict[str, str]


def synchronise(say: Callable[[str], None] | None = None, uri: str | None = None) -> Synchronised:
    """Sends all journals that belong to no living process, in the order in which they were begun.

    A run whose process was killed ends as `KILLED`; when its training is resumed, the same run goes on.

    Args:
        say: called with messages.
        uri: only those for this store; all if not given.
    """
    sent: list[str] = []
    left: dict[str, str] = {}
    clients: dict[str, object] = {}
    for journal in journals():
        own = str(journal.header["uri"])
        if uri is not None and own != uri:
            journal.close()
            continue
        try:
            if own not in clients:
                try:
                    clients[own] = connect(own, say)
                except TrackingError as error:
                    clients[own] = error
            client = clients[own]
            if isinstance(client, TrackingError):
                raise client
            sent.append(_send(journal, Delivery(client, journal, say)))
            journal.close(remove=True)
        except Exception as error:
            journal.close()
            left[str(journal.folder)] = reason_of(error)
    return Synchronised(sent, left)


def _send(journal: Journal, delivery: Delivery) -> str:
    ended = False
    while True:
        operations, mark = journal.read()
        if not operations and journal.empty:
            break
        delivery.send(operations)
        ended = ended or any(each["do"] == "end" for each in operations)
        journal.done(mark)
    run_id = delivery.begin()
    if not ended and str(delivery.client.get_run(run_id).info.status) == "RUNNING":
        delivery.send([{"do": "end", "status": "KILLED", "at": int(time.time() * 1000)}])
    return run_id
