"""The figure of the experiment `optimizers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

_STYLES = {
    "no teleport": ("#000000", "-"),
    "ascent, batch form, early": ("#D55E00", "-"),
    "ascent, batch form, late": ("#D55E00", "--"),
    "ascent, batch form, often": ("#D55E00", ":"),
    "random, batch form, early": ("#999999", "-"),
    "ascent, rescaling, early": ("#0072B2", "-"),
    "ascent, rescaling, often": ("#0072B2", ":"),
}
_ROWS = (
    ("source", "training", "steps", "training loss\nat the source's step size"),
    ("plain", "training", "steps", "training loss\nat the best plain step size"),
    ("own", "training", "steps", "training loss\neach at its own best step size"),
    ("plain", "held_out", "seconds", "held-out loss\nat the best plain step size"),
)


def draw(figure: Figure, results: Mapping[str, Any]) -> None:
    """Medians over the runs on MNIST's digits: one column for each optimizer."""
    data = results["data"]["mnist_digits"]
    grid = figure.subplots(len(_ROWS), len(data), squeeze=False)
    for row, (regime, what, by, label) in enumerate(_ROWS):
        for column, (optimizer, found) in enumerate(data.items()):
            axes = grid[row, column]
            for name, course in found["courses"][regime].items():
                if name not in _STYLES:
                    continue
                colour, style = _STYLES[name]
                along = results["checkpoints"] if by == "steps" else course["seconds"]
                median = np.median(np.asarray(course[what]), axis=0)
                # What diverges leaves the picture.
                median = np.where(median > 10 * median[0], np.nan, median)
                axes.plot(along, median, style, color=colour, label=name, linewidth=1.2)
            axes.set(yscale="log", xlabel=by)
            axes.tick_params(labelsize=7)
            if column == 0:
                axes.set_ylabel(label, fontsize=8)
            if row == 0:
                axes.set_title(f"{optimizer}, MNIST's digits", fontsize=10)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
