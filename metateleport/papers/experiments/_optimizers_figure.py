"""The figure of the experiment `optimizers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metateleport.evaluation.style import BLACK, BLUE, GREEN, VERMILLION
from metateleport.papers.experiments._optimizers_claims import log_ratios, ratio_of
from metateleport.papers.experiments.ways import PLAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_MAPS = (
    ("plain", "training", "steps", "training loss along the run,\nbest step size without teleports"),
    ("own", "training", "steps", "training loss along the run,\neach at its own best step size"),
    ("own", "held-out", "steps", "held-out loss along the run,\neach at its own best step size"),
    ("own", "training", "evaluations", "training loss at equal evaluations,\neach at its own best step size"),
    ("own", "training", "seconds", "training loss at equal seconds,\neach at its own best step size"),
)
_CURVES = {
    PLAIN: BLACK,
    "ascent, batch form, early": VERMILLION,
    "ascent, rescaling, early": BLUE,
    "random, batch form, early": "#999999",
    "whitening, batch form, early": GREEN,
}
_SHOWN = ("sgd", "momentum", "adagrad", "adam", "muon")
_DATA = "mnist_digits"
# Beyond this factor all colours are alike.
_WIDEST = 4.0
# Where the log of the ratio is larger the colour is too dark for black text.
_DARK = 0.9


def draw(figure: Figure, results: Mapping[str, Any]) -> None:
    """Above, ratios to no teleport over both data sets; below, runs on MNIST's digits."""
    data = results["data"]
    panels: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1.0))
    above, below = panels
    _draw_maps(above, data)
    _draw_curves(below, data[_DATA], results["checkpoints"])


def _draw_maps(figure: Any, data: Mapping[str, Any]) -> None:
    from matplotlib.colors import LogNorm

    names = list(data[_DATA])
    methods = [name for name in data[_DATA][names[0]]["courses"]["plain"] if name != PLAIN]
    grid = figure.subplots(1, len(_MAPS), sharey=True)
    for axes, (regime, what, clock, title) in zip(grid, _MAPS, strict=True):
        values = np.full((len(methods), len(names)), np.nan)
        for (row, method), (column, name) in (
            (r, c) for r in enumerate(methods) for c in enumerate(names) if r[1] in data[_DATA][c[1]]["courses"][regime]
        ):
            ratio, (low, high) = ratio_of(log_ratios(data, regime, method, PLAIN, [name], what, clock))
            values[row, column] = ratio
            decided = low > 1 or high < 1
            axes.text(
                column,
                row,
                _short(ratio),
                ha="center",
                va="center",
                fontsize=6.5,
                fontweight="bold" if decided else "normal",
                color="white" if abs(np.log(ratio)) > _DARK else "black" if decided else "#666666",
            )
        shown = axes.imshow(values, cmap="PuOr_r", norm=LogNorm(1 / _WIDEST, _WIDEST), aspect="auto")
        axes.set_title(title, fontsize=8.5)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7.5)
        axes.set_yticks(range(len(methods)), methods, fontsize=7.5)
        axes.tick_params(length=0)
    bar = figure.colorbar(shown, ax=list(grid), shrink=0.8, aspect=30, pad=0.01, extend="both")
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.ax.minorticks_off()
    label = "loss over that without teleports: median of both data sets' runs\n(bold: the 95 % interval excludes 1)"
    bar.set_label(label, fontsize=8)


def _draw_curves(figure: Any, data: Mapping[str, Any], checkpoints: Sequence[int]) -> None:
    names = [name for name in _SHOWN if name in data] or list(data)
    grid = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        courses = data[name]["courses"]["own"]
        for method, colour in _CURVES.items():
            course = courses[method]
            _draw_runs(grid[0, column], checkpoints, course["training"], colour, method)
            _draw_runs(grid[1, column], course["seconds"], course["held_out"], colour, method)
        grid[0, column].set_title(f"{name}, MNIST's digits", fontsize=9)
        grid[0, column].set_xlabel("steps", fontsize=8)
        grid[1, column].set_xlabel("seconds", fontsize=8)
    grid[0, 0].set_ylabel("training loss", fontsize=8)
    grid[1, 0].set_ylabel("held-out loss", fontsize=8)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        fontsize=8,
        title="each at its own best step size; median and range of the runs",
        title_fontsize=8,
    )


def _draw_runs(axes: Axes, along: Sequence[float], runs: Sequence[Sequence[float]], colour: str, label: str) -> None:
    losses = np.asarray(runs)
    # What diverges leaves the picture.
    losses = np.where(losses > 10 * losses[:, :1], np.nan, losses)
    axes.plot(along, np.median(losses, axis=0), color=colour, label=label, linewidth=1.2)
    axes.fill_between(along, losses.min(0), losses.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.set_yscale("log")
    axes.tick_params(labelsize=7)


def _short(ratio: float) -> str:
    return ">99" if ratio > 99 else f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
