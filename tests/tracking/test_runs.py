"""Runs: in batches, while the work goes on; and what becomes of them where the store does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from tracking_cases import FakeClient

from metateleport.files import cache_folder
from metateleport.tracking import Run, TrackingError, check_tracking, require_mlflow, synchronise, tracking_uri
from metateleport.tracking.delivery import KEY
from metateleport.tracking.journal import Journal, new_key
from metateleport.tracking.store import connect

REFUSED = ConnectionError("refused")


def waiting() -> list[Path]:
    """What is left to be sent."""
    root = cache_folder("unsent")
    return sorted(root.iterdir()) if root.is_dir() else []


def eventually(condition: Any, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_metrics_go_in_batches(client: FakeClient) -> None:
    with Run("e", "r", {f"p{i}": i for i in range(150)}) as run:
        for step in range(2500):
            run.log({"loss": float(step)}, step)
    assert client.points() == [("loss", step, float(step)) for step in range(2500)]
    assert [len(batch["params"]) for batch in client.batches if batch["params"]] == [100, 50]
    # One call for each point would take minutes.
    assert client.called < 200
    assert waiting() == []


def test_what_is_logged_arrives_while_the_work_goes_on(client: FakeClient) -> None:
    with Run("e", "r") as run:
        run.log({"loss": 1.0}, 1)
        eventually(lambda: client.points() == [("loss", 1, 1.0)])
        assert client.runs["run1"]["status"] == "RUNNING"
        run.log({"loss": 2.0}, 2)
        eventually(lambda: len(client.points()) == 2)
    assert client.runs["run1"]["status"] == "FINISHED"
    assert run.id == "run1"


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
    assert client.runs["run1"]["status"] == status
    assert len(client.points()) == 1


def test_work_that_is_refused_before_anything_is_logged_leaves_no_run(client: FakeClient) -> None:
    def refused() -> None:
        with Run("e", "r"):
            raise ValueError("a setting")

    with pytest.raises(ValueError, match="a setting"):
        refused()
    assert client.runs == {}
    assert waiting() == []


def test_a_store_that_does_not_answer_stops_nothing_and_gets_all_later(client: FakeClient, tmp_path: Path) -> None:
    client.down = REFUSED
    said: list[str] = []
    (tmp_path / "plot.txt").write_text("a plot")
    began = time.monotonic()
    with Run("e", "r", {"width": 3}, {"kind": "test"}, said.append) as run:
        for step in range(100):
            run.log({"loss": float(step)}, step)
        run.artifact(tmp_path / "plot.txt", under="plots")
        assert time.monotonic() - began < 0.5
        eventually(lambda: said)
    assert time.monotonic() - began < 3
    assert run.id is None
    # Said once that it cannot be reached, and once where the run is.
    assert len(said) == 2
    assert "cannot be reached" in said[0]
    assert "metateleport sync" in said[1]
    (tmp_path / "plot.txt").unlink()
    assert len(waiting()) == 1
    assert synchronise().left
    client.down = None
    assert synchronise().sent == ["run1"]
    assert client.points() == [("loss", step, float(step)) for step in range(100)]
    assert client.runs["run1"]["status"] == "FINISHED"
    assert client.runs["run1"]["tags"]["kind"] == "test"
    assert [(Path(path).name, under) for _, path, under in client.artifacts] == [("plot.txt", "plots")]
    assert waiting() == []


def test_a_store_that_comes_back_gets_what_was_kept_while_the_work_goes_on(client: FakeClient) -> None:
    said: list[str] = []
    with Run("e", "r", say=said.append) as run:
        run.log({"loss": 0.0}, 0)
        eventually(client.points)
        client.down = REFUSED
        run.log({"loss": 1.0}, 1)
        eventually(lambda: said)
        client.down = None
        eventually(lambda: len(client.points()) == 2)
    assert [text.partition(" ")[0] for text in said] == ["MLflow's", "MLflow's"]
    assert "is back" in said[1]


def test_the_next_run_does_not_wait_anew_for_a_store_that_does_not_answer(client: FakeClient) -> None:
    client.down = REFUSED
    with Run("e", "first") as run:
        run.log({"loss": 1.0})
    began = time.monotonic()
    for _ in range(5):
        with Run("e", "next") as run:
            run.log({"loss": 1.0})
    assert time.monotonic() - began < 1
    client.down = None
    assert len(synchronise().sent) == 6


def test_what_mlflow_does_not_take_holds_nothing_up(client: FakeClient) -> None:
    said: list[str] = []
    with Run("e", "r", say=said.append) as run:
        run.log({"loss": 1.0, "wrong": 2.0, "other": 3.0})
    assert {name for name, _, _ in client.points()} == {"loss", "other"}
    assert len(said) == 1
    assert "'wrong'" in said[0]


def test_a_run_goes_on_as_the_same_run(client: FakeClient) -> None:
    first = Run("e", "r", {"lr": 1})
    first.log({"loss": 1.0}, 1)
    first.end("KILLED")
    assert client.runs["run1"]["status"] == "KILLED"
    with Run("e", "r", {"lr": 1}, key=first.key) as second:
        second.log({"loss": 1.0}, 1)
        eventually(lambda: client.runs["run1"]["status"] == "RUNNING")
        second.log({"loss": 2.0}, 2)
    assert list(client.runs) == ["run1"]
    assert client.runs["run1"]["status"] == "FINISHED"
    assert client.points() == [("loss", 1, 1.0), ("loss", 1, 1.0), ("loss", 2, 2.0)]


KILLED = """
    import sys, time
    sys.path[:0] = {path!r}
    from metateleport.tracking import Run, sender
    from tracking_cases import FakeClient
    fake = FakeClient()
    fake.down = ConnectionError("no store")
    sender.connect = fake.connect
    run = Run("e", "r", {{"lr": 1}}, key={key!r})
    for step in range(10**9):
        run.log({{"loss": float(step)}}, step)
        if step == 20:
            print("ready", flush=True)
        time.sleep(0.001)
"""


def killed(key: str) -> None:
    """A process that logs, killed in the midst of it."""
    code = textwrap.dedent(KILLED).format(path=[each for each in sys.path if each], key=key)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_process_loses_nothing_and_its_run_ends(client: FakeClient) -> None:
    key = new_key()
    killed(key)
    assert synchronise().sent == ["run1"]
    assert [step for _, step, _ in client.points()][:21] == list(range(21))
    assert client.runs["run1"]["status"] == "KILLED"
    # When it is resumed it is the same run, and is running until it ends.
    with Run("e", "r", {"lr": 1}, key=key) as run:
        run.log({"loss": 7.0}, 7)
        eventually(lambda: client.runs["run1"]["status"] == "RUNNING")
    assert {name: run["status"] for name, run in client.runs.items()} == {"run1": "FINISHED"}


def test_a_resumed_run_takes_up_what_the_killed_one_has_left(client: FakeClient) -> None:
    key = new_key()
    killed(key)
    with Run("e", "r", {"lr": 1}, key=key) as run:
        run.log({"loss": -1.0}, 5)
    assert list(client.runs) == ["run1"]
    steps = [step for _, step, _ in client.points()]
    assert steps[:21] == list(range(21))
    assert client.points()[-1] == ("loss", 5, -1.0)
    assert waiting() == []


def test_what_a_living_process_writes_is_left_alone(client: FakeClient) -> None:
    client.down = REFUSED
    with Run("e", "r") as run:
        run.log({"loss": 1.0})
        client.down = None
        assert synchronise() == ([], {})
    assert client.runs["run1"]["status"] == "FINISHED"


def test_on_a_full_disk_it_goes_on_in_memory(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with Run("e", "r") as run:
        run.log({"loss": 1.0}, 1)
        eventually(client.points)
        monkeypatch.setattr("metateleport.tracking.journal.os.write", full)
        for step in range(2, 50):
            run.log({"loss": 1.0}, step)
    assert [step for _, step, _ in client.points()] == list(range(1, 50))


def test_half_a_line_of_a_killed_process_is_taken_off() -> None:
    header = {"uri": "u", "experiment": "e", "name": "n", "key": "k"}
    journal = Journal.begin(header)
    journal.append({"do": "tags", "values": {"a": "1"}})
    with (journal.folder / "operations.jsonl").open("ab") as file:
        file.write(b'{"do": "metr')
    journal.close()
    again = Journal.begin(header)
    assert again.folder == journal.folder
    again.append({"do": "tags", "values": {"b": "2"}})
    assert [each["values"] for each in again.read()[0]] == [{"a": "1"}, {"b": "2"}]
    again.close(remove=True)


def test_without_mlflow_the_error_names_the_way_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(TrackingError, match="--no-track"):
        require_mlflow()


@pytest.mark.parametrize("uri", ["file:///tmp/runs", "mlruns", "/tmp/mlruns"])
def test_a_store_of_a_kind_that_is_not_written_to_is_told_before_any_work(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match="sqlite:///PATH"):
        check_tracking()


def test_where_runs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert tracking_uri() == "http://host"


def test_mlflow_really_keeps_a_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "plot.txt").write_text("a plot")
    with Run("train/x", "r", {"width": 20}, {"kind": "test"}, system=True) as run:
        run.log_curves({"loss": [3.0, 1e300, float("nan")]})
        run.artifact(tmp_path / "plot.txt", under="plots")
        run.note("# a note")
        time.sleep(1.5)
    client = connect(tracking_uri())
    kept = client.get_run(run.id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"width": "20"}
    assert kept.data.tags["mlflow.note.content"] == "# a note"
    assert kept.data.tags[KEY] == run.key
    assert [point.value for point in client.get_metric_history(run.id, "loss")][:2] == [3.0, 1e300]
    assert "system/cpu_utilization_percentage" in kept.data.metrics
    assert [each.path for each in client.list_artifacts(run.id, "plots")] == ["plots/plot.txt"]
