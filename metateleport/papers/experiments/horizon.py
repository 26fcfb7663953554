"""The experiment `horizon`: truncated windows against evolution strategies at equal seconds, over many steps."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from metateleport.evaluation.style import BLUE, GREY, VERMILLION
from metateleport.families import TaskFamily, load_family
from metateleport.learned import MetaOptimizer, MetaOptimizerConfig, RuleSettings, StepSettings
from metateleport.papers.experiments.base import Claim, Experiment, ExperimentError, Findings, Progress, finite
from metateleport.papers.experiments.intervals import bootstrap
from metateleport.papers.experiments.noisy_quadratic import NoisyQuadratic
from metateleport.papers.schedule import ScheduleRule, ScheduleSettings
from metateleport.training import FamilySettings, MetaTrainer, Recipe, Unroll, ValidationSettings
from metateleport.training.outer import ESTIMATORS
from metateleport.training.particles import Particles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Horizon"]

_COLOURS = {"tbptt": VERMILLION, "es": GREY, "pes": BLUE}
_WORDS = {"tbptt": "truncated backpropagation", "es": "evolution strategy", "pes": "persistent evolution strategy"}
_NO_VALIDATION = 10**6
_LOOKS = 20
_STEPS = tuple(0.01 * 2**power for power in range(8))
_POWERS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
_SOURCE = "Vicol, Metz, Sohl-Dickstein 2021"


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A family with the rule that is trained on it, in which spread, and how fast."""

    family: TaskFamily
    rule: RuleSettings
    spread: float
    lr: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Horizon(Experiment):
    """Truncated backpropagation, ES and PES at equal CPU seconds, over long horizons on two families.

    On noisy quadratics a schedule of two numbers is learned, the first step and the power that it falls with; the best
    one of a grid is known. On the source paper's regression (more samples than width, normal data) the networks of the
    learned step are. Each estimator trains on stacks of the same tasks, from the same start and for the same seconds of
    this process's CPU time, and what it has learned at the end takes the horizon on held-out tasks. No networks are
    chosen on validation tasks, as that would hide where training leads. As time ends a training, equal seeds do not
    give equal figures.

    Settings:
        horizon: inner steps.
        unroll: inner steps of a window.
        seconds: of CPU time for each training.
        tasks: tasks in a stack, each of which ES and PES follow twice.
        held_out: tasks that the results are compared on.
        width: of the regression's layers.
    """

    name: ClassVar[str] = "horizon"
    size: ClassVar[tuple[float, float]] = (12.0, 4.5)

    horizon: int = 1000
    unroll: int = 20
    seconds: float = 30.0
    tasks: int = 16
    held_out: int = 64
    width: int = 10

    def __post_init__(self) -> None:
        if self.unroll < 1 or self.horizon < _LOOKS or self.horizon % self.unroll or self.horizon % _LOOKS:
            raise ExperimentError(
                f"horizon={self.horizon} has to be a multiple of unroll={self.unroll} and of {_LOOKS}, at which it "
                "measures"
            )
        if not 0 < self.seconds < math.inf or self.tasks < 1 or self.held_out < 2 or self.width < 1:
            raise ExperimentError(
                f"horizon needs some seconds, a task, two held-out ones and a width; got seconds={self.seconds}, "
                f"tasks={self.tasks}, held_out={self.held_out}, width={self.width}"
            )

    def findings(self, seed: int, progress: Progress) -> Findings:
        results: dict[str, Any] = {}
        for name, problem in self._problems().items():
            results[name] = {}
            for estimator in ESTIMATORS:
                told = lambda done, name=name, estimator=estimator: progress(f"{name}, {estimator}: {done}")  # noqa: E731
                results[name][estimator] = self._trained(problem, estimator, seed, told)
        progress("the best schedule of a grid")
        best = self._best_schedule(seed)
        return Findings({"families": results, "best_schedule": best}, _claims(results, best, seed))

    def draw(self, figure: Figure, results: Mapping[str, Any]) -> None:
        for axes, (name, found) in zip(figure.subplots(1, 2), results["families"].items(), strict=True):
            for estimator, each in found.items():
                along = np.asarray(each["along"])
                steps = np.arange(1, _LOOKS + 1) * (self.horizon // _LOOKS)
                middle, *edges = np.quantile(along, [0.5, 0.25, 0.75], 1)
                axes.plot(steps, middle, color=_COLOURS[estimator], label=_WORDS[estimator])
                axes.fill_between(steps, *edges, color=_COLOURS[estimator], alpha=0.15, linewidth=0)
            axes.set(yscale="log", xlabel="inner steps", ylabel=f"{found['pes']['measure']} (median, quartiles)")
            axes.set_title(f"{name}, {self.seconds:g} s of CPU time each", fontsize=9, loc="left")
        figure.axes[0].legend(fontsize=7)

    def _problems(self) -> dict[str, _Problem]:
        regression = {"width": self.width, "samples": 3 * self.width, "distribution": "normal"}
        return {
            "noisy_quadratic": _Problem(NoisyQuadratic(), ScheduleSettings(), 0.1, 0.05),
            "leaky_mlp": _Problem(load_family("leaky_mlp", regression), StepSettings(hidden=8), 0.02, 5e-3),
        }

    def _trained(self, problem: _Problem, estimator: str, seed: int, progress: Progress) -> dict[str, Any]:
        """One training, and what its networks do on the held-out tasks."""
        kind = ESTIMATORS[estimator]
        own: dict[str, Any] = {"unroll": self.unroll, "spread": problem.spread}
        outer = kind(
            meta_steps=None,
            seconds=self.seconds,
            tasks=self.tasks,
            horizon=self.horizon,
            lr=problem.lr,
            blind=0.0,
            seed=seed,
            device="cpu",
            **{name: value for name, value in own.items() if name in kind.names()},
        )
        validation = ValidationSettings(2, _NO_VALIDATION)
        recipe = Recipe(FamilySettings(problem.family.name), problem.rule, None, None, outer, validation)
        meta = _seeded(lambda: MetaOptimizer(recipe.networks(())), seed)
        trainer = MetaTrainer(recipe, problem.family, meta)
        trainer.clock, began, seen = time.process_time, time.process_time(), list[list[float]]()

        def report(_: Any) -> None:
            progress(f"{time.process_time() - began:.0f} of {self.seconds:.0f} s")
            if isinstance(meta.rule, ScheduleRule):
                seen.append(meta.rule.numbers.weight.flatten().tolist())

        trainer.run(report)
        seconds = time.process_time() - began
        stack = problem.family.stack(range(self.held_out), "held-out", seed)
        unroll, along, losses = Unroll(stack, meta), [], []
        for _ in range(_LOOKS):
            losses.append(unroll.window(self.horizon // _LOOKS, track=False).mean(0))
            along.append([finite(value) for value in stack.measured(stack.tensors()).nan_to_num(math.inf).tolist()])
        return {
            "meta_steps": trainer.progression.meta_step,
            "stacks": trainer.progression.stack,
            "cpu_seconds": seconds,
            "measure": "training loss" if stack.measure is None else stack.measure.name,
            "along": along,
            "meta_losses": torch.stack(losses).mean(0).nan_to_num(100.0, 100.0, -100.0).tolist(),
            "schedule": [[finite(value) for value in each] for each in seen[:: max(1, len(seen) // 50)]],
        }

    def _best_schedule(self, seed: int) -> dict[str, Any]:
        """The schedule of a grid with the lowest meta-loss along the horizon, and that along the first window."""
        grid = [(math.log(step), power) for step in _STEPS for power in _POWERS]
        meta = MetaOptimizer(MetaOptimizerConfig(ScheduleSettings(), None, groups=()))
        tasks = min(8, self.held_out)
        stack = NoisyQuadratic().stack(list(range(tasks)) * len(grid), "held-out", seed)
        particles = Particles(stack, meta)
        rows = torch.tensor([point for point in grid for _ in range(tasks)])
        windows = [particles.window(self.unroll, rows).losses for _ in range(self.horizon // self.unroll)]
        means = torch.stack(windows).mean(0).reshape(len(grid), tasks).mean(1)
        log_step, power = grid[int(means.argmin())]
        return {"step": math.exp(log_step), "power": power, "meta_loss": float(means.min()), "tasks": tasks}


def _seeded(make: Callable[[], MetaOptimizer], seed: int) -> MetaOptimizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _claims(results: Mapping[str, Any], best: Mapping[str, Any], seed: int) -> Sequence[Claim]:
    quadratic = results["noisy_quadratic"]
    seconds = [each["cpu_seconds"] for found in results.values() for each in found.values()]
    claims = [
        Claim(
            "all trainings have had equal CPU seconds, the longest over the shortest",
            "here",
            max(seconds) / min(seconds),
            None,
            max(seconds) / min(seconds) < 1.2,
        )
    ]
    for name, found in results.items():
        for other in ("tbptt", "es"):
            claims.append(_ends_lower(name, found, other, seed))
    last = {name: _step_at_the_end(found["schedule"][-1]) for name, found in quadratic.items()}
    ratio = last["tbptt"] / last["pes"]
    claims.append(
        Claim(
            "truncation learns steps that are too short: its step after ten times the period over that of PES",
            _SOURCE,
            finite(ratio),
            None,
            ratio < 1,
        )
    )
    for name in ("tbptt", "pes"):
        above = np.asarray(quadratic[name]["meta_losses"])[: best["tasks"]].mean() - best["meta_loss"]
        claims.append(
            Claim(
                f"{_WORDS[name]} comes near the best schedule of a grid: mean log loss along the horizon above it",
                "here",
                finite(float(above)),
                None,
                bool(above < 0.05),
            )
        )
    return claims


def _ends_lower(name: str, found: Mapping[str, Any], other: str, seed: int) -> Claim:
    ours, theirs = (np.log(np.maximum(found[each]["along"][-1], 1e-300)) for each in ("pes", other))
    gaps = theirs - ours
    low, high = bootstrap(gaps, np.median, seed)
    ends = [finite(math.exp(min(value, 690.0))) for value in (float(np.median(gaps)), low, high)]
    holds = True if low > 0 else False if high < 0 else None
    words = f"PES ends lower on {name}: {found[other]['measure']} at the horizon, {_WORDS[other]} over PES"
    return Claim(words, _SOURCE, ends[0], (ends[1], ends[2]), holds)


def _step_at_the_end(schedule: Sequence[float]) -> float:
    """The step after ten periods of the schedule."""
    log_step, power = schedule
    return math.exp(log_step - power * math.log1p(10))
