"""The service on the app that MLflow's own scoring server makes, beside its `/invocations`, `/ping` and `/version`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from metateleport.checkpoint import Checkpoint
from metateleport.service import Answerer, Guard, Limits, add_routes
from metateleport.tracking.models import save_as_model
from metateleport.tracking.store import require_mlflow, set_environment

__all__ = ["app_of", "run_app"]


def app_of(
    checkpoint: Checkpoint, limits: Limits | None = None, token: str | None = None, batching: bool = False
) -> Any:
    """An ASGI app: MLflow's scoring server for the checkpoint, with the service's routes and guard.

    Args:
        checkpoint: what answers.
        limits: bounds on requests.
        token: the bearer token that requests need; None for none.
        batching: whether requests that arrive together are answered together.

    Raises:
        TrackingError: if MLflow is not installed.
    """
    require_mlflow()
    set_environment()
    from mlflow.pyfunc import load_model
    from mlflow.pyfunc.scoring_server import init

    with tempfile.TemporaryDirectory() as folder:
        # Saved anew from weights and card: the code that MLflow runs is this package's, never an artifact's.
        save_as_model(checkpoint.path, Path(folder) / "model")
        app = init(load_model(str(Path(folder) / "model")))
    add_routes(app, Answerer(checkpoint, limits), batching)
    return Guard(app, limits, token)


def run_app(app: Any, host: str, port: int) -> None:
    """Serves an app until SIGINT or SIGTERM; requests under way are answered first."""
    import uvicorn

    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        limit_concurrency=1024,
        timeout_graceful_shutdown=10,
    )
