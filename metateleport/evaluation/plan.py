"""The plan of an evaluation as plain values, and its runs, which any process can make and which are kept."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from metateleport.checkpoint import Checkpoint, load_checkpoint
from metateleport.checkpoint.seeds import each_meta_seed
from metateleport.evaluation.ablation import ablated_methods, parts_of
from metateleport.evaluation.fair import FairRules, goal_of, tune_fairly
from metateleport.evaluation.kept import KeptRun, KeptRuns
from metateleport.evaluation.methods.learned import learned_methods
from metateleport.evaluation.methods.registry import BASELINES, FAIR, RIVALS
from metateleport.evaluation.paired import REFERENCE
from metateleport.evaluation.run import (
    Evaluation,
    EvaluationError,
    Result,
    SeedResults,
    measure_of,
    result_of,
    run_once,
)
from metateleport.evaluation.trajectory import Method, every_so_often
from metateleport.evaluation.tuning import tune
from metateleport.evaluation.words import ABLATED
from metateleport.families import TaskFamily, TaskStack, load_family

__all__ = ["FOR_THE_END", "NO_CHECKPOINT", "Bench", "Done", "Plan", "Unit"]

NO_CHECKPOINT = "none"
"""The name given for a checkpoint if the rivals run alone."""

FOR_THE_END = "/end"
"""Suffix of the name of the rival that a target is taken from under fair rules: it is tuned for the end of the run, and
for the held-out loss there if the tasks have held-out data."""


class Unit(NamedTuple):
    """One run of an evaluation.

    Args:
        method: name of the method.
        seed: the meta-seed; None for rivals, and for the checkpoint's chosen meta-seed.
    """

    method: str
    seed: int | None = None

    def __str__(self) -> str:
        return self.method if self.seed is None else f"{self.method} of meta-seed {self.seed}"


class Done(NamedTuple):
    """The result of one run.

    Args:
        unit: the run.
        result: its trajectory and the method's settings.
        measure: name of the measure that tasks are judged by.
        jobs: number of processes that shared the machine when it ran.
        kept: whether an earlier call made the run.
    """

    unit: Unit
    result: Result
    measure: str
    jobs: int
    kept: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to evaluate, as plain values that every process gets.

    Args:
        task: name of the task family, or path of its file.
        settings: the family's settings, as text or values.
        checkpoint: folder or name of the checkpoint; `NO_CHECKPOINT` for the rivals alone.
        methods: names of the methods; None for all of the checkpoint and all rivals that run without being asked for.
        without: parts of the basis to leave out, in the form of `parts_of`.
        tasks: number of held-out tasks.
        steps: gradient evaluations that each method may spend on each task.
        seed: chooses the tasks.
        dtype: dtype of the tasks, as `float64`; None for the family's own.
        device: where to run.
        all_meta_seeds: run the learned methods of every meta-seed, not only of the chosen one.
        fresh: run and tune anew, ignoring what is kept.
        every: gradient evaluations between two measurements of a run's losses.
        rules: fair rules that rivals are tuned by; None for a grid that is searched until its best lies inside.
    """

    task: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: str = NO_CHECKPOINT
    methods: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    tasks: int = 64
    steps: int = 100
    seed: int = 0
    dtype: str | None = None
    device: str = "cpu"
    all_meta_seeds: bool = True
    fresh: bool = False
    every: int = 1
    rules: FairRules | None = None


class Bench:
    """Makes the runs of a plan in this process, or reads those that are kept.

    Args:
        plan: what to evaluate.

    Raises:
        FamilyError: if there is no such family, or a setting cannot work.
        CheckpointError: if the checkpoint cannot be loaded.
        EvaluationError: if a method is unknown or cannot run here, or no method is left.

    Example:
        >>> plan = Plan("leaky_mlp", {"width": 3}, "leaky_mlp", ("learned", "gd"), tasks=2, steps=3)
        >>> [str(unit) for unit in Bench(plan).units[:3]]
        ['gd', 'learned', 'learned of meta-seed 0']
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.family: TaskFamily = load_family(plan.task, plan.settings)
        none = plan.checkpoint == NO_CHECKPOINT
        self.checkpoint: Checkpoint | None = None if none else load_checkpoint(plan.checkpoint)
        self.learned, self.rivals = self._chosen()
        self._parts = self._left_out()

    @property
    def names(self) -> list[str]:
        """Names of the methods, in the order of tables."""
        return [*self.learned, *(ABLATED + part for part in self._parts), *self.rivals]

    @functools.cached_property
    def units(self) -> list[Unit]:
        """The runs; those of methods that may have to be tuned come first."""
        learned = [name for name in self.names if name not in self.rivals]
        seeds = [each.seed for each, own in zip(self._seeds, self._of_seeds, strict=True) if own is not self.checkpoint]
        return [
            *(Unit(name) for name in (*self.rivals, *learned)),
            *(Unit(name, seed) for seed in seeds for name in learned),
        ]

    def run(self, unit: Unit, progress: Callable[[str], None], jobs: int = 1) -> Done:
        """Makes one run and keeps it, or reads the one that is kept.

        Args:
            unit: the run.
            progress: called with a line that says what is running.
            jobs: number of processes that share the machine.
        """
        method = self._method(unit, progress)
        kept = None if self.plan.fresh else self._runs.get(method)
        run = kept
        if run is None:
            progress(f"{unit} on {self.plan.tasks} held-out tasks")
            with every_so_often(self.plan.every):
                run = KeptRun(run_once(method, self._stack, self.plan.steps), jobs)
            self._runs.put(method, run)
        return Done(unit, result_of(method, run.trajectory), measure_of(self._stack), run.jobs, kept is not None)

    def evaluation(self, done: Sequence[Done], threads: int) -> Evaluation:
        """The evaluation, from the results of all runs.

        Args:
            done: the result of every run of `units`.
            threads: number of threads of each run.
        """
        found = {each.unit: each.result for each in done}
        own = {name: found[Unit(name)] for name in self.names}
        learned = {name: result for name, result in own.items() if name.partition("/")[0] == REFERENCE}
        seeds = []
        for known, each in zip(self._seeds, self._of_seeds, strict=True):
            chosen = each is self.checkpoint
            results = learned if chosen else {name: found[Unit(name, known.seed)] for name in learned}
            seeds.append(SeedResults(known.seed, known.validation, chosen, results))
        plan = self.plan
        return Evaluation(
            family=self.family.name,
            settings=self.family.settings(),
            checkpoint=NO_CHECKPOINT if self.checkpoint is None else self.checkpoint.name,
            tasks=plan.tasks,
            steps=plan.steps,
            seed=plan.seed,
            dtype=str(self._dtype or self.family.dtype).removeprefix("torch."),
            device=plan.device,
            results=own,
            measure=done[0].measure,
            meta_seeds=tuple(seeds),
            threads=threads,
            jobs=max(each.jobs for each in done),
            rules=plan.rules,
            every=plan.every,
            kept=tuple(str(unit) for unit in self.units if any(each.kept for each in done if each.unit == unit)),
        )

    @functools.cached_property
    def _stack(self) -> TaskStack:
        plan = self.plan
        return self.family.stack(range(plan.tasks), "held-out", plan.seed, self._dtype, plan.device)

    @functools.cached_property
    def _runs(self) -> KeptRuns:
        return KeptRuns(self.family, self._stack, self.plan.steps, every=self.plan.every)

    @property
    def _dtype(self) -> torch.dtype | None:
        return None if self.plan.dtype is None else getattr(torch, self.plan.dtype)

    @property
    def _seeds(self) -> Sequence[Any]:
        """The meta-seeds whose learned methods are run; empty if there is only one."""
        if self.checkpoint is None or not self.learned or not self.plan.all_meta_seeds:
            return ()
        return self.checkpoint.meta_seeds

    @functools.cached_property
    def _of_seeds(self) -> list[Checkpoint]:
        return each_meta_seed(self.checkpoint) if self.checkpoint is not None and self._seeds else []

    def _method(self, unit: Unit, progress: Callable[[str], None]) -> Method:
        plan = self.plan
        if unit.method in self.rivals:
            rival, dtype, device = RIVALS[unit.method.removesuffix(FOR_THE_END)], self._dtype, plan.device
            told = lambda trial: progress(f"tuning {unit.method}: {trial}")  # noqa: E731
            if plan.rules is not None:
                return self._tuned_fairly(unit.method, plan.rules, told)
            return tune(rival, self.family, plan.steps, dtype, device, fresh=plan.fresh, progress=told)
        checkpoint = self.checkpoint
        if unit.seed is not None:
            places = [known.seed for known in self._seeds]
            checkpoint = self._of_seeds[places.index(unit.seed)]
        assert checkpoint is not None
        part = unit.method.removeprefix(ABLATED)
        if part in self._parts and unit.method.startswith(ABLATED):
            return ablated_methods(checkpoint, {part: self._parts[part]})[0]
        return learned_methods(checkpoint, [unit.method], plan.seed)[0]

    def _tuned_fairly(self, name: str, rules: FairRules, progress: Callable[[str], None]) -> Method:
        plan, dtype = self.plan, self._dtype
        rival = RIVALS[name.removesuffix(FOR_THE_END)]
        if name.endswith(FOR_THE_END):
            # Absurd step sizes can fit a few hundred samples exactly: nothing but such another reaches that loss.
            judged = self.family.task(0).held_out is not None
            rules = dataclasses.replace(rules, measure="held-out" if judged else "end", target=None)
        goal = None
        if rules.aims:
            reference, _, at = str(rules.target).rpartition("@")
            tuned = self._tuned_fairly(reference + FOR_THE_END, rules, progress)
            progress(f"the goal is the loss of {reference}, tuned for the end, at {at}")
            goal = goal_of(tuned, self.family, plan.steps, int(at), rules, dtype, plan.device)
        method = tune_fairly(
            rival, self.family, plan.steps, rules, goal, dtype, plan.device, fresh=plan.fresh, progress=progress
        )
        method.name = name
        return method

    def _fair(self) -> list[str]:
        """Names of the rivals that run under fair rules if no names are given."""
        symmetries = self.family.task(0).symmetries
        return [name for name, rival in FAIR.items() if rival.suits(symmetries)]

    def _chosen(self) -> tuple[list[str], list[str]]:
        """Names of the learned methods and of the rivals to run."""
        learned = [] if self.checkpoint is None else [each.name for each in learned_methods(self.checkpoint)]
        known = [*learned, *RIVALS]
        rules = self.plan.rules
        usual = BASELINES if rules is None else self._fair()
        wanted = [*learned, *usual] if self.plan.methods is None else self.plan.methods
        for name in wanted:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                where = "without a checkpoint" if self.checkpoint is None else f"for {self.checkpoint.name}"
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise EvaluationError(f"there is no method {name!r} {where}: there are {', '.join(known)}{meant}")
            missing = RIVALS[name].missing() if name in RIVALS else ""
            if missing:
                raise EvaluationError(f"{missing}; or name the methods to run, without it")
            if name in RIVALS and RIVALS[name].needs and not RIVALS[name].suits(self.family.task(0).symmetries):
                raise EvaluationError(
                    f"{name} needs tasks with a symmetry of the kind {RIVALS[name].needs!r}, and those of "
                    f"{self.family.name} have none: leave it out"
                )
        if not wanted:
            raise EvaluationError(f"the list of methods names none: there are {', '.join(known)}")
        rivals = [name for name in RIVALS if name in wanted]
        if rules is not None and rules.aims:
            reference = str(rules.target).rpartition("@")[0]
            if reference not in RIVALS:
                raise EvaluationError(
                    f"under fair rules a target is taken from a rival, and {reference!r} is none: {', '.join(RIVALS)}"
                )
            rivals = [reference + FOR_THE_END, *rivals]
        return [name for name in learned if name in wanted], rivals

    def _left_out(self) -> dict[str, tuple[str, ...]]:
        """For each part of the basis the generators to leave out."""
        if not self.plan.without:
            return {}
        if self.checkpoint is None:
            raise EvaluationError(
                "a run without a part of the basis needs a checkpoint, and 'none' is given: name a checkpoint"
            )
        if REFERENCE not in self.learned:
            raise EvaluationError(
                f"a run without a part of the basis is compared with {REFERENCE}: add {REFERENCE} to the methods"
            )
        return parts_of(self.plan.without, self.checkpoint.learned)
