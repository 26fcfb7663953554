"""The plot of figure 6, with the attribution beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metateleport.evaluation.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LINES,
    ORANGE,
    PURPLE,
    VERMILLION,
    bare,
    new_figure,
    save,
    suptitle,
)

__all__ = ["draw"]

_COLOURS = {"LSTM(update)": BLUE, "LSTM(update,tele)": PURPLE, "LSTM(lr,tele)": VERMILLION, "gd": GREY}
_BESIDE = {
    "learned": ("as learned", VERMILLION, "-"),
    "learned/teleport-off": ("teleport off", BLUE, LINES["teleport-off"]),
    "learned/random-teleport": ("random element", GREEN, LINES["random-teleport"]),
    "learned/step-only": ("step learned alone", BLACK, LINES["step-only"]),
    "learned/guarded": ("harmful steps taken back", ORANGE, "-"),
    "gd": ("gradient descent", GREY, "-"),
}


def draw(result: Mapping[str, Any], path: str | Path) -> None:
    """Draws the paper's four curves, and the attribution of each network that teleports.

    Curves are medians over held-out tasks of the meta-seed that is best on validation tasks; bands reach over the
    medians of all meta-seeds.

    Args:
        result: what `metateleport.papers.reproduction.figure_6` gave.
        path: where to write; the suffix tells the format (png, svg, pdf).

    Raises:
        ValueError: if the suffix is of no format that matplotlib writes.
    """
    networks: Mapping[str, Any] = result["networks"]
    teleporting = [name for name, report in networks.items() if "learned/teleport-off" in report["methods"]]
    figure = new_figure(4.6 * (1 + len(teleporting)), 4.4)
    axes = figure.subplots(1, 1 + len(teleporting), sharey=True, squeeze=False)[0]
    for name, report in networks.items():
        _curve(axes[0], report, "learned", name, _COLOURS[name], "-")
    _curve(axes[0], next(iter(networks.values())), "gd", "gradient descent", _COLOURS["gd"], "-")
    axes[0].set(title="as in the paper", ylabel="training loss")
    for beside, name in zip(axes[1:], teleporting, strict=True):
        for method, (label, colour, line) in _BESIDE.items():
            _curve(beside, networks[name], method, label, colour, line)
        beside.set(title=f"{name} and its attribution")
    start = next(iter(networks.values()))["methods"]["gd"]["median"][0]
    for each in axes:
        # What diverges leaves the picture.
        each.set(yscale="log", xlabel="gradient evaluations", ylim=(None, 100 * start))
        bare(each)
        each.legend(frameon=False, fontsize=8)
    settings = result["settings"]
    suptitle(
        figure,
        f"{settings['tasks']} held-out tasks, {settings['seeds']} meta-seeds (band), {settings['runs']} training runs",
    )
    save(figure, path)


def _curve(axes: Any, report: Mapping[str, Any], method: str, label: str, colour: str, line: Any) -> None:
    entry = report["methods"][method]
    axes.plot(entry["gradient_evaluations"], _shown(entry["median"]), label=label, color=colour, linestyle=line)
    along = report["meta_seeds"]["along"].get(method)
    if along is not None:
        low, high = _shown(along["lowest"]), _shown(along["highest"])
        axes.fill_between(entry["gradient_evaluations"], low, high, color=colour, alpha=0.13, linewidth=0)


def _shown(values: Any) -> Any:
    return np.clip(np.asarray(values, dtype=np.float64), 1e-300, 1e30)
