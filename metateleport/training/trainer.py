"""Meta-training: meta-steps over stacks of tasks, with a growing horizon and a checkpoint chosen on validation."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from metateleport.families import TaskFamily, TaskStack
from metateleport.families.task import Split
from metateleport.families.trial import check_second_order
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.training.distributed import ALONE, Ranks
from metateleport.training.estimators import Estimator, Truncated
from metateleport.training.evolution import Evolution
from metateleport.training.outer import EvolutionSettings, PersistentSettings, TruncatedSettings
from metateleport.training.progression import Progression, Snapshot
from metateleport.training.recipe import Recipe, TrainingError, device_for
from metateleport.training.scoring import Score, dealt, score
from metateleport.training.search import search_round
from metateleport.training.time_limit import steps_within
from metateleport.training.unroll import runs_blind

__all__ = ["MetaTrainer"]

_VALIDATION = (1, 0)
"""Seeds of the varied settings and of the tasks of a validation."""
_LOST = 0.1
"""Loss of validation score, relative to the best, beyond which training goes back to the best networks."""

_TRIAL = 1 / 3
"""Share of the run for which each start is tried."""

_VALIDATION_STACKS = 8
"""Number of stacks for the validation tasks, so that the score covers several of the varied settings."""


_SCORE_TIME = 0.1
"""Largest share of a limited time that one validation, or one round of the search, may take."""

_VALIDATION_TIME = 0.15
"""Largest share of a limited time that validations between meta-steps may take together, but for the first."""

_SEARCH_SCORES = 32
"""About how many scores a round of the search takes."""

_SEARCH_STACKS = 4
"""Stacks that the tasks of a round of the search are dealt out to."""


class MetaTrainer:
    """Trains one meta-optimizer.

    A meta-step is one window of inner steps on a stack of tasks, an estimate of the meta-gradient over it, and one step
    of Adam on the networks. A stack is followed for several windows. In a share of the windows, `blind`, the networks
    see no loss, as in a training loop that gives them none. Every few meta-steps the networks are scored on validation
    tasks, and the best are kept: meta-training wanders, and the last networks are not the best. Where it has wandered
    too far off it goes back to them, with a smaller step.

    The estimator is the recipe's (`metateleport.training.outer`): by default truncated windows that are differentiated
    through `higher`, whose number grows from one to `horizon / unroll` over the first half of the run.

    Several processes share the tasks of each stack. A task is drawn by its number, not by the process that it falls to,
    and all processes take the same meta-step, so their number changes results by rounding alone.

    With a `search` a phase without gradients comes first: the constants that the networks put out are searched on
    training tasks followed along the whole horizon (`metateleport.training.search.search_round`).

    Some initialisations lead into a poor optimum and never out of it, and a third of the run shows which. With several
    `starts` each is followed for so long, on the same tasks, and the best of them goes on.

    Args:
        recipe: the recipe.
        family: the task family.
        meta: the meta-optimizer; it is trained in place.
        seconds: seconds to train, in place of the recipe's, which several networks share; the starts share these.
        ranks: the processes that share the tasks.

    Attributes:
        clock: tells the seconds that the time is limited by.

    Raises:
        TrainingError: if there are more processes than tasks in a stack.
    """

    def __init__(
        self,
        recipe: Recipe,
        family: TaskFamily,
        meta: MetaOptimizer,
        seconds: float | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.family, self.ranks = recipe, family, ranks
        if recipe.outer.tasks < ranks.size:
            raise TrainingError(
                f"outer.tasks = {recipe.outer.tasks} is fewer than the {ranks.size} processes that share them: raise "
                "it or start fewer"
            )
        self.clock: Callable[[], float] = time.perf_counter
        self._unshared = self._validation_seconds = 0.0
        self.outer = outer = recipe.outer
        self.meta_steps = math.inf if outer.meta_steps is None else outer.meta_steps
        seconds = outer.seconds if seconds is None else seconds
        self.limit = None if seconds is None else seconds / (1 + (outer.starts - 1) * _TRIAL)
        self.device = device_for(outer.device)
        self.meta = meta.to(self.device)
        self.optimizer = torch.optim.Adam(self.meta.parameters(), lr=outer.lr)
        self.progression = Progression()
        self.best = copy.deepcopy(self.meta.state_dict())
        self.validation_openness = 0.0
        self.kept: Snapshot | None = None
        self.boundary = self.snapshot()

    @property
    def finished(self) -> bool:
        """Whether the number of meta-steps or the time is used up, but for that of the last validation."""
        done = self.progression
        if done.meta_step >= self.meta_steps or self.limit is None:
            return done.meta_step >= self.meta_steps
        validated = bool(done.validations) and done.validations[-1][0] == done.meta_step
        return done.seconds + (0.0 if validated else self._validation_seconds) >= self.limit

    @property
    def share(self) -> float:
        """Share of the run that is done, by meta-steps or by seconds, whichever is further."""
        share = self.progression.meta_step / self.meta_steps
        return min(1.0, share if self.limit is None else max(share, self.progression.seconds / self.limit))

    @property
    def share_of_all(self) -> float:
        """Share that is done of the run and of the starts tried before it."""
        starts, start = self.outer.starts, self.progression.start
        if starts == 1:
            return self.share
        before = min(start, starts - 1) * _TRIAL
        return (before + (self.share if start == starts else min(self.share, _TRIAL))) / (1 + (starts - 1) * _TRIAL)

    def run(self, report: Callable[[Progression], None] | None = None) -> None:
        """Trains until it is finished.

        When it is interrupted, `boundary` is the state before the stack that was under way: a run restored from it
        takes the same meta-steps as one that was never interrupted.

        Args:
            report: called after every meta-step.
        """
        done, self._unshared = self.progression, 0.0
        starts_well = self.outer.start_from is not None or self.recipe.rule.starts_well
        if starts_well and not done.validations:
            # The networks that training starts from are kept if it finds no better ones.
            started = self.clock()
            self._validate()
            self._spend(self.clock() - started)
        while not self.finished:
            self.boundary = self.snapshot()
            if len(done.searched) < self.outer.search:
                self._search_round()
                if report is not None:
                    report(done)
                continue
            estimator = self._estimator()
            for window in range(self.outer.windows(self.share)):
                started = self.clock()
                self._meta_step(estimator, runs_blind(self.outer.blind, self.outer.seed, done.stack, window))
                if self._validation_due:
                    self._validate()
                self._spend(self.clock() - started)
                if report is not None:
                    report(done)
                if self.finished or self._tried:
                    break
            done.stack += 1
            if self._tried:
                self._next_start()
                done = self.progression
        if not done.validations or done.validations[-1][0] != done.meta_step:
            self._validate()
        self.boundary = self.snapshot()

    def _search_round(self) -> None:
        """Searches once for better constants; after the last round they are validated."""
        done, outer, started = self.progression, self.outer, self.clock()
        number, first, tasks = len(done.searched), done.stack, outer.tasks
        parts = max(1, min(_SEARCH_STACKS, tasks))
        seeds = (outer.seed, outer.seed)
        candidates = int(np.random.SeedSequence([outer.seed, done.start, number]).generate_state(1)[0])
        found = search_round(
            self.meta,
            lambda: self._score(tasks, parts, first, "train", seeds).value,
            number,
            candidates,
        )
        done.searched.append(found)
        done.stack += parts
        if len(done.searched) == outer.search:
            self._validate()
        self._spend(self.clock() - started)

    def _spend(self, seconds: float) -> None:
        """Counts seconds; those of several processes once they have told each other, as time may end the training."""
        if self.ranks.alone:
            self.progression.seconds += seconds
        else:
            self._unshared += seconds

    @property
    def _tried(self) -> bool:
        """Whether the start under way has been tried for long enough."""
        several, left = self.outer.starts > 1, self.outer.starts - self.progression.start
        return several and left > 0 and self.share >= _TRIAL

    def _next_start(self) -> None:
        """Keeps the start that was tried if it is the best yet; begins the next one, or goes on with the best."""
        done = self.progression
        if not done.validations or done.validations[-1][0] != done.meta_step:
            self._validate()
        scores = [*done.starts, done.best]
        if done.best <= min(scores):
            self.kept = dataclasses.replace(self.snapshot(), kept=None)
        if len(scores) < self.outer.starts:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(np.random.SeedSequence([self.outer.seed, len(scores)]).generate_state(1)[0]))
                self.meta.load_state_dict(MetaOptimizer(self.meta.config).state_dict())
            self.optimizer = torch.optim.Adam(self.meta.parameters(), lr=self.outer.lr)
            self.best = copy.deepcopy(self.meta.state_dict())
            # The starts are compared with each other.
            self.progression = Progression(scored_steps=done.scored_steps)
        elif self.kept is not None:
            self.restore(self.kept)
        self.progression.start, self.progression.starts = len(scores), scores

    def snapshot(self) -> Snapshot:
        """Everything that a later run needs to go on as if there had been no interruption."""
        tensors = {f"meta/{name}": value for name, value in self.meta.state_dict().items()}
        tensors.update({f"best/{name}": value for name, value in self.best.items()})
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors.update({f"adam/{index}/{name}": value for name, value in state.items()})
        copies = {name: value.detach().clone().cpu() for name, value in tensors.items()}
        return Snapshot(copies, dataclasses.asdict(self.progression), self.kept)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from a snapshot.

        Raises:
            KeyError, RuntimeError: if the snapshot is of another meta-optimizer.
        """
        parts: dict[str, dict[str, Tensor]] = {"meta": {}, "best": {}, "adam": {}}
        for name, value in snapshot.tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        self.meta.load_state_dict(parts["meta"])
        self.best = {name: value.to(self.device) for name, value in parts["best"].items()}
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["adam"].items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.progression = Progression(**copy.deepcopy(snapshot.progression))
        self.kept = snapshot.kept
        self.boundary = snapshot

    def best_meta(self) -> MetaOptimizer:
        """The meta-optimizer that did best on the validation tasks."""
        # The initial weights are overwritten: they shall take no random numbers of the caller's.
        with torch.random.fork_rng(devices=[]):
            chosen = MetaOptimizer(self.meta.config)
        chosen.load_state_dict(self.best)
        return chosen.eval()

    def _estimator(self) -> Estimator:
        """The estimator on this process's part of the next stack."""
        number, outer, share = self.progression.stack, self.outer, self.ranks.share(self.outer.tasks)
        family = self.family.augmented(number, outer.seed)
        length = outer.length(number, self.share)
        total = outer.total(number, length)

        def stacked(indices: Sequence[int]) -> TaskStack:
            numbers = [number * outer.tasks + index for index in indices]
            return family.stack(numbers, "train", outer.seed, outer.torch_dtype, self.device)

        if isinstance(outer, TruncatedSettings):
            some = outer.tasks_at_once or len(share)
            stacks = [stacked(share[first : first + some]) for first in range(0, len(share), some)]
            if not self.progression.meta_step and not outer.first_order:
                check_second_order(stacks[0], stacks[0].batch(0))
            return Truncated(stacks, self.meta, outer, self.ranks, total)
        assert isinstance(outer, EvolutionSettings | PersistentSettings)
        # Each task stands there twice, once for each network of a pair.
        window = outer.window if isinstance(outer, PersistentSettings) else length
        return Evolution(stacked([*share, *share]), self.meta, outer, self.ranks, number, window, total)

    def _meta_step(self, estimator: Estimator, blind: bool) -> None:
        done = self.progression
        for group in self.optimizer.param_groups:
            group["lr"] = self.outer.lr * 0.7**done.returns * (0.55 + 0.45 * math.cos(math.pi * self.share))
        unshared, self._unshared = self._unshared, 0.0
        found = estimator.meta_gradient(blind, unshared)
        done.seconds += found.seconds
        norm = torch.nn.utils.clip_grad_norm_(self.meta.parameters(), self.outer.clip)
        done.meta_step += 1
        if bool(norm.isfinite()) and found.usable:
            self.optimizer.step()
        else:
            done.skipped += 1
        done.meta_losses.append(found.loss)
        if found.openness is not None:
            done.openness.append(found.openness)

    @property
    def _validation_due(self) -> bool:
        """Whether the networks are validated after this meta-step."""
        done = self.progression
        if done.meta_step % self.recipe.validation.every:
            return False
        if self.limit is None or not done.validations:
            return True
        # Seconds that all processes have told each other, and the first one's for a validation: all decide alike.
        return (len(done.validations) + 1) * self._validation_seconds <= _VALIDATION_TIME * done.seconds

    def _validate(self) -> None:
        done = self.progression
        self._scored_steps()
        started = self.clock()
        score = self.validation_score()
        if self.limit is not None:
            # All processes have to leave the same time for the last validation.
            took = self.clock() - started
            self._validation_seconds = max(self._validation_seconds, self.ranks.from_first(lambda: took))
        done.validations.append([done.meta_step, score])
        if score < done.best:
            done.best, done.best_step, done.best_openness = score, done.meta_step, self.validation_openness
            self.best = copy.deepcopy(self.meta.state_dict())
        elif score > done.best + max(1.0, _LOST * abs(done.best)):
            self._return()

    def _return(self) -> None:
        """Goes back to the best networks, with a smaller step and without what Adam has gathered on the way off."""
        self.progression.returns += 1
        self.meta.load_state_dict(self.best)
        self.optimizer = torch.optim.Adam(self.meta.parameters(), lr=self.outer.lr)

    def validation_score(self) -> float:
        """Mean log loss along the full horizon on validation tasks, over the settings that training varies.

        What teleports cost is added, and how far they were open is kept as `validation_openness`. The validation tasks
        are the same for every seed of the training, so that meta-seeds can be compared by it.
        """
        tasks = self.recipe.validation.tasks
        found = self._score(tasks, _parts(tasks), 0, "validation", _VALIDATION)
        self.validation_openness = found.openness
        return found.value

    def _score(self, tasks: int, parts: int, first: int, split: Split, seeds: tuple[int, int]) -> Score:
        stacks = dealt(self.family, self.outer, tasks, parts, first, split, seeds, self.ranks)
        count = parts * max(1, tasks // parts)
        return score(self.meta, stacks, self._scored_steps(), self.outer, parts, count, self.ranks)

    def _scored_steps(self) -> int:
        """Inner steps that scores follow their tasks for: the horizon, or as many as a limited time has room for.

        It is the same in the whole training, as scores along different numbers of steps cannot be compared.
        """
        done, outer = self.progression, self.outer
        if self.limit is None:
            return outer.horizon
        if not done.scored_steps:
            parts, scores = _parts(self.recipe.validation.tasks), _SEARCH_SCORES if outer.search else 1
            _, first = next(
                dealt(self.family, outer, self.recipe.validation.tasks, parts, 0, "validation", _VALIDATION)
            )
            seconds = _SCORE_TIME * self.limit / (parts * scores)
            done.scored_steps = self.ranks.from_first(
                lambda: steps_within(self.meta, first, outer.window, outer.horizon, seconds, self.clock)
            )
        return done.scored_steps


def _parts(tasks: int) -> int:
    """Number of stacks of a validation."""
    return max(1, min(_VALIDATION_STACKS, tasks // 2))
