"""Real stores in trouble: locked, made by two processes at once, out of reach, and a server with PostgreSQL."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metateleport.tracking import Run, synchronise, tracking_uri
from metateleport.tracking.store import connect, database_of

pytest.importorskip("mlflow")


def test_a_locked_store_stops_nothing_and_gets_all_later() -> None:
    connect(tracking_uri())
    database = database_of(tracking_uri())
    assert database is not None
    said: list[str] = []
    with sqlite3.connect(database, isolation_level=None) as held:
        held.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        with Run("locked", "r", say=said.append) as run:
            run.log({"loss": 1.0})
            assert time.monotonic() - began < 1
        # MLflow itself waits for twenty seconds, for each call.
        assert time.monotonic() - began < 18
        held.execute("ROLLBACK")
    assert "metateleport sync" in said[-1]
    (sent,) = synchronise().sent
    assert connect(tracking_uri()).get_run(sent).data.metrics == {"loss": 1.0}


FIRST = """
import sys
from metateleport.tracking import Run
said = []
with Run("first", sys.argv[1], say=said.append) as run:
    run.log({"loss": 1.0})
print(run.id, [text for text in said if "making" not in text])
"""


@pytest.mark.slow(seconds=40)
def test_two_first_runs_at_once_make_one_store(tmp_path: Path) -> None:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/new.db"}
    both = [
        subprocess.Popen([sys.executable, "-c", FIRST, name], env=environment, stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    out = [process.communicate(timeout=120)[0].strip() for process in both]
    assert all(text.endswith("[]") for text in out), out
    client = connect(f"sqlite:///{tmp_path}/new.db")
    runs = client.search_runs([client.get_experiment_by_name("first").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["one", "two"]
    assert all(run.info.status == "FINISHED" for run in runs)


SMALL = {
    "family.width": 3,
    "outer.meta_steps": 2,
    "outer.tasks": 2,
    "outer.unroll": 2,
    "outer.horizon": 2,
    "validation.every": 2,
    "validation.tasks": 2,
}


def training(out: str, **changes: int) -> list[str]:
    """The command of a small training."""
    sizes = {**SMALL, **{name.replace("_", ".", 1): value for name, value in changes.items()}}
    command = [sys.executable, "-m", "metateleport.cli", "train", "leaky_mlp", "--out", out, "--set"]
    return [*command, *(f"{name}={value}" for name, value in sizes.items())]


def done(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.slow(seconds=40)
def test_training_ends_as_ever_without_a_server(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    began = time.monotonic()
    found = done(training("out"), environment, tmp_path)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "out" / "card.json").is_file()
    assert "metateleport sync" in found.stderr
    assert "Traceback" not in found.stderr
    assert time.monotonic() - began < 60


@pytest.mark.slow(seconds=60)
def test_a_killed_training_goes_on_as_one_run(tmp_path: Path) -> None:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/runs.db"}
    command = training("out", outer_meta_steps=30)
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (tmp_path / "out.unfinished" / "state.safetensors").exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    found = done([*command, "--resume"], environment, tmp_path)
    assert found.returncode == 0, found.stderr
    # A start that is refused adds none.
    assert done([*command, "--resume"], environment, tmp_path).returncode == 2
    client = connect(f"sqlite:///{tmp_path}/runs.db")
    (run,) = client.search_runs([client.get_experiment_by_name("leaky_mlp").experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "learned/meta_loss")
    assert {point.step for point in history} == set(range(1, 31))
    # What was logged again is what it was, bit for bit.
    for step in range(1, 31):
        assert len({point.value for point in history if point.step == step}) == 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """MLflow's tracking server with PostgreSQL behind it, on loopback."""
    programs = {name: shutil.which(name) for name in ("initdb", "pg_ctl")}
    if not all(programs.values()):
        pytest.skip("PostgreSQL is not installed (initdb, pg_ctl): apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install psycopg2-binary")
    ports = []
    for _ in range(2):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            ports.append(taken.getsockname()[1])
    home = Path(tempfile.mkdtemp(prefix="postgresql-"))
    # PostgreSQL does not run as root.
    other = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []
    if other:
        shutil.chown(home, "nobody")

    def run(name: str, *arguments: str) -> None:
        subprocess.run([*other, str(programs[name]), *arguments], check=True, stdout=subprocess.DEVNULL, cwd=home)

    data = str(home / "data")
    run("initdb", "-D", data, "-A", "trust", "-U", "mlflow", "--no-sync")
    options = f"-p {ports[0]} -c listen_addresses=127.0.0.1 -k {home} -c fsync=off"
    run("pg_ctl", "-D", data, "-l", str(home / "log"), "-o", options, "-w", "start")
    process = None
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
    command += [
        "--port",
        str(ports[1]),
        "--backend-store-uri",
        f"postgresql+psycopg2://mlflow@127.0.0.1:{ports[0]}/postgres",
    ]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    try:
        with (tmp_path / "server.log").open("w") as log:
            environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        _until_up(f"http://127.0.0.1:{ports[1]}/health", process)
        yield f"http://127.0.0.1:{ports[1]}"
    finally:
        if process is not None:
            process.terminate()
            process.wait(timeout=30)
        run("pg_ctl", "-D", data, "-m", "fast", "-w", "stop")
        shutil.rmtree(home, ignore_errors=True)


def _until_up(url: str, process: Any) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)


WRITER = """
import sys
from metateleport.tracking import Run
with Run("several", sys.argv[1]) as run:
    for step in range(200):
        run.log({"loss": float(step)}, step)
"""


@pytest.mark.slow(seconds=90)
def test_several_writers_at_a_server_with_postgresql(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(number)]) for number in range(3)]
    assert [process.wait(timeout=120) for process in writers] == [0, 0, 0]
    client = connect(server)
    runs = client.search_runs([client.get_experiment_by_name("several").experiment_id])
    assert len(runs) == 3
    for run in runs:
        assert run.info.status == "FINISHED"
        assert len(client.get_metric_history(run.info.run_id, "loss")) == 200

    # The registry and the addresses work over the server too.
    from metateleport.checkpoint import load_checkpoint
    from metateleport.tracking import promote

    found = promote("digits", alias="champion")
    assert load_checkpoint(found.address).card["weights_sha256"] == load_checkpoint("digits").card["weights_sha256"]
