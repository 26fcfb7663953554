"""Runs of meta-training and evaluation in MLflow; no other room imports it."""

from metateleport.tracking.runs import Run, TrackingError, require_mlflow, track_evaluation, tracking_uri

__all__ = [
    "Run",
    "TrackingError",
    "require_mlflow",
    "track_evaluation",
    "tracking_uri",
]
