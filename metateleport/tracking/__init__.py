"""MLflow: runs of meta-training and evaluation; the one room that imports it."""

from metateleport.tracking.runs import Run, TrackingError, require_mlflow, track_evaluation, tracking_uri

__all__ = [
    "Run",
    "TrackingError",
    "require_mlflow",
    "track_evaluation",
    "tracking_uri",
]
