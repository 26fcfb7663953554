"""The plot of figure 6, with the attribution beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metateleport.files import replacing

__all__ = ["draw"]

# Okabe and Ito's colours, told apart by the colour-blind too.
_COLOURS = {"LSTM(update)": "#0072B2", "LSTM(update,tele)": "#CC79A7", "LSTM(lr,tele)": "#D55E00", "gd": "#7F7F7F"}
_BESIDE = {
    "learned": ("as learned", "#D55E00", "-"),
    "learned/teleport-off": ("teleport off", "#0072B2", (0, (5, 2))),
    "learned/random-teleport": ("random element", "#009E73", (0, (1, 1.5))),
    "learned/step-only": ("step learned alone", "#000000", (0, (4, 1.5, 1, 1.5))),
    "learned/guarded": ("harmful steps taken back", "#E69F00", "-"),
    "gd": ("gradient descent", "#7F7F7F", "-"),
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    networks: Mapping[str, Any] = result["networks"]
    teleporting = [name for name, report in networks.items() if "learned/teleport-off" in report["methods"]]
    figure = Figure(figsize=(4.6 * (1 + len(teleporting)), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
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
        each.grid(visible=True, which="major", alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
        each.legend(frameon=False, fontsize=8)
    settings = result["settings"]
    figure.suptitle(
        f"{settings['tasks']} held-out tasks, {settings['seeds']} meta-seeds (band), {settings['runs']} training runs",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, dpi=150)


def _curve(axes: Any, report: Mapping[str, Any], method: str, label: str, colour: str, line: Any) -> None:
    entry = report["methods"][method]
    axes.plot(entry["gradient_evaluations"], _shown(entry["median"]), label=label, color=colour, linestyle=line)
    along = report["meta_seeds"]["along"].get(method)
    if along is not None:
        low, high = _shown(along["lowest"]), _shown(along["highest"])
        axes.fill_between(entry["gradient_evaluations"], low, high, color=colour, alpha=0.13, linewidth=0)


def _shown(values: Any) -> Any:
    return np.clip(np.asarray(values, dtype=np.float64), 1e-300, 1e30)
