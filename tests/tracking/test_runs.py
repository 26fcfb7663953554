"""Tracking: batches, one experiment for a task, and life without MLflow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from metateleport import load_family
from metateleport.evaluation import BASELINES, evaluate, report_of
from metateleport.tracking import Run, TrackingError, require_mlflow, track_evaluation, tracking_uri
from metateleport.tracking import runs as tracking


class FakeClient:
    """Notes what is called, and how often."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.experiments: dict[str, str] = {}
        self.runs: list[dict[str, Any]] = []
        self.status: dict[str, str] = {}
        self.artifacts: list[tuple[str, str]] = []

    def get_experiment_by_name(self, name: str) -> Any:
        found = self.experiments.get(name)
        return found and SimpleNamespace(experiment_id=found, lifecycle_stage="active")

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = str(len(self.experiments))
        return self.experiments[name]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        self.runs.append({"experiment": experiment, "name": run_name, "tags": tags})
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run{len(self.runs)}"))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.batches.append({"run": run_id, "metrics": list(metrics), "params": list(params)})

    def log_artifact(self, run_id: str, path: str) -> None:
        self.artifacts.append((run_id, path))

    def log_artifacts(self, run_id: str, path: str, artifact_path: str) -> None:
        self.artifacts.append((run_id, path))

    def set_terminated(self, run_id: str, status: str) -> None:
        self.status[run_id] = status


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr(tracking, "_client", lambda _: fake)
    return fake


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    methods = [BASELINES[name].make(lr=1e-3) for name in ("gd", "adam")]
    return report_of(evaluate(load_family("leaky_mlp", {"width": 4}), methods, tasks=2, steps=100))


def test_metrics_go_in_batches(client: FakeClient) -> None:
    with Run("e", "r", {f"p{i}": i for i in range(150)}) as run:
        for step in range(2500):
            run.log({"loss": float(step)}, step)
    sent = [len(batch["metrics"]) for batch in client.batches if batch["metrics"]]
    assert sent == [1000, 1000, 500]
    assert [len(batch["params"]) for batch in client.batches if batch["params"]] == [100, 50]
    points = [(metric.step, metric.value) for batch in client.batches for metric in batch["metrics"]]
    assert points == [(step, float(step)) for step in range(2500)]


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")]
)
def test_a_run_that_breaks_keeps_its_metrics_and_says_so(
    client: FakeClient, error: type[BaseException] | None, status: str
) -> None:
    def body() -> None:
        with Run("e", "r") as run:
            run.log({"loss": 1.0})
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(error):
            body()
    assert client.status == {"run1": status}
    assert sum(len(batch["metrics"]) for batch in client.batches) == 1


def test_an_evaluation_is_a_run_a_method_in_one_experiment_with_the_same_metrics(
    client: FakeClient, report: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text("{}")
    ids = track_evaluation(report, [tmp_path / "a.json"])
    assert list(ids) == ["gd", "adam"]
    assert list(client.experiments) == ["leaky_mlp"]
    assert len({run["tags"]["evaluation"] for run in client.runs}) == 1
    names = [
        {metric.key for batch in client.batches if batch["run"] == run for metric in batch["metrics"]}
        for run in ids.values()
    ]
    assert names[0] == names[1] >= {"loss_median", "loss_mean", "loss_q25", "loss_q75", "final_median", "seconds"}
    # Two sendings of metrics a run: curves and summary.
    assert sum(bool(batch["metrics"]) for batch in client.batches) == 4
    assert len(client.artifacts) == 2


def test_without_mlflow_the_error_names_the_way_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(TrackingError, match="--no-track"):
        require_mlflow()


def test_where_runs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert tracking_uri() == "http://host"


def test_mlflow_really_keeps_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    said: list[str] = []
    (tmp_path / "plot.txt").write_text("a plot")
    with Run("train/x", "r", {"width": 20}, {"kind": "test"}, said.append) as run:
        run.log_curves({"loss": [3.0, 1e300]})
        run.artifact(tmp_path / "plot.txt")
    assert len(said) == 1
    assert "seconds" in said[0]
    client = mlflow.MlflowClient(tracking_uri=tracking_uri())
    kept = client.get_run(run.id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"width": "20"}
    assert [point.value for point in client.get_metric_history(run.id, "loss")] == [3.0, 1e300]
    assert [each.path for each in client.list_artifacts(run.id)] == ["plot.txt"]
