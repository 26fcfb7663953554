"""The progress of a task: whether its last step is accepted, and scale-free features that every network reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metateleport.linalg import certain

__all__ = ["PROGRESS_FEATURES", "Progress", "Tolerance"]

PROGRESS_FEATURES = 5

_RESTLESS = 0.1
"""The rest is multiplied by the calm to this power at every evaluation.

If the loss falls by a fifth at every evaluation, the rest never reaches ten; if it falls by a tenth, the rest reaches
twelve and goes back to five; if it falls by a twentieth, the rest grows to nearly thirty.
"""


_USUAL_CALM = 0.5
"""The calm on minibatches whose losses are not known."""

_PATIENT = 3
"""After so many steps taken back in a row on minibatches the losses count as noisier than was thought."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far the loss of a minibatch may be above the running mean before a step is taken back.

    Args:
        spreads: allowed excess in units of the running deviation about the mean.
        share: allowed excess beyond that, as a share of the mean.
        memory: memory of the running mean.
        start: share of the first loss; below it no step is taken back.
        ceiling: multiple of the first loss; above it every step is taken back, as a running mean follows a loss that
            creeps up.
    """

    spreads: float = 3.0
    share: float = 0.1
    memory: float = 0.8
    start: float = 0.0
    ceiling: float = float("inf")


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of each task of a stack; tensors are `(tasks,)`.

    In an unroll its losses are cut from the graph, because networks read it as features.

    Args:
        time: number of evaluations seen.
        start: loss at the first evaluation.
        last: loss at the last accepted evaluation; on minibatches its running mean.
        spread: running root mean square of the loss about its mean; zero if every evaluation sees all data.
        gain: log of the last accepted loss over the one before.
        damping: factor on the step, at most one; falls when a step is taken back.
        rejected: number of steps taken back.
        accepted: whether the last evaluation was accepted.
        rest: for how many evaluations the loss on minibatches has been at rest, that is, has hardly fallen beside its
            spread. It decays while the loss falls, and is zero if every evaluation sees all data.
        row: number of evaluations in a row that were not accepted.
        seen: loss at the last evaluation, accepted or not.
        deterministic: whether every evaluation sees all data.
        known: whether the last evaluation's loss is known. If not, no step is taken back, and the features of the loss
            have the values that they have at the start of a task.
        total: number of steps of the run, where it is told.

    Example:
        >>> start = torch.tensor([1.0, 1.0])
        >>> progress, _ = Progress.begin(start).judge(start, deterministic=True)
        >>> progress, accepted = progress.judge(torch.tensor([0.5, 2.0]), deterministic=True)
        >>> accepted, progress.last
        (tensor([ True, False]), tensor([0.5000, 1.0000]))
    """

    time: int
    start: Tensor
    last: Tensor
    spread: Tensor
    gain: Tensor
    damping: Tensor
    rejected: Tensor
    accepted: Tensor
    rest: Tensor
    row: Tensor
    seen: Tensor
    deterministic: bool = True
    known: bool = True
    total: int | None = None

    @property
    def left(self) -> float:
        """The share of the run that is left before this step, where its length is told; else one."""
        return 1.0 if self.total is None else max(0.0, 1.0 - max(self.time - 1, 0) / self.total)

    @property
    def all_accepted(self) -> bool:
        """Whether all tasks are known to have accepted the last evaluation."""
        known = self.__dict__.get("_all_accepted")
        if known is None:
            # Cached, as the features are: on an accelerator each look at a number is a wait.
            known = self.__dict__["_all_accepted"] = certain(self.accepted)
        return known

    @classmethod
    def begin(cls, loss: Tensor) -> Progress:
        """The progress before the first evaluation is judged; its losses are given, `(tasks,)`."""
        zero, one = torch.zeros_like(loss), torch.ones_like(loss)
        return cls(0, loss, torch.full_like(loss, float("inf")), zero, zero, one, zero, one.bool(), zero, zero, loss)

    def map(self, function: Callable[[Tensor], Tensor]) -> Progress:
        """Applies `function` to every tensor."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return Progress(**{**values, **tensors})

    def judge(self, loss: Tensor, deterministic: bool, tolerance: Tolerance | None = None) -> tuple[Progress, Tensor]:
        """Decides which tasks accept the point that they stepped to, and updates the progress.

        On a fixed data set a step is accepted if the loss did not rise. On minibatches the loss on another batch is
        compared with the running mean, and an excess of some spreads is allowed. If a task is taken back again and
        again, its steps are soon damped to nearly nothing, so a high loss can only mean that the losses are noisier
        than was thought. From the third time on, as long as the losses do not rise further, they are included in the
        running mean and the spread, and the damping falls no further.

        Args:
            loss: the loss of the new point, `(tasks,)`.
            deterministic: whether every evaluation sees the same data.
            tolerance: on minibatches; the default one if not given.

        Returns:
            The new progress, and where the point is accepted, `(tasks,)`.
        """
        first = self.last.isinf()
        allowed = tolerance or Tolerance()
        above = allowed.spreads * self.spread + allowed.share * self.last.abs()
        bound = self.last if deterministic else self.last + above
        if allowed.start and not deterministic:
            bound = bound.maximum(allowed.start * self.start)
        if not deterministic and allowed.ceiling < float("inf"):
            bound = bound.minimum(allowed.ceiling * self.start.abs())
        accepted = loss.isfinite() & (first | (loss <= bound))
        # A first loss that is not finite does not count: the next one is the first.
        start = torch.where(first & accepted, loss, self.start)
        seen = torch.where(accepted, loss, self.last)
        before = torch.where(first, seen, self.last)
        if deterministic:
            last, spread = seen, self.spread
        else:
            kept, new = allowed.memory, 1 - allowed.memory
            last = torch.where(first, seen, kept * before + new * seen)
            deviation = torch.where(accepted, (seen - before).square(), self.spread.square())
            spread = (kept * self.spread.square() + new * deviation).sqrt()
        tiny = torch.finfo(loss.dtype).tiny
        gain = ((last.abs() + tiny).log() - (before.abs() + tiny).log()).clamp(-20, 20)
        gain = torch.where(last.isfinite(), gain, 0.0)
        row = torch.where(accepted, 0.0, self.row + 1)
        damped = self.damping * 0.3
        if not deterministic:
            # A loss that rises from one evaluation to the next is not noise.
            stuck = (row >= _PATIENT) & (loss <= self.seen)
            level = torch.where(stuck, loss, before)
            spread = torch.where(stuck, (kept * spread.square() + new * (level - before).square()).sqrt(), spread)
            last = torch.where(stuck, (before + level) / 2, last)
            start = torch.where(stuck, start.maximum(last), start)
            damped = torch.where(row > _PATIENT, self.damping, damped)
        damping = torch.where(accepted, (self.damping * 3).clamp_max(1.0), damped)
        rejected = self.rejected + (~accepted).to(loss.dtype)
        rest = self.rest if deterministic else (self.rest + 1) * _calm(spread, last) ** _RESTLESS
        after = dataclasses.replace(
            self,
            time=self.time + 1,
            start=start,
            last=last,
            spread=spread,
            gain=gain,
            damping=damping,
            rejected=rejected,
            accepted=accepted,
            rest=rest,
            deterministic=deterministic,
            known=True,
            row=row,
            seen=loss,
        )
        return after, accepted

    def unjudged(self) -> Progress:
        """The progress after an evaluation whose loss is not known; the point is accepted.

        Example:
            >>> Progress.begin(torch.ones(1)).unjudged().features()
            tensor([[0.0909, 0.0000, 0.0000, 0.0000, 1.0000]])
        """
        return dataclasses.replace(
            self,
            time=self.time + 1,
            damping=(self.damping * 3).clamp_max(1.0),
            accepted=torch.ones_like(self.accepted),
            known=False,
        )

    def features(self) -> Tensor:
        """Features of order one, `(tasks, PROGRESS_FEATURES)`."""
        known = self.__dict__.get("_features")
        if known is None:
            # Cached: every network of a step reads them, and the fields of a frozen dataclass do not change.
            known = self.__dict__["_features"] = self._made_features()
        return known

    def _made_features(self) -> Tensor:
        tiny = torch.finfo(self.last.dtype).tiny
        time = torch.full_like(self.last, self.time / (self.time + 10))
        if not self.known:
            none = torch.zeros_like(time)
            calm = torch.full_like(time, 1.0 if self.deterministic else _USUAL_CALM)
            return torch.stack((time, none, none, none, calm), -1)
        total = ((self.last.abs() + tiny).log() - (self.start.abs() + tiny).log()).clamp(-60, 60)
        calm = _calm(self.spread, self.last)
        return torch.stack((time, self.gain / 5, total / 20, self.damping.log() / 5, calm), -1)


def _calm(spread: Tensor, level: Tensor) -> Tensor:
    """One if a loss stays level, zero if it falls or if its spread is above its own size, `(tasks,)`."""
    return torch.exp(-spread / level.abs().clamp_min(torch.finfo(level.dtype).tiny))
