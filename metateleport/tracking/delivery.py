"""Sends the operations of a journal to MLflow, in batches; each may be sent again without harm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metateleport.tracking.journal import Journal
from metateleport.tracking.models import log_model
from metateleport.tracking.store import database_of, reason_of

__all__ = ["KEY", "PARENT", "WEIGHTS", "Delivery", "experiment_id", "run_tagged"]

KEY = "metateleport.key"
"""The tag with a run's own name, by which it is found again."""

WEIGHTS = "metateleport.weights"
"""The tag with the hash of the weights that a run has trained, or has evaluated."""

PARENT = "mlflow.parentRunId"

_METRICS, _PARAMETERS = 1000, 100
"""Largest numbers in one call of MLflow."""

_WRONG = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
"""Answers that stay the same however often one asks."""


class Delivery:
    """Sends operations of one run.

    Args:
        client: MLflow's client.
        journal: the run's journal.
        say: called with a message about what MLflow does not take.
        beat: called after everything that MLflow has taken.
    """

    def __init__(
        self,
        client: Any,
        journal: Journal,
        say: Callable[[str], None] | None = None,
        beat: Callable[[str], None] | None = None,
    ) -> None:
        self.client, self.journal = client, journal
        self._say, self._beat = say or (lambda _: None), beat or (lambda _: None)

    def send(self, operations: Iterable[Mapping[str, Any]]) -> None:
        """Sends operations, one after the other.

        Raises:
            Exception: of whatever kind MLflow's client raises, if the store cannot be reached now.
        """
        self.begin()
        points: list[Sequence[Any]] = []
        for operation in operations:
            if operation["do"] == "metrics":
                points += operation["points"]
                continue
            self._send_metrics(points)
            points = []
            getattr(self, f"_send_{operation['do']}")(operation)
        self._send_metrics(points)

    def begin(self) -> str:
        """The run's id; the run is made if MLflow does not know it."""
        if self.journal.run_id is not None:
            return self.journal.run_id
        header, client = self.journal.header, self.client
        self._beat("making the run")
        experiment = experiment_id(client, header["experiment"], header["uri"])
        tags = {**header.get("tags", {}), KEY: header["key"]}
        found = run_tagged(client, KEY, header["key"], [experiment])
        if found is not None:
            run_id = found.info.run_id
            client.update_run(run_id, status="RUNNING")
        else:
            parent = self._parent(header.get("parent"))
            if parent is not None:
                tags[PARENT] = parent
            made = client.create_run(experiment, start_time=header["made"], tags=tags, run_name=header["name"])
            run_id = made.info.run_id
        self.journal.note_run(run_id)
        if found is not None:
            self._send_tags({"values": tags})
        self._send_params({"values": header.get("parameters", {})})
        return str(run_id)

    def _parent(self, wanted: Mapping[str, str] | None) -> str | None:
        for tag, value in (wanted or {}).items():
            found = run_tagged(self.client, tag, value, kind="train" if tag == WEIGHTS else None)
            if found is not None:
                return str(found.info.run_id)
        return None

    def _send_metrics(self, points: Sequence[Sequence[Any]]) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(points), _METRICS):
            batch = [Metric(name, value, stamp, step) for name, value, stamp, step in points[start : start + _METRICS]]
            self._in_halves("metrics", batch)

    def _send_params(self, operation: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(name, value) for name, value in operation["values"].items()]
        for start in range(0, len(entries), _PARAMETERS):
            self._in_halves("params", entries[start : start + _PARAMETERS])

    def _send_tags(self, operation: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(name, value) for name, value in operation["values"].items()]
        for start in range(0, len(entries), _PARAMETERS):
            self._in_halves("tags", entries[start : start + _PARAMETERS])

    def _in_halves(self, kind: str, entries: Sequence[Any]) -> None:
        """Sends a batch; of one that is refused, all but the entries that are at fault."""
        if not entries:
            return
        assert self.journal.run_id is not None
        self._beat("sending")
        try:
            self.client.log_batch(self.journal.run_id, **{kind: entries})
        except Exception as error:
            if not _is_wrong(error):
                raise
            if len(entries) > 1:
                middle = len(entries) // 2
                self._in_halves(kind, entries[:middle])
                self._in_halves(kind, entries[middle:])
                return
            self._say(f"MLflow does not take {entries[0].key!r} of the run {self.journal.run_id}: {reason_of(error)}")
        self._beat("sent")

    def _send_artifact(self, operation: Mapping[str, Any]) -> None:
        path = Path(operation["path"])
        if not path.exists():
            self._say(f"{path} is gone, and was to be stored with the run {self.journal.run_id}")
            return
        self._beat("storing")
        under = operation.get("under")
        if path.is_dir():
            place = f"{under}/{path.name}" if under else path.name
            self.client.log_artifacts(self.journal.run_id, str(path), artifact_path=place)
        else:
            self.client.log_artifact(self.journal.run_id, str(path), artifact_path=under)
        self._beat("sent")

    def _send_model(self, operation: Mapping[str, Any]) -> None:
        path = Path(operation["path"])
        if not path.exists():
            self._say(f"{path} is gone, and was to be logged as a model of the run {self.journal.run_id}")
            return
        self._beat("storing")
        run = self.client.get_run(self.journal.run_id)
        log_model(self.client, path, run.info.experiment_id, run.info.run_id, operation.get("step", 0))
        self._beat("sent")

    def _send_end(self, operation: Mapping[str, Any]) -> None:
        self._beat("sending")
        self.client.set_terminated(self.journal.run_id, operation["status"], operation.get("at"))
        self._beat("sent")


def _is_wrong(error: Exception) -> bool:
    return str(getattr(error, "error_code", "")) in _WRONG


def experiment_id(client: Any, name: str, uri: str) -> str:
    """The id of an experiment, which is made if it is new and restored if it was deleted.

    Artifacts of a sqlite store are kept beside it, whichever folder the process works in.
    """
    for last in (False, True):
        found = client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        database = database_of(uri)
        place = None
        if database is not None:
            slug = "".join(each if each.isalnum() else "-" for each in name)
            place = (database.absolute().parent / "mlruns" / f"{slug}-{time.time_ns():x}").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except Exception:
            # Another process may have made it in the meantime.
            if last:
                raise
    raise AssertionError


def run_tagged(
    client: Any, tag: str, value: str, experiments: Sequence[str] | None = None, kind: str | None = None
) -> Any:
    """The oldest run with a tag of that value, in some experiments or in all; None if there is none."""
    if experiments is None:
        experiments = [each.experiment_id for each in client.search_experiments()]
    query = f"tags.`{tag}` = '{value}'" + (f" AND tags.kind = '{kind}'" if kind else "")
    found = client.search_runs(list(experiments), query, max_results=1, order_by=["attributes.start_time ASC"])
    return found[0] if found else None
