"""Meta-trainings that are small enough for a test."""

from __future__ import annotations

from typing import Any

from metateleport.training import TrainConfig

_SMALL: dict[str, Any] = {
    "family": "leaky_mlp",
    "settings": {"width": 4, "activation": "identity"},
    "meta_steps": 6,
    "tasks": 3,
    "unroll": 3,
    "horizon": 6,
    "validation_tasks": 4,
    "validation_every": 2,
    "hidden": 4,
    "device": "cpu",
}
_TINY: dict[str, Any] = {
    "settings": {"width": 3, "activation": "identity"},
    "meta_steps": 2,
    "tasks": 2,
    "unroll": 2,
    "horizon": 2,
    "validation_tasks": 2,
    "validation_every": 1,
    "hidden": 3,
}


def small(**changes: Any) -> TrainConfig:
    """Six meta-steps, in windows of half the horizon."""
    return TrainConfig(**{**_SMALL, **changes})


def tiny(**changes: Any) -> TrainConfig:
    """Two meta-steps of two tasks."""
    return small(**{**_TINY, **changes})
