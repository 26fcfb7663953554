"""A store that is no store: notes what is called and how often, and fails when it is told to."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from metateleport.tracking.store import TrackingError


class FakeClient:
    """MLflow's client as far as runs need it.

    Attributes:
        down: an error that every call raises; None while the store answers.
    """

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: list[tuple[str, str, str | None]] = []
        self.down: Exception | None = None
        self.called = 0
        self.mutex = threading.Lock()

    def _check(self) -> None:
        self.called += 1
        if self.down is not None:
            raise self.down

    def connect(self, uri: str, say: Any = None) -> FakeClient:
        if self.down is not None:
            raise TrackingError(str(self.down))
        return self

    def search_experiments(self, **_: Any) -> list[Any]:
        self._check()
        return [SimpleNamespace(experiment_id=number, name=name) for name, number in self.experiments.items()]

    def get_experiment_by_name(self, name: str) -> Any:
        self._check()
        found = self.experiments.get(name)
        return found and SimpleNamespace(experiment_id=found, lifecycle_stage="active")

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        self._check()
        self.experiments[name] = str(len(self.experiments))
        return self.experiments[name]

    def search_runs(self, experiments: list[str], query: str, **_: Any) -> list[Any]:
        self._check()
        tag, value = query.partition(" AND ")[0].removeprefix("tags.`").removesuffix("'").split("` = '")
        return [
            SimpleNamespace(info=SimpleNamespace(run_id=key))
            for key, run in self.runs.items()
            if run["experiment"] in experiments and run["tags"].get(tag) == value
        ]

    def create_run(self, experiment: str, start_time: int, tags: dict[str, str], run_name: str) -> Any:
        self._check()
        key = f"run{len(self.runs) + 1}"
        self.runs[key] = {"experiment": experiment, "name": run_name, "tags": dict(tags), "status": "RUNNING"}
        return SimpleNamespace(info=SimpleNamespace(run_id=key))

    def get_run(self, run_id: str) -> Any:
        self._check()
        return SimpleNamespace(info=SimpleNamespace(status=self.runs[run_id]["status"], run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        self._check()
        self.runs[run_id]["status"] = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        self._check()
        assert len(metrics) <= 1000
        assert len(params) <= 100
        wrong = [each.key for each in (*metrics, *params) if each.key == "wrong"]
        if wrong:
            error = ValueError("a name that is not taken")
            error.error_code = "INVALID_PARAMETER_VALUE"  # type: ignore[attr-defined]
            raise error
        self.runs[run_id]["tags"].update({each.key: each.value for each in tags})
        self.batches.append({"run": run_id, "metrics": list(metrics), "params": list(params)})

    def log_artifact(self, run_id: str, path: str, artifact_path: str | None = None) -> None:
        self._check()
        self.artifacts.append((run_id, path, artifact_path))

    def log_artifacts(self, run_id: str, path: str, artifact_path: str) -> None:
        self._check()
        self.artifacts.append((run_id, path, artifact_path))

    def set_terminated(self, run_id: str, status: str, end_time: int | None = None) -> None:
        self._check()
        self.runs[run_id]["status"] = status

    def points(self, run_id: str = "run1") -> list[tuple[str, int, float]]:
        """The points of a run, in the order in which they came."""
        return [
            (each.key, each.step, each.value)
            for batch in self.batches
            if batch["run"] == run_id
            for each in batch["metrics"]
        ]
