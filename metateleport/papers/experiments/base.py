"""The interface of every experiment: settings, a run, claims that the run decides, and a figure."""

from __future__ import annotations

import abc
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from metateleport.evaluation.style import bare, new_figure, save, suptitle
from metateleport.files import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LARGEST", "SCHEMA", "Claim", "Experiment", "ExperimentError", "ExperimentResult", "Findings", "finite"]

SCHEMA = 1

LARGEST = 1e300
"""Larger or infinite numbers become this in a result, as JSON has no infinity."""

Progress = Callable[[str], None]
"""Receives messages on what is being done."""


class ExperimentError(ValueError):
    """An experiment or a setting that does not exist or cannot work; the message says why."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement, and whether the run confirms it.

    Args:
        claim: the statement, in words, with what `value` measures.
        source: paper and place that states it; `here` if only this library states it.
        value: the number that decides it.
        interval: its confidence interval; None if the value is not an estimate.
        holds: whether it holds; None if the data do not decide.

    Raises:
        ValueError: if a number is not finite, or the interval is not in order.

    Example:
        >>> Claim("1 + 1 is 2, by the relative gap", "here", 0.0, None, True).as_json()["holds"]
        True
    """

    claim: str
    source: str
    value: float
    interval: tuple[float, float] | None
    holds: bool | None

    def __post_init__(self) -> None:
        numbers = (self.value, *(self.interval or ()))
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"the claim {self.claim!r} has a number that is not finite: {numbers}")
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"the interval of the claim {self.claim!r} is not in order: {self.interval}")

    def as_json(self) -> dict[str, Any]:
        """The claim as plain values; only `interval` and `holds` may be null."""
        interval = None if self.interval is None else [float(bound) for bound in self.interval]
        holds = None if self.holds is None else bool(self.holds)
        return {**dataclasses.asdict(self), "value": float(self.value), "interval": interval, "holds": holds}


@dataclasses.dataclass(frozen=True)
class Findings:
    """Results of a run: plain values by name, and the claims."""

    results: Mapping[str, Any]
    claims: Sequence[Claim]


@dataclasses.dataclass(frozen=True)
class ExperimentResult:
    """A finished experiment.

    Args:
        experiment: its name.
        settings: all of its settings, and the seed.
        seconds: duration of the run.
        results: plain values: numbers, strings, booleans, lists and dictionaries of these.
        claims: the statements that were tested.
    """

    experiment: str
    settings: Mapping[str, Any]
    seconds: float
    results: Mapping[str, Any]
    claims: Sequence[Claim]

    def as_json(self) -> dict[str, Any]:
        """The result for JSON: no NaN, infinity or null, except in a claim's `interval` and `holds`.

        Raises:
            ValueError: if there is such a value, with the place where it stands.
        """
        settings = {name: "none" if value is None else value for name, value in self.settings.items()}
        _require_plain(settings, "settings")
        _require_plain(self.results, "results")
        return {
            "schema": SCHEMA,
            "experiment": self.experiment,
            "settings": settings,
            "seconds": self.seconds,
            "results": dict(self.results),
            "claims": [claim.as_json() for claim in self.claims],
        }

    def write(self, path: str | Path) -> None:
        """Writes the result as JSON, in one piece."""
        write_json(Path(path), self.as_json())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(abc.ABC):
    """A test of a paper's claims.

    An experiment is a frozen dataclass: its fields are its settings, each with a default, and `--set name=value` on
    the command line sets them. Settings that cannot work raise `ExperimentError` when it is made. Everything random
    is drawn from the seed, so that equal settings and seeds give equal results.
    """

    name: ClassVar[str] = ""
    size: ClassVar[tuple[float, float]] = (11.5, 4.2)
    """Of the figure, in inches."""

    @abc.abstractmethod
    def findings(self, seed: int, progress: Progress) -> Findings:
        """Runs the experiment.

        Args:
            seed: seeds all that is random.
            progress: receives messages on what is being done.
        """

    @abc.abstractmethod
    def draw(self, figure: Figure, results: Mapping[str, Any]) -> None:
        """Draws what `findings` gave as `results`."""

    def run(self, seed: int = 0, progress: Progress | None = None) -> ExperimentResult:
        """Runs the experiment and notes how long it took.

        Args:
            seed: seeds all that is random.
            progress: receives messages on what is being done.

        Raises:
            ExperimentError: if the seed is negative.
        """
        if seed < 0:
            raise ExperimentError(f"{self.name}: a seed is not negative, it is {seed}")
        start = time.perf_counter()
        found = self.findings(seed, progress or (lambda _: None))
        settings = {**dataclasses.asdict(self), "seed": seed}
        return ExperimentResult(self.name, settings, time.perf_counter() - start, found.results, found.claims)

    def plot(self, result: ExperimentResult, path: str | Path) -> None:
        """Writes the figure of a result; the suffix tells the format (png, svg, pdf)."""
        figure = new_figure(*self.size)
        self.draw(figure, result.results)
        for axes in figure.axes:
            bare(axes, grid=False)
        settings = ", ".join(f"{name}={value}" for name, value in result.settings.items())
        suptitle(figure, f"{self.name} ({settings})", 9)
        save(figure, path, 100)


def finite(value: float) -> float:
    """A number that JSON can hold: infinite and larger ones become 1e300.

    Raises:
        ValueError: if it is NaN.

    Example:
        >>> finite(float("inf"))
        1e+300
    """
    value = float(value)
    if math.isnan(value):
        raise ValueError("a result is NaN: replace it by a value that says what it means")
    return max(-LARGEST, min(LARGEST, value))


def _require_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for name, each in value.items():
            _require_plain(each, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for place, each in enumerate(value):
            _require_plain(each, f"{where}[{place}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON cannot hold")
    elif not isinstance(value, str | int):
        raise ValueError(f"{where} is a {type(value).__name__}, and a result holds plain values only")
