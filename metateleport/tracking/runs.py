"""Tracking of runs with MLflow, which is imported only when a run is tracked."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Run", "TrackingError", "require_mlflow", "track_evaluation", "tracking_uri"]

_BATCH = 1000
"""Largest number of metrics in one call of MLflow; for parameters it is a tenth of this."""


class TrackingError(RuntimeError):
    """Tracking cannot work here; the message says how to go on."""


def require_mlflow() -> None:
    """Checks that MLflow is installed, before any work starts.

    Raises:
        TrackingError: if it is not installed.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise TrackingError("MLflow is not installed: pip install 'mlflow>=3.17,<4', or go on with --no-track")


def tracking_uri() -> str:
    """Where runs are kept: `MLFLOW_TRACKING_URI`, else the database `mlflow.db` in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def database_of(uri: str) -> Path | None:
    """The file of a sqlite store; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


class Run:
    """One MLflow run, opened in a `with` statement.

    Metrics are collected and sent in batches of a thousand points; one call for each point would take minutes.

    Args:
        experiment: name of the experiment; created if it is new.
        name: name of the run.
        parameters: settings of the run.
        tags: tags to find the run by.
        say: called with a message while the database is created, which takes seconds.

    Raises:
        TrackingError: if MLflow is not installed or its store cannot be reached.
    """

    def __init__(
        self,
        experiment: str,
        name: str,
        parameters: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.experiment, self.name = experiment, name
        self._metrics: list[tuple[str, float, int, int]] = []
        self._client = _client(say)
        self._status = "RUNNING"
        made = self._client.create_run(_experiment_id(self._client, experiment), run_name=name, tags=_texts(tags or {}))
        self.id: str = made.info.run_id
        self._send_parameters(parameters or {})

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Logs metrics at a step."""
        now = int(time.time() * 1000)
        self._metrics += [(name, float(value), now, step) for name, value in metrics.items()]
        if len(self._metrics) >= _BATCH:
            self.flush()

    def log_curves(self, curves: Mapping[str, Sequence[float]]) -> None:
        """Logs whole curves by name, with their points at steps 0, 1, 2, ..."""
        now = int(time.time() * 1000)
        self._metrics += [
            (name, float(v), now, step) for name, values in curves.items() for step, v in enumerate(values)
        ]
        self.flush()

    def artifact(self, path: str | Path) -> None:
        """Stores a file, or a folder under its own name, with the run."""
        path = Path(path)
        if path.is_dir():
            self._client.log_artifacts(self.id, str(path), artifact_path=path.name)
        else:
            self._client.log_artifact(self.id, str(path))

    def flush(self) -> None:
        """Sends the metrics that were logged."""
        from mlflow.entities import Metric

        waiting, self._metrics = self._metrics, []
        for start in range(0, len(waiting), _BATCH):
            batch = [Metric(*each) for each in waiting[start : start + _BATCH]]
            self._client.log_batch(self.id, metrics=batch)

    def end(self, status: str = "FINISHED") -> None:
        """Sends the remaining metrics and closes the run; `status` is MLflow's: FINISHED, FAILED or KILLED."""
        if self._status == "RUNNING":
            self._status = status
            self.flush()
            self._client.set_terminated(self.id, status)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.end("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    def _send_parameters(self, parameters: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(name, value) for name, value in _texts(parameters).items()]
        for start in range(0, len(entries), _BATCH // 10):
            self._client.log_batch(self.id, params=entries[start : start + _BATCH // 10])


def track_evaluation(
    report: Mapping[str, Any],
    files: Sequence[str | Path] = (),
    checkpoint: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Tracks an evaluation: a run for each method, all in the experiment named after the task.

    All runs have the same metric names (`loss_median`, `loss_mean`, `loss_q25`, `loss_q75` along the gradient
    evaluations; `final_median`, `diverged`, `seconds`), so that the UI's compare page plots them together, earlier
    evaluations included. Runs of one evaluation have the same tag `evaluation`.

    Args:
        report: an evaluation's report, as `metateleport.evaluation.report_of` returns it.
        files: plot and JSON; stored with every run.
        checkpoint: the checkpoint's folder; card and weights are stored with the run of the learned method.
        say: called with a message while the database is created.

    Returns:
        The ids of the runs by method name.

    Raises:
        TrackingError: if MLflow is not installed or its store cannot be reached.
    """
    together = uuid.uuid4().hex[:8]
    shared = {key: report[key] for key in ("checkpoint", "seed", "tasks", "steps", "dtype")}
    shared.update({f"task.{name}": value for name, value in report["task"]["settings"].items()})
    ids = {}
    for name, entry in report["methods"].items():
        parameters = {**shared, "method": name, **{f"method.{key}": value for key, value in entry["settings"].items()}}
        tags = {"evaluation": together, "method": name, **report["conditions"]}
        with Run(report["task"]["name"], f"{name} ({together})", parameters, tags, say) as run:
            run.log_curves({f"loss_{key}": entry[key] for key in ("median", "mean", "q25", "q75")})
            for beside in ("held_out_loss", "held_out_accuracy"):
                if beside in entry:
                    run.log_curves({f"{beside}_median": entry[beside]["median"]})
            summary = {"final_median": entry["median"][-1], "diverged": sum(entry["diverged"])}
            run.log({**summary, "seconds": entry["seconds"]}, step=report["steps"])
            if "drift_max" in entry:
                run.log({"drift_max": entry["drift_max"]}, step=report["steps"])
            for path in files:
                run.artifact(path)
            if checkpoint is not None and name == "learned":
                run.artifact(checkpoint)
            ids[name] = run.id
    return ids


def _client(say: Callable[[str], None] | None) -> Any:
    require_mlflow()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("alembic", "mlflow.store", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri()
    database = database_of(uri)
    if say is not None and database is not None and not database.exists():
        say(f"making MLflow's database {database} (once, a few seconds)")
    try:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri)
    except Exception as error:
        raise TrackingError(_unreachable(uri, error)) from error


def _experiment_id(client: Any, name: str) -> str:
    try:
        found = client.get_experiment_by_name(name)
        if found is None:
            return str(client.create_experiment(name))
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    except Exception as error:
        raise TrackingError(_unreachable(tracking_uri(), error)) from error


def _unreachable(uri: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"MLflow's store {uri} cannot be used ({first}): set MLFLOW_TRACKING_URI, or go on with --no-track"


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}
