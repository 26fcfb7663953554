"""Where runs are kept: the store, what is needed to reach it, and new stores made by one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metateleport.files import Lock, cache_folder

__all__ = [
    "TrackingError",
    "check_tracking",
    "connect",
    "database_of",
    "reason_of",
    "require_mlflow",
    "set_environment",
    "tracking_uri",
]

_MADE_WITHIN = 120.0
"""Seconds that another process may take to make a new store."""

_KNOWN = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
_QUIET = ("alembic", "mlflow.store", "mlflow.tracking", "mlflow.utils", "mlflow.models", "mlflow.pyfunc")


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


def check_tracking() -> None:
    """Checks what can be known of tracking without reaching the store.

    Raises:
        TrackingError: if MLflow is not installed, or the store is of a kind that it cannot write to.
    """
    require_mlflow()
    uri = tracking_uri()
    kind = uri.partition(":")[0].partition("+")[0]
    if kind not in _KNOWN:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI={uri} is no store that MLflow 3 writes runs to: give sqlite:///PATH, the address of "
            "a server, or a database; or go on with --no-track"
        )


def database_of(uri: str) -> Path | None:
    """The file of a sqlite store; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def reason_of(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def connect(uri: str, say: Callable[[str], None] | None = None) -> Any:
    """A client of a store, whose tables are made if they are not there.

    Several processes that find the same new database make it one after the other.

    Args:
        uri: the store.
        say: called with a message before a database is made, which takes seconds.

    Returns:
        MLflow's client.

    Raises:
        TrackingError: if MLflow is not installed or the store cannot be used.
    """
    require_mlflow()
    set_environment()
    database = database_of(uri)
    if database is None:
        return _reached(uri)
    if say is not None and not database.exists():
        say(f"making MLflow's database {database} (once, a few seconds)")
    name = hashlib.sha256(str(database.absolute()).encode()).hexdigest()[:24]
    lock = Lock(cache_folder("locks") / f"{name}.lock")
    # Without a place for the lock a new store may have to be made twice; the second try finds it.
    with contextlib.suppress(OSError):
        lock.take(_MADE_WITHIN)
    try:
        return _reached(uri, tries=3)
    finally:
        lock.let_go()


def _reached(uri: str, tries: int = 1) -> Any:
    while True:
        tries -= 1
        try:
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            # The tables are made when the store is first asked for something.
            client.search_experiments(max_results=1)
            return client
        except Exception as error:
            # A program that is not ours may be making the tables at this moment.
            if tries > 0 and any(text in str(error).lower() for text in ("already exists", "duplicate column")):
                time.sleep(1.0)
                continue
            raise TrackingError(
                f"MLflow's store {uri} cannot be used ({reason_of(error)}): set MLFLOW_TRACKING_URI, or go on with "
                "--no-track"
            ) from error


def set_environment() -> None:
    """MLflow's own retries take minutes, and its loggers print every failure with its traceback."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)
