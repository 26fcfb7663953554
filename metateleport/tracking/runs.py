"""Runs of MLflow: what is logged is kept on disk and sent while the work goes on, which it never stops."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from metateleport.tracking.journal import Journal, new_key
from metateleport.tracking.sender import Sender
from metateleport.tracking.store import check_tracking, tracking_uri
from metateleport.tracking.system import SystemMetrics

__all__ = ["NOTE", "Run", "log10_of"]

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as a run's description."""


class Run:
    """One MLflow run, opened in a `with` statement.

    Everything logged is written to a journal on disk first, and a thread sends it in batches, every few seconds and at
    the end. A store that cannot be reached, is locked or is full is told of once, and stops nothing: what was logged
    stays in the journal, and is sent when the store is back or by `metateleport sync`.

    The run is made with the first thing that is logged: work that is refused before that leaves no run behind.

    Args:
        experiment: name of the experiment; created if it is new.
        name: name of the run.
        parameters: settings of the run.
        tags: tags to find the run by.
        say: called with messages: while a database is created, and where the store cannot be reached.
        key: the run's own name, of a run to go on with; a new one if not given.
        parent: a tag and its value, by which the parent run is found.
        system: whether the use of CPU, memory and GPU is logged too.

    Raises:
        TrackingError: if MLflow is not installed, or it does not write to stores of this kind.
    """

    def __init__(
        self,
        experiment: str,
        name: str,
        parameters: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        say: Callable[[str], None] | None = None,
        key: str | None = None,
        parent: Mapping[str, str] | None = None,
        system: bool = False,
    ) -> None:
        check_tracking()
        self.experiment, self.name = experiment, name
        self.key = key or new_key()
        self._say = say or (lambda _: None)
        self._header: dict[str, Any] = {
            "uri": tracking_uri(),
            "experiment": experiment,
            "name": name,
            "key": self.key,
            "tags": _texts(tags or {}),
            "parameters": _texts(parameters or {}),
            "parent": dict(parent or {}),
        }
        self._journal: Journal | None = None
        self._mutex = threading.RLock()
        self._open = True
        self._sender = Sender(tracking_uri(), self._say)
        self._system = SystemMetrics(self.log) if system else None

    @property
    def id(self) -> str | None:
        """The run's id in MLflow; None as long as MLflow does not know the run."""
        return None if self._journal is None else self._journal.run_id

    def go_on(self, key: str) -> None:
        """Makes this the continuation of an earlier run; before anything is logged."""
        if self._journal is None:
            self.key = self._header["key"] = key

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Logs metrics at a step."""
        now = int(time.time() * 1000)
        self._add({"do": "metrics", "points": [[name, float(value), now, step] for name, value in metrics.items()]})
        self._sender.check()

    def log_curves(self, curves: Mapping[str, Sequence[float]]) -> None:
        """Logs whole curves by name, with their points at steps 0, 1, 2, ..."""
        now = int(time.time() * 1000)
        for name, values in curves.items():
            self._add(
                {"do": "metrics", "points": [[name, float(value), now, step] for step, value in enumerate(values)]}
            )

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Adds tags, or replaces those of these names."""
        self._add({"do": "tags", "values": _texts(tags)})

    def note(self, text: str) -> None:
        """Sets the run's description, in markdown."""
        self.tag({NOTE: text})

    def artifact(self, path: str | Path, under: str | None = None) -> None:
        """Stores a file, or a folder under its own name, with the run; in the folder `under` of its artifacts."""
        self._keep("artifact", Path(path), under=under)

    def model(self, checkpoint: str | Path, step: int = 0) -> None:
        """Logs a checkpoint's folder as a model of this run."""
        self._keep("model", Path(checkpoint), step=step)

    def end(self, status: str = "FINISHED") -> None:
        """Sends what is left and closes the run; `status` is MLflow's: FINISHED, FAILED or KILLED."""
        with self._mutex:
            if not self._open:
                return
            self._open = False
            if self._system is not None:
                self._system.stop()
            if self._journal is not None or status == "FINISHED":
                self._append({"do": "end", "status": status, "at": int(time.time() * 1000)})
        journal, sent = self._journal, self._sender.finish()
        if journal is None:
            return
        journal.close(remove=sent)
        if not sent and journal.lost:
            self._say(f"{journal.lost} entries of the run are lost: neither MLflow nor {journal.folder} took them")
        elif not sent:
            self._say(
                f"the run is not in MLflow yet: it is kept in {journal.folder}, and is sent by: metateleport sync"
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.end("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    def _add(self, operation: Mapping[str, Any]) -> None:
        with self._mutex:
            # A sample of the system's use may come after the end.
            if self._open:
                self._append(operation)

    def _append(self, operation: Mapping[str, Any]) -> None:
        first = self._journal is None
        journal = self._begun()
        journal.append(operation)
        if first:
            self._sender.send(journal)
            if self._system is not None:
                self._system.start()

    def _begun(self) -> Journal:
        if self._journal is None:
            self._journal = Journal.begin(self._header)
        return self._journal

    def _keep(self, what: str, path: Path, **options: Any) -> None:
        with self._mutex:
            kept = self._begun().keep(path, path.name)
            self._append({"do": what, "path": str(kept), **options})
            self._sender.send(self._begun())


def log10_of(value: float) -> float:
    """The decimal logarithm of a loss, which a linear axis can show over many decades; losses of zero are 1e-300.

    Example:
        >>> log10_of(1e-20), log10_of(0.0)
        (-20.0, -300.0)
    """
    return math.log10(max(value, 1e-300)) if math.isfinite(value) else value


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}
