"""How figures look: colours, axes without a frame, and files that are the same for the same drawing."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metateleport.evaluation.kept import digest
from metateleport.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "GREY",
    "LINES",
    "ORANGE",
    "PURPLE",
    "SKY",
    "VERMILLION",
    "bare",
    "colours_of",
    "is_drawn",
    "new_figure",
    "save",
    "suptitle",
    "trace_of",
]

# Okabe and Ito's colours, told apart by the colour-blind too.
BLACK, BLUE, GREEN, ORANGE = "#000000", "#0072B2", "#009E73", "#E69F00"
PURPLE, SKY, VERMILLION, GREY = "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F"

_COLOURS = {
    "learned": VERMILLION,
    "gd": GREY,
    "momentum": SKY,
    "adam": BLUE,
    "lbfgs": GREEN,
    "gradient-ascent": PURPLE,
    "whitening": ORANGE,
    "gauss-newton": BLACK,
    "soap": "#8C564B",
}
_OTHERS = ("#B5A400", "#4B0082", "#005F56")

LINES: dict[str, Any] = {
    "teleport-off": (0, (5, 2)),
    "random-teleport": (0, (1, 1.5)),
    "step-only": (0, (4, 1.5, 1, 1.5)),
}
"""Line styles of the runs of the attribution, which share the learned method's colour."""


def new_figure(width: float, height: float) -> Figure:
    """A figure without a window; the size is in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def bare(axes: Axes, grid: bool = True) -> None:
    """Removes the frame above and to the right, and draws a faint grid."""
    if grid:
        axes.grid(visible=True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def colours_of(methods: Iterable[str]) -> dict[str, str]:
    """A colour for each method of an evaluation; the learned method and its attribution share one.

    Others share none, as long as there are any left.

    Example:
        >>> colours_of(["learned", "learned/step-only", "mine"])["mine"]
        '#B5A400'
        >>> len(set(colours_of(["learned", *(f"rival {number}" for number in range(11))]).values()))
        12
    """
    names = list(methods)
    known = {name: _COLOURS[name.split("/")[0]] for name in names if name.split("/")[0] in _COLOURS}
    free = [each for each in dict.fromkeys((*_OTHERS, *_COLOURS.values())) if each not in known.values()]
    others = itertools.cycle(free)
    return {name: known.get(name) or next(others) for name in names}


def save(figure: Figure, path: str | Path, dpi: int = 150, trace: str = "") -> None:
    """Writes a figure, whole or not at all; the suffix tells the format (png, svg, pdf).

    Args:
        figure: the figure.
        path: the file to write.
        dpi: dots per inch.
        trace: a text stored in a png, by which `is_drawn` recognises it.

    Raises:
        ValueError: if matplotlib does not write the suffix's format.
    """
    metadata = {"Software": None, "trace": trace} if trace else None
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata=metadata)


def trace_of(drawn: Any, drawing: Any) -> str:
    """A hash of what a figure shows and of the sources that draw it, this file among them.

    Args:
        drawn: the values that are drawn, plain.
        drawing: a function of the module that draws.
    """
    modules = [inspect.getmodule(each) for each in (trace_of, drawing)]
    return digest([drawn, *(inspect.getsource(module) for module in modules if module is not None)])


def is_drawn(path: Path, trace: str) -> bool:
    """Whether a png with this trace exists, so that another version of matplotlib does not draw it again."""
    return path.is_file() and trace.encode() in path.read_bytes()


def suptitle(figure: Figure, text: str, size: float = 10) -> None:
    """A title at the left of a figure."""
    figure.suptitle(text, fontsize=size, x=0.01, ha="left")
