"""The experiment `optimizers`: does teleporting early, late or often help the usual optimizers on real digits?"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from metateleport.experiments.base import Claim, Experiment, ExperimentError, Findings, Progress, finite
from metateleport.experiments.courses import OPTIMIZERS, Course, Method, batch_pairs, follow, rescalings
from metateleport.experiments.intervals import bootstrap
from metateleport.families import Task, TaskFamily, load_family
from metateleport.schedules import AtSteps, Every, Schedule
from metateleport.stack import Batch
from metateleport.teleporters import GradientAscentTeleporter, RandomTeleporter, Teleporter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Optimizers"]

Array = npt.NDArray[np.float64]

FAMILIES = ("digits", "mnist_digits")
WHEN = ("early", "late", "often")
PLAIN = "no teleport"
LOOKS = 10
# The source's code goes no further where the squared norm of the gradient is above it.
SQUARED_NORM_CAP = 100.0
REGIMES = {
    "source": "the source's step size",
    "plain": "the best step size without teleports",
    "own": "each at its own best step size",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizers(Experiment):
    """Optimizers x teleporters on scikit-learn's and MNIST's digits: teleports early, late and often.

    Every run is made without a teleport, with gradient ascent over the batch form of GL that the source takes, with
    gradient ascent over the exact rescalings, and with a random element of the batch form; once at the first step,
    once half-way, and ten times. All of them from the same weights and on the same minibatches, at the step sizes of
    the source's code and at the one that is best without a teleport on other tasks; the early ones each at its own best
    one too. After a teleport along the batch form the optimizer's state starts anew, as in the source's code; along
    rescalings it is transported.

    Settings:
        runs: tasks of each data set: other classes, initial weights and order of the minibatches.
        steps: of training.
        batch: samples a minibatch; the batch form holds where they are no more than `hidden`.
        hidden: units of each hidden layer.
        depth: number of weight matrices.
        reach: largest norm of a generator, and the norm of the random ones.
        ascent: steps of gradient ascent.
        tuning: tasks of each data set that the step sizes are chosen on.
        only: one optimizer's name, or all.
    """

    name: ClassVar[str] = "optimizers"
    size: ClassVar[tuple[float, float]] = (15.0, 9.0)

    runs: int = 5
    steps: int = 120
    batch: int = 20
    hidden: int = 32
    depth: int = 3
    reach: float = 1.0
    ascent: int = 10
    tuning: int = 2
    only: Literal["all", "sgd", "momentum", "adagrad", "rmsprop", "adam"] = "all"

    def __post_init__(self) -> None:
        if self.runs < 2 or self.tuning < 1 or self.ascent < 1:
            raise ExperimentError(
                f"optimizers needs at least two runs, one task to tune on and one step of ascent; got "
                f"runs={self.runs}, tuning={self.tuning}, ascent={self.ascent}"
            )
        if self.steps < LOOKS:
            raise ExperimentError(f"optimizers looks {LOOKS} times, so steps={self.steps} has to be at least {LOOKS}")
        if not 0 < self.reach < float("inf"):
            raise ExperimentError(f"reach is a norm, finite and positive, not {self.reach}")
        if self.depth < 3:
            raise ExperimentError(f"depth={self.depth}: the source's perceptrons have two hidden layers or more")
        if self.batch > self.hidden:
            raise ExperimentError(
                f"the batch form holds for no more samples than units: batch={self.batch} and hidden={self.hidden}"
            )
        if self.only not in ("all", *OPTIMIZERS):
            raise ExperimentError(f"only is all or one of {', '.join(OPTIMIZERS)}, not {self.only!r}")
        for name in FAMILIES:
            self._family(name)

    def findings(self, seed: int, progress: Progress) -> Findings:
        results: dict[str, Any] = {"checkpoints": self._checkpoints, "data": {}}
        for name in FAMILIES:
            results["data"][name] = {}
            for optimizer in self._names:
                progress(f"{name}: {optimizer}")
                results["data"][name][optimizer] = self._compare(self._family(name), optimizer, seed)
        return Findings(results, _claims(results["data"]))

    def draw(self, figure: Figure, results: Mapping[str, Any]) -> None:
        from metateleport.experiments._optimizers_figure import draw

        draw(figure, results)

    @property
    def _names(self) -> list[str]:
        return [name for name in OPTIMIZERS if self.only in ("all", name)]

    @property
    def _checkpoints(self) -> list[int]:
        return [self.steps * look // LOOKS for look in range(LOOKS + 1)]

    @property
    def methods(self) -> dict[str, Method]:
        """All that is compared, by name."""
        schedules: dict[str, Schedule] = {
            "early": AtSteps([0]),
            "late": AtSteps([self.steps // 2]),
            "often": Every(self.steps // 10),
        }

        def ascent() -> Teleporter:
            step = self.reach / self.ascent
            return GradientAscentTeleporter(
                steps=self.ascent, step_size=step, cap=self.reach, value_cap=SQUARED_NORM_CAP
            )

        def random() -> Teleporter:
            return RandomTeleporter(size=self.reach, seed=0)

        ways: dict[str, tuple[Callable[[], Teleporter], Any, str]] = {
            "ascent, batch form": (ascent, batch_pairs, "reset"),
            "ascent, rescaling": (ascent, rescalings, "transport"),
            "random, batch form": (random, batch_pairs, "reset"),
        }
        found = {PLAIN: Method()}
        for (way, (teleporter, symmetries, state)), when in itertools.product(ways.items(), WHEN):
            found[f"{way}, {when}"] = Method(teleporter, symmetries, schedules[when], state)
        return found

    def _family(self, name: str) -> TaskFamily:
        return load_family(name, {"hidden": self.hidden, "depth": self.depth, "batch": self.batch})

    def _compare(self, family: TaskFamily, optimizer: str, seed: int) -> dict[str, Any]:
        recipe, methods = OPTIMIZERS[optimizer], self.methods
        early = [PLAIN, *(name for name in methods if name.endswith("early"))]
        tuned = [self._ready(family.task(index, "train", seed)) for index in range(self.tuning)]
        best = {name: self._best_step(tuned, optimizer, methods[name]) for name in early}
        regimes = {
            "source": dict.fromkeys(methods, recipe.source),
            "plain": dict.fromkeys(methods, best[PLAIN]),
            "own": best,
        }
        courses: dict[str, dict[str, list[Course]]] = {
            regime: {name: [] for name in steps} for regime, steps in regimes.items()
        }
        for index in range(self.runs):
            task = self._ready(family.task(index, "held-out", seed))
            # One method after the other on one task, so that all meet the machine alike.
            for regime, steps in regimes.items():
                for name, step in steps.items():
                    courses[regime][name].append(self._follow(task, optimizer, step, methods[name]))
        return {
            "step_sizes": {"source": recipe.source, **best},
            "courses": {
                regime: {name: _columns(each) for name, each in found.items()} for regime, found in courses.items()
            },
        }

    def _best_step(self, tasks: Sequence[_Ready], optimizer: str, method: Method) -> float:
        def score(step: float) -> float:
            runs = [self._follow(task, optimizer, step, method).training for task in tasks]
            return float(np.log(_along(runs)).sum())

        return min(OPTIMIZERS[optimizer].grid, key=score)

    def _ready(self, task: Task) -> _Ready:
        return _Ready(task, task.training, [task.batch(number) for number in range(self.steps)])

    def _follow(self, ready: _Ready, optimizer: str, step: float, method: Method) -> Course:
        own = dataclasses.replace(ready.task, model=copy.deepcopy(ready.task.model))
        recipe = OPTIMIZERS[optimizer]
        return follow(own, ready.training, ready.batches, recipe, step, method, self._checkpoints)


class _Ready(NamedTuple):
    """A task whose data are picked already, as every method meets the same."""

    task: Task
    training: Batch
    batches: list[Batch]


def _columns(courses: Sequence[Course]) -> dict[str, Any]:
    """Runs side by side; of the seconds the median."""
    found = {field.name: [getattr(each, field.name) for each in courses] for field in dataclasses.fields(Course)}
    failures = sorted({name for each in courses for name in each.failures})
    return {
        **found,
        "seconds": np.median(found["seconds"], axis=0).tolist(),
        "failures": {name: sum(each.failures.get(name, 0) for each in courses) for name in failures},
    }


def _along(losses: npt.ArrayLike) -> Array:
    """Geometric mean of the losses along a run, its start left out; runs in front.

    A loss of more than ten times the first counts as that: what has diverged has failed, however far it went.
    """
    values = np.asarray(losses, dtype=np.float64)
    return np.exp(np.log(values[..., 1:].clip(1e-300, 10 * values[..., :1])).mean(-1))


def _claims(data: Mapping[str, Any]) -> list[Claim]:
    section = "ICLR 2024, on teleportation in other optimizers"
    names = list(data[FAMILIES[0]])
    who = "all optimizers" if len(names) > 1 else names[0]
    claims = []
    for optimizer, regime in itertools.product(names, REGIMES):
        ratio = _log_ratios(data, regime, "ascent, batch form, early", PLAIN, "training", [optimizer])
        words = f"one early teleport lowers {optimizer}'s training loss along the run (batch form, {REGIMES[regime]})"
        claims.append(_lower(ratio, words, section))
    for what, way, regime in itertools.product(("training", "held-out"), ("batch form", "rescaling"), REGIMES):
        if (what, way) == ("training", "batch form"):
            continue
        words = f"one early teleport lowers the {what} loss along the run ({who}, {way}, {REGIMES[regime]})"
        claims.append(_lower(_log_ratios(data, regime, f"ascent, {way}, early", PLAIN, what), words, section))
    for regime, steps in REGIMES.items():
        words = f"gradient ascent does better than a random element of the same size (batch form, {steps})"
        found = _log_ratios(data, regime, "ascent, batch form, early", "random, batch form, early", "training")
        claims.append(_lower(found, words, "NeurIPS 2022, section 5"))
    for regime, when in itertools.product(("source", "plain"), ("late", "often")):
        words = f"teleporting {when} does better than once early (batch form, training, {REGIMES[regime]})"
        found = _log_ratios(data, regime, f"ascent, batch form, {when}", "ascent, batch form, early", "training")
        claims.append(_lower(found, words, "here"))
    for regime, steps in REGIMES.items():
        words = f"one early teleport lowers the training loss at equal seconds (batch form, {steps})"
        claims.append(_lower(_at_equal_seconds(data, regime), words, section))
    return claims


def _log_ratios(
    data: Mapping[str, Any], regime: str, method: str, against: str, what: str, optimizers: Sequence[str] = ()
) -> Array:
    """Log of the ratio of two methods' losses along a run, `(tasks, optimizers)`, tasks of both data sets in rows."""
    key = what.replace("-", "_")
    rows = []
    for family in data.values():
        courses = [family[name]["courses"][regime] for name in optimizers or family]
        logs = [np.log(_along(each[method][key])) - np.log(_along(each[against][key])) for each in courses]
        rows.append(np.stack(logs, axis=1))
    return np.concatenate(rows)


def _at_equal_seconds(data: Mapping[str, Any], regime: str) -> Array:
    """As `_log_ratios`, of the losses at the time when the first of the two is through."""
    rows = []
    for family in data.values():
        columns = []
        for name in family:
            ours, theirs = (family[name]["courses"][regime][key] for key in ("ascent, batch form, early", PLAIN))
            end = min(ours["seconds"][-1], theirs["seconds"][-1])
            logs = [
                np.array(
                    [
                        np.interp(end, side["seconds"], np.log(np.clip(run, 1e-300, 10 * run[0])))
                        for run in side["training"]
                    ]
                )
                for side in (ours, theirs)
            ]
            columns.append(logs[0] - logs[1])
        rows.append(np.stack(columns, axis=1))
    return np.concatenate(rows)


def _lower(logs: Array, claim: str, source: str) -> Claim:
    """That the median ratio lies below one, by an interval over tasks: what one task gives stays together."""

    def ratio(rows: Array) -> float:
        return finite(float(np.exp(min(float(np.median(rows)), 690.0))))

    low, high = bootstrap(logs, ratio)
    holds = True if high < 1 else False if low > 1 else None
    return Claim(f"{claim}: median ratio", source, ratio(logs), (low, high), holds)
