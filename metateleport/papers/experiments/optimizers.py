"""The experiment `optimizers`: does teleporting early, late or often help the usual optimizers on real digits?"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from metateleport.families import Task, TaskFamily, load_family
from metateleport.families.stack import Batch
from metateleport.papers.experiments._optimizers_claims import along, claims
from metateleport.papers.experiments.base import Experiment, ExperimentError, Findings, Progress
from metateleport.papers.experiments.contenders import OPTIMIZERS, best_step_size, require
from metateleport.papers.experiments.courses import Course, follow
from metateleport.papers.experiments.ways import PLAIN, Method, methods

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FAMILIES", "Optimizers"]

FAMILIES = ("digits", "mnist_digits")
LOOKS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizers(Experiment):
    """Optimizers x teleporters on scikit-learn's and MNIST's digits: teleports early, late and often.

    Three methods teleport once before the first step, once half-way, or ten times: gradient ascent over the batch form
    of GL, as in the source, ascent over the exact rescalings, and a random element of the batch form. Gradient descent,
    whitening, null space and level set teleport once before the first step. All runs of a task have the same start and
    the same minibatches. They use three step sizes: that of the source's code, where it has the optimizer; the best one
    without a teleport; and, for early teleports, each method's own best. Step sizes are tuned by the training loss
    along the run, on separate tasks. Losses are compared at equal steps, gradient evaluations and seconds of CPU time,
    those of the teleports included. The optimizer's state is transported along rescalings and reset after every other
    teleport, as in the source's code.

    Settings:
        runs: tasks of each data set: other classes, initial weights and order of the minibatches.
        steps: of training.
        batch: samples per minibatch, at most `hidden`, as the batch form needs.
        hidden: units of each hidden layer.
        depth: number of weight matrices.
        reach: largest norm of a generator, and the norm of the random ones; a tenth of it, over the norm of the
            weights, is the reach of null space and level set.
        ascent: steps of gradient ascent.
        tuning: tasks of each data set that the step sizes are chosen on.
        only: one optimizer's name, or all.
    """

    name: ClassVar[str] = "optimizers"
    size: ClassVar[tuple[float, float]] = (15.0, 11.5)

    runs: int = 5
    steps: int = 100
    batch: int = 20
    hidden: int = 32
    depth: int = 3
    reach: float = 1.0
    ascent: int = 10
    tuning: int = 2
    only: Literal["all", "sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", "lion", "muon", "soap"] = "all"

    def __post_init__(self) -> None:
        if self.runs < 2 or self.tuning < 1 or self.ascent < 1:
            raise ExperimentError(
                f"optimizers needs at least two runs, one task to tune on and one step of ascent; got "
                f"runs={self.runs}, tuning={self.tuning}, ascent={self.ascent}"
            )
        if self.steps < LOOKS:
            raise ExperimentError(
                f"optimizers measures {LOOKS} times in a run, so steps={self.steps} has to be at least {LOOKS}"
            )
        if not 0 < self.reach < float("inf"):
            raise ExperimentError(f"reach is a norm, finite and positive, not {self.reach}")
        if self.depth < 3:
            raise ExperimentError(f"depth={self.depth}: the source's perceptrons have two hidden layers or more")
        if self.batch > self.hidden:
            raise ExperimentError(
                f"the batch form needs no more samples than units; got batch={self.batch} and hidden={self.hidden}"
            )
        if self.only not in ("all", *OPTIMIZERS):
            raise ExperimentError(f"only is all or one of {', '.join(OPTIMIZERS)}, not {self.only!r}")
        for name in FAMILIES:
            self._family(name)

    def findings(self, seed: int, progress: Progress) -> Findings:
        require(self._names)
        results: dict[str, Any] = {"checkpoints": self._checkpoints, "data": {}}
        for name in FAMILIES:
            results["data"][name] = {}
            for optimizer in self._names:
                progress(f"{name}: {optimizer}")
                results["data"][name][optimizer] = self._compare(self._family(name), optimizer, seed)
        return Findings(results, claims(results["data"]))

    def draw(self, figure: Figure, results: Mapping[str, Any]) -> None:
        from metateleport.papers.experiments._optimizers_figure import draw

        draw(figure, results)

    @property
    def _names(self) -> list[str]:
        return [name for name in OPTIMIZERS if self.only in ("all", name)]

    @property
    def _checkpoints(self) -> list[int]:
        return [self.steps * look // LOOKS for look in range(LOOKS + 1)]

    @property
    def methods(self) -> dict[str, Method]:
        """The methods that are compared, by name."""
        return methods(self.steps, self.reach, self.ascent, often=10)

    def _family(self, name: str) -> TaskFamily:
        return load_family(name, {"hidden": self.hidden, "depth": self.depth, "batch": self.batch})

    def _compare(self, family: TaskFamily, optimizer: str, seed: int) -> dict[str, Any]:
        contender, compared = OPTIMIZERS[optimizer], self.methods
        early = [name for name in compared if name == PLAIN or name.endswith("early")]
        tuned = [self._ready(family.task(index, "train", seed)) for index in range(self.tuning)]
        best = {PLAIN: self._best_step(tuned, optimizer, compared[PLAIN], contender.start)}
        for name in early[1:]:
            best[name] = self._best_step(tuned, optimizer, compared[name], best[PLAIN])
        regimes = {"plain": dict.fromkeys(compared, best[PLAIN]), "own": best}
        if contender.source is not None:
            regimes = {"source": dict.fromkeys(early, contender.source), **regimes}
        courses: dict[str, dict[str, list[Course]]] = {
            regime: {name: [] for name in steps} for regime, steps in regimes.items()
        }
        for index in range(self.runs):
            task = self._ready(family.task(index, "held-out", seed))
            # One method after the other on one task, so that all meet the machine alike; equal runs are made once.
            done: dict[tuple[str, float], Course] = {}
            for regime, steps in regimes.items():
                for name, step in steps.items():
                    if (name, step) not in done:
                        done[name, step] = self._follow(task, optimizer, step, compared[name])
                    courses[regime][name].append(done[name, step])
        return {
            "step_sizes": {**({} if contender.source is None else {"source": contender.source}), **best},
            "courses": {
                regime: {name: _columns(each) for name, each in found.items()} for regime, found in courses.items()
            },
        }

    def _best_step(self, tasks: Sequence[_Ready], optimizer: str, method: Method, start: float) -> float:
        def score(step: float) -> float:
            runs = [self._follow(task, optimizer, step, method).training for task in tasks]
            return float(np.log(along(runs)).sum())

        return best_step_size(score, start)

    def _ready(self, task: Task) -> _Ready:
        return _Ready(task, task.training, [task.batch(number) for number in range(self.steps)])

    def _follow(self, ready: _Ready, optimizer: str, step: float, method: Method) -> Course:
        own = dataclasses.replace(ready.task, model=copy.deepcopy(ready.task.model))
        contender = OPTIMIZERS[optimizer]
        return follow(own, ready.training, ready.batches, contender, step, method, self._checkpoints)


class _Ready(NamedTuple):
    """A task with its data prepared, the same for every method."""

    task: Task
    training: Batch
    batches: list[Batch]


def _columns(courses: Sequence[Course]) -> dict[str, Any]:
    """Runs side by side; of the seconds the median."""
    found = {
        field.name: _rounded([getattr(each, field.name) for each in courses])
        for field in dataclasses.fields(Course)
        if field.name != "failures"
    }
    failures = sorted({name for each in courses for name in each.failures})
    return {
        **found,
        "seconds": _rounded(np.median(found["seconds"], axis=0).tolist()),
        "failures": {name: sum(each.failures.get(name, 0) for each in courses) for name in failures},
    }


def _rounded(values: Any) -> Any:
    """Numbers rounded to six digits."""
    if isinstance(values, list):
        return [_rounded(each) for each in values]
    return float(f"{values:.6g}") if isinstance(values, float) else values
