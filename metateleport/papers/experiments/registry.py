"""The experiments, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from metateleport.families import FamilyError, read_settings
from metateleport.papers.experiments.base import Experiment, ExperimentError
from metateleport.papers.experiments.generalisation import Generalisation
from metateleport.papers.experiments.horizon import Horizon
from metateleport.papers.experiments.newton import Newton
from metateleport.papers.experiments.one_teleport import OneTeleport
from metateleport.papers.experiments.optimizers import Optimizers
from metateleport.papers.experiments.orbit import Orbit
from metateleport.papers.experiments.quadratic import Quadratic

__all__ = ["EXPERIMENTS", "load_experiment", "summary_of"]

EXPERIMENTS: dict[str, type[Experiment]] = {
    kind.name: kind for kind in (Quadratic, Optimizers, Generalisation, Newton, OneTeleport, Orbit, Horizon)
}


def load_experiment(name: str, settings: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment of a name, with settings.

    Args:
        name: one of `EXPERIMENTS`.
        settings: values for its settings; strings are read in the setting's type.

    Raises:
        ExperimentError: if there is no such experiment, or a setting is unknown or cannot work.
    """
    if name not in EXPERIMENTS:
        raise ExperimentError(f"there is no experiment {name!r}: there are {', '.join(EXPERIMENTS)}")
    kind = EXPERIMENTS[name]
    try:
        return kind(**read_settings(kind, settings or {}, name))
    except FamilyError as error:
        raise ExperimentError(str(error)) from error


def summary_of(kind: type[Experiment]) -> str:
    """What an experiment tests, in one line.

    Example:
        >>> [name for name, kind in EXPERIMENTS.items() if not summary_of(kind)]
        []
    """
    return (inspect.getdoc(kind) or "").partition("\n")[0]
