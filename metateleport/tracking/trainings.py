"""A meta-training in MLflow: its curves while it runs, its final figures, plot, card and model at the end."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from metateleport.tracking.delivery import WEIGHTS
from metateleport.tracking.runs import Run

__all__ = ["Progressing", "TrackedTraining"]

_LOG10 = math.log(10.0)
_FIRST = 10


class Progressing(Protocol):
    """What is read of a training's progression; see `metateleport.training.Progression`."""

    meta_step: int
    skipped: int
    seconds: float
    meta_losses: list[float]
    validations: list[list[float]]
    openness: list[float]
    searched: list[float]


class TrackedTraining:
    """Logs a training's progression to a run.

    The meta-loss and the validation score are means of natural logarithms of losses; beside them the same is logged as
    a decimal logarithm, as `log10_loss`.

    Args:
        run: the run.
        teleport_cost: what the recipe charges for open teleports.
    """

    def __init__(self, run: Run, teleport_cost: float = 0.0) -> None:
        self.run, self.teleport_cost = run, teleport_cost
        self._validated: dict[str, int] = {}
        self._beside: dict[str, float] = {}
        self._curves: dict[str, dict[str, list[tuple[int, float]]]] = {}

    def __call__(self, name: str, progression: Progressing) -> None:
        """Logs what a meta-step has brought; `name` is that of the network that is trained."""
        self._log_validations(name, progression.validations)
        if not progression.meta_losses:
            if progression.searched:
                self._log(name, {"search": progression.searched[-1]}, len(progression.searched))
            return
        loss = progression.meta_losses[-1]
        metrics = {"meta_loss": loss, "log10_loss": loss / _LOG10}
        now = time.monotonic()
        # Points are what tracking costs: what hardly changes from step to step is logged once a second.
        if progression.meta_step <= _FIRST or now - self._beside.get(name, 0.0) >= 1.0:
            self._beside[name] = now
            metrics["skipped"] = progression.skipped
            metrics["speed"] = progression.meta_step / progression.seconds if progression.seconds > 0 else 0.0
            if progression.openness:
                metrics["openness"] = progression.openness[-1]
                metrics["teleport_price"] = self.teleport_cost * progression.openness[-1]
        self._log(name, metrics, progression.meta_step)

    def finish(self, path: Path) -> None:
        """Logs final figures, the plot, the card as the run's note, and the checkpoint as a model."""
        from metateleport.checkpoint.shown import card_in_words

        card = json.loads((path / "card.json").read_text())
        runs = card.get("training", {}).get("runs", {})
        step = int(runs.get("learned", {}).get("meta_steps", 0))
        for name, each in runs.items():
            # The last networks are validated when no meta-step is left to report.
            self._log_validations(name, each.get("validations", ()))
        self.run.log(final_figures(card), step)
        self.run.tag({WEIGHTS: card["weights_sha256"], "checkpoint": str(path.absolute())})
        self.run.note(card_in_words(card))
        with tempfile.TemporaryDirectory() as folder:
            plot = Path(folder) / "training.png"
            draw(self._curves, plot, path.name)
            self.run.artifact(plot, under="plots")
        self.run.model(path, step)

    def _log_validations(self, name: str, validations: Sequence[Sequence[float]]) -> None:
        for step, score in validations[self._validated.get(name, 0) :]:
            self._log(name, {"validation": score, "validation_log10_loss": score / _LOG10}, int(step))
        self._validated[name] = len(validations)

    def _log(self, name: str, metrics: Mapping[str, float], step: int) -> None:
        self.run.log({f"{name}/{key}": value for key, value in metrics.items()}, step)
        for key in ("log10_loss", "validation_log10_loss"):
            if key in metrics:
                self._curves.setdefault(name, {}).setdefault(key, []).append((step, metrics[key]))


def final_figures(card: Mapping[str, Any]) -> dict[str, float]:
    """The figures by which trainings are ranked.

    Example:
        >>> final_figures({"training": {"runs": {"learned": {"validation": -2.5, "meta_steps": 7, "seconds": 1.0}}}})
        {'final/validation': -2.5, 'final/meta_steps': 7.0, 'final/seconds': 1.0}
    """
    found: dict[str, float] = {}
    for network, run in card.get("training", {}).get("runs", {}).items():
        before = "final" if network == "learned" else f"final/{network}"
        for key in ("validation", "chosen_at", "meta_steps", "skipped", "seconds", "openness"):
            if isinstance(run.get(key), int | float):
                found[f"{before}/{key}"] = float(run[key])
    return found


def draw(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], path: Path, title: str) -> None:
    """Draws the meta-loss and the validation score of every network, as decimal logarithms of losses.

    Args:
        curves: by network and by `log10_loss` or `validation_log10_loss`, pairs of meta-step and value.
        path: the png to write.
        title: the figure's.
    """
    from metateleport.evaluation.style import bare, new_figure, save, suptitle

    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for index, (name, own) in enumerate(curves.items()):
        colour = f"C{index}"
        steps, losses = zip(*own.get("log10_loss", ()), strict=True) if own.get("log10_loss") else ((), ())
        axes.plot(steps, losses, color=colour, alpha=0.35, linewidth=1, label=f"{name}: meta-loss")
        if own.get("validation_log10_loss"):
            steps, scores = zip(*own["validation_log10_loss"], strict=True)
            axes.plot(steps, scores, color=colour, marker="o", markersize=3, label=f"{name}: validation")
    axes.set(xlabel="meta-step", ylabel="mean log10 loss along the unroll")
    bare(axes)
    if curves:
        axes.legend(frameon=False)
    suptitle(figure, title)
    save(figure, path)
