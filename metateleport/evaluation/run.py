"""Running methods on held-out tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from metateleport.evaluation.fair import FairRules
from metateleport.evaluation.paired import REFERENCE
from metateleport.evaluation.trajectory import Method, Trajectory, reproducible
from metateleport.families import TRAINING_LOSS, TaskFamily, TaskStack

__all__ = [
    "Evaluation",
    "EvaluationError",
    "Result",
    "Seed",
    "SeedResults",
    "evaluate",
    "measure_of",
    "result_of",
    "run_once",
]


class EvaluationError(ValueError):
    """An evaluation cannot be made as asked for; the message says why."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one method: its trajectory and its settings; see `Method` for the fields."""

    trajectory: Trajectory
    teleports: bool
    settings: dict[str, Any]
    tuning: dict[str, Any] | None
    moves_by: str = "none"
    stacked: bool = True


@dataclasses.dataclass(frozen=True)
class Seed:
    """The learned methods of one meta-seed, before they run.

    Args:
        seed: seed of the meta-training.
        validation: its validation score.
        methods: its learned methods; empty for the chosen seed, whose methods run as the checkpoint's own.
    """

    seed: int
    validation: float
    methods: Sequence[Method] = ()


@dataclasses.dataclass(frozen=True)
class SeedResults:
    """The results of the learned methods of one meta-seed.

    Args:
        seed: seed of the meta-training.
        validation: its validation score.
        chosen: whether its results are the checkpoint's own.
        results: results of the learned methods, by name.
    """

    seed: int
    validation: float
    chosen: bool
    results: dict[str, Result]


LEAST_MEASURED = 20
"""Measurements along a run that tell its loss at any time: between them a curve keeps the last one."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Methods compared on the same held-out tasks.

    Args:
        family: name of the task family.
        settings: its settings.
        checkpoint: name of the checkpoint; `none` without one.
        tasks: number of tasks.
        steps: gradient evaluations that each method could spend on each task.
        seed: the run's seed.
        dtype: dtype of the tasks, as `float64`.
        device: device that it ran on.
        results: results by method name.
        measure: name of the measure that tasks are judged by.
        meta_seeds: results of the learned methods for each meta-seed, the chosen one among them; empty where there is
            but one.
        threads: number of threads of each run.
        jobs: largest number of processes that shared the machine.
        kept: names of the runs that an earlier call made; their seconds are those measured then.
        rules: the rules that rivals were tuned by; None for those of `tune`.
        every: gradient evaluations between two measurements of the losses.
    """

    family: str
    settings: dict[str, Any]
    checkpoint: str
    tasks: int
    steps: int
    seed: int
    dtype: str
    device: str
    results: dict[str, Result]
    measure: str = TRAINING_LOSS
    meta_seeds: tuple[SeedResults, ...] = ()
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)
    jobs: int = 1
    kept: tuple[str, ...] = ()
    rules: FairRules | None = None
    every: int = 1

    @property
    def timed(self) -> bool:
        """Whether losses were measured so often that those at equal seconds can be told."""
        return LEAST_MEASURED * self.every <= self.steps or self.every == 1


def evaluate(
    family: TaskFamily,
    methods: Sequence[Method],
    tasks: int = 64,
    steps: int = 100,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    checkpoint: str = "none",
    progress: Callable[[str], None] | None = None,
    meta_seeds: Sequence[Seed] = (),
) -> Evaluation:
    """Runs methods on held-out tasks of a family, all from the same starts and with the same budget.

    Args:
        family: the task family; its first `tasks` tasks of the split `held-out` are used.
        methods: the methods to compare, already tuned.
        tasks: number of tasks.
        steps: gradient evaluations that each method may spend on each task.
        seed: the run's seed.
        dtype: dtype of the tasks; the family's own if not given.
        device: device to run on.
        checkpoint: name of the learned methods' checkpoint.
        progress: called with a method's name before it runs.
        meta_seeds: the learned methods of every meta-seed, if there are several; the chosen one, whose methods are in
            `methods`, has none here.

    Returns:
        The evaluation.

    Raises:
        EvaluationError: if there are no methods, tasks or steps, or two methods have the same name.

    Example:
        >>> from metateleport import load_family
        >>> from metateleport.evaluation import BASELINES
        >>> gd = BASELINES["gd"].make(lr=3e-4)
        >>> evaluation = evaluate(load_family("leaky_mlp", {"width": 4}), [gd], tasks=3, steps=5)
        >>> evaluation.results["gd"].trajectory.loss.shape
        (3, 6)
    """
    names = [method.name for method in methods]
    if not names or len(set(names)) < len(names):
        raise EvaluationError(f"an evaluation needs methods of different names; got {', '.join(names) or 'none'}")
    for what, count in (("tasks", tasks), ("steps", steps)):
        if count < 1:
            raise EvaluationError(f"an evaluation needs at least 1 of {what}, not {count}")
    if seed < 0:
        raise EvaluationError(f"the seed has to be at least 0, not {seed}")
    stack = family.stack(range(tasks), "held-out", seed, dtype, device)
    if meta_seeds and sum(not each.methods for each in meta_seeds) != 1:
        raise EvaluationError("one of several meta-seeds has to have no methods here: the one that `methods` belong to")
    results = _run(methods, stack, steps, progress, "")
    learned = {name: result for name, result in results.items() if name.partition("/")[0] == REFERENCE}
    of_seeds = []
    for each in meta_seeds:
        own = _run(each.methods, stack, steps, progress, f" of meta-seed {each.seed}") if each.methods else learned
        of_seeds.append(SeedResults(each.seed, each.validation, not each.methods, own))
    return Evaluation(
        family=family.name,
        settings=family.settings(),
        checkpoint=checkpoint,
        tasks=tasks,
        steps=steps,
        seed=seed,
        dtype=str(dtype or family.dtype).removeprefix("torch."),
        device=str(device),
        results=results,
        measure=measure_of(stack),
        meta_seeds=tuple(of_seeds),
    )


def _run(
    methods: Sequence[Method], stack: TaskStack, steps: int, progress: Callable[[str], None] | None, whose: str
) -> dict[str, Result]:
    results = {}
    for method in methods:
        if progress is not None:
            progress(method.name + whose)
        results[method.name] = result_of(method, run_once(method, stack, steps))
    return results


def measure_of(stack: TaskStack) -> str:
    """Name of the measure that the tasks of a stack are judged by."""
    return TRAINING_LOSS if stack.measure is None else stack.measure.name


def run_once(method: Method, stack: TaskStack, steps: int) -> Trajectory:
    """Runs a method on a stack of tasks, after a warm-up of two steps."""
    # The first steps of a process include imports and allocations, whichever method comes first.
    method.run(stack, min(2, steps))
    with reproducible(stack.device):
        return method.run(stack, steps)


def result_of(method: Method, trajectory: Trajectory) -> Result:
    """A method's result, from its trajectory."""
    return Result(trajectory, method.teleports, method.settings, method.tuning, method.moves_by, method.stacked)
