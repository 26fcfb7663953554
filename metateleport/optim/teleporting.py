"""Teleports inside an ordinary training loop: an optimizer around any other."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport._optim_checks import (
    check_kinds,
    check_parameters,
    check_symmetries,
    checked_state,
    try_symmetries,
)
from metateleport._optim_closure import known_at_first, scalar, scalar_or_none
from metateleport._optim_failures import Judge, held_out_loss
from metateleport._optim_loss import check_loss
from metateleport._optim_move import Moving
from metateleport.capture import PassRecorder, modules_of
from metateleport.detect import symmetries_of
from metateleport.detection import exact_symmetries
from metateleport.schedules import Schedule, schedule_of
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Teleporter, TeleportReport
from metateleport.teleporters.once import split_inputs

__all__ = ["TeleportingOptimizer"]

_NAN = float("nan")


class TeleportingOptimizer(Moving):
    r"""Teleports a model every few steps, and steps with any other optimizer.

    Before the steps that its schedule names, 0, `every`, 2 `every`, ... if no other is given, it moves the model along
    its symmetries, brings `p.grad` and the optimizer's state along, and then lets the optimizer step as ever. Parameter
    groups, defaults and state are the inner optimizer's own, so that learning-rate schedulers, `zero_grad`,
    `add_param_group`, `torch.amp.GradScaler` and step hooks work on the wrapper. The state dict is the inner
    optimizer's with one more entry, `teleporting`.

    What a teleport needs to know is caught by hooks on the model, during forward passes with gradients before a step
    that teleports. The loss has to depend on the parameters through the model's outputs only: a penalty on the
    weights themselves is no invariant (weight decay in the optimizer is what it is: a teleport changes
    $\tfrac12|w|^2$, and the report says by how much).

    **Gradients.** Under exact symmetries `p.grad` is a covector and is carried along, whatever was done to it: summed
    over several backward passes, clipped, unscaled by a `GradScaler`. Under batch-exact ones the part below the moved
    layer is rebuilt from the last forward pass, times whatever factor lies between that pass and `p.grad`; where
    there is no such factor (accumulated over several batches, clipped entry by entry) the teleport is refused.

    **Without symmetries.** Teleporters that evaluate the loss at other weights (level set, null space, gradient ascent
    on the sharpness) are given it at every step that teleports, `step(closure, loss=...)`, as a function of the model's
    outputs; it is evaluated on the caught pass. Those that need no symmetry find none, and move what the optimizer
    holds and has a gradient. `p.grad` then becomes the gradient at the new place, which the teleporter has evaluated,
    times the factor that lay between `p.grad` and the loss's gradient; where there is none, the teleport is refused.

    **State.** With `state="transport"` sums of gradients (momentum) are carried as the gradient is, and sums of squared
    gradients by squared coefficients: exact for momentum under exact symmetries and for squares under diagonal
    groups, else approximate; the report says so of each entry. What is of another kind (the preconditioners of Shampoo
    and SOAP) is kept, with a warning, and named in the report. L-BFGS remembers differences of flattened weights: it
    starts anew after a teleport (`reset`). A move along no symmetry is no group action, so that there is nothing to
    transport by: there `state` is `keep` or `reset`.

    **Refusals.** A teleport out of the teleporter's trust region, or with a drift above its `max_drift`, is refused:
    weights, gradients and state stay bit for bit as they were. What the teleporter itself remembers goes on.

    **Failures.** A report's `failures` name what was seen to go wrong: `no gain`, what the teleporter sought did not
    grow, or the loss fell no faster in the steps after the teleport than in those before it (the closure tells the
    loss; as every run slows down by itself, this is a sign and no proof); `worse held-out loss`, where `held_out` is
    given, right after the teleport or those steps later; `unstable element`, refused as too large, ill-conditioned, not
    finite or with too large a drift, or with outputs that lost half of their digits. What the steps have to show
    appears once they have been taken.

    **Cost.** A teleport that moves repeats the model's forward pass once to measure the drift, which counts a third,
    with the random numbers and buffers of the caught pass, that are left as they were; rebuilding adds another third
    and its share of a backward pass. The loss after a teleport is told to first order in the drift, from the
    gradient on the outputs, without another evaluation. The function `loss` is held against the closure at the weights
    as they are, a third; without symmetries its gradient there is taken too, an evaluation in all.

    Args:
        optimizer: the optimizer that steps.
        model: the model whose parameters it holds.
        teleporter: chooses the group elements. A learned one is moved to the model's device.
        symmetries: those to move along, in the order of the data flow; found in the model if not given. A teleporter
            that needs none takes no notice of them.
        every: number of steps from one teleport to the next; 10 if neither this nor a schedule is given.
        example_input: a tensor, a tuple of positional or a dict of keyword inputs. If given, the symmetries are tried
            on it at once, and it stands in where a step has had no forward pass.
        state: what becomes of the optimizer's state: `transport`, `keep` or `reset` (of the moved parameters). If not
            given it is transported along symmetries, and kept where the teleporter moves along none.
        schedule: says before which steps to teleport, instead of `every`: a `metateleport.Schedule`, or a function of
            the step's number.
        held_out: evaluates the loss on held-out data and returns it. It is called before and after each teleport and
            once more `window` steps later, without gradients, and is not counted in a report's evaluations.
        window: number of steps on either side of a teleport that failures are looked for in.

    Raises:
        TypeError: if the optimizer, the teleporter, the schedule or `held_out` is something else.
        ValueError: if `every`, `window` or `state` cannot be, the state is to be transported along no symmetry, the
            optimizer's parameters are not the model's, a symmetry moves what the optimizer does not hold or may not
            change, or one does not hold on the example.

    Example:
        >>> from metateleport.teleporters import RandomTeleporter
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1)).double()
        >>> inner = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        >>> optimizer = TeleportingOptimizer(inner, model, RandomTeleporter(seed=0), every=5)
        >>> x = torch.ones(4, 3).double()
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        >>> len(optimizer.reports), optimizer.last_report.drift < 1e-12
        (2, True)
        >>> from metateleport.teleporters import LevelSetTeleporter
        >>> optimizer = TeleportingOptimizer(inner, model, LevelSetTeleporter(steps=2))
        >>> def loss(outputs):
        ...     return outputs.square().mean()
        >>> optimizer.zero_grad()
        >>> loss(model(x)).backward()
        >>> optimizer.step(loss=loss)
        >>> optimizer.last_report.gain > 0, optimizer.last_report.drift < 1e-2, optimizer.last_report.state
        (True, True, 'keep')

    Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 3, for teleporting between steps.
    """

    REPORTS = 1000
    """How many of the latest reports are kept."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        teleporter: Teleporter,
        symmetries: Sequence[Symmetry] | None = None,
        every: int | None = None,
        example_input: Any = None,
        state: str | None = None,
        schedule: Schedule | Callable[[int], bool] | None = None,
        held_out: Callable[[], Any] | None = None,
        window: int = 10,
    ) -> None:
        check_kinds(optimizer, teleporter, held_out, window)
        self.state_mode = checked_state(state, optimizer, teleporter)
        self.schedule = schedule_of(every, schedule)
        self.optimizer, self.model, self.teleporter = optimizer, model, teleporter
        if not teleporter.needs_symmetries:
            symmetries = ()
        elif symmetries is None and example_input is None:
            symmetries = symmetries_of(model)
        elif symmetries is None:
            held = {id(value) for group in optimizer.param_groups for value in group["params"]}
            names = {name for name, value in model.named_parameters() if id(value) in held}
            found = exact_symmetries(model, example_input, buffers=False)
            symmetries = [each for each in found if names.issuperset(each.parameters)]
        self.symmetries = tuple(symmetries)
        self.example_input, self.held_out = example_input, held_out
        check_parameters(optimizer.param_groups, model)
        if teleporter.needs_symmetries:
            check_symmetries(self.symmetries, optimizer, model)
        if isinstance(teleporter, nn.Module):
            teleporter.to(next(model.parameters()).device)
        self.steps = 0
        self.reports: collections.deque[TeleportReport] = collections.deque(maxlen=self.REPORTS)
        self._teleporter_state: Any = None
        self._loaded_state: Any = None
        self._warned: set[str] = set()
        self._judge = Judge(window)
        self._fresh_schedule = self.schedule.state_dict()
        self._due = self.schedule.due(0)
        self._watch: PassRecorder | None = None
        self._set_up()
        if example_input is not None:
            assert self._watch is not None
            limit = teleporter.trust_region.max_drift
            try:
                try_symmetries(self._watch, self.symmetries, *split_inputs(example_input), limit)
            except BaseException:
                self.remove_hooks()
                raise

    def _set_up(self) -> None:
        self._become_an_optimizer()
        seen = (*modules_of(self.symmetries), *self.teleporter.watches(self.model))
        self._watch = PassRecorder(self.model, dict.fromkeys(seen))
        self._watch.wanted = self._due

    def __getstate__(self) -> dict[str, Any]:
        kept = {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_watch", "step", "_zero_grad_profile_name") and not name.endswith("_hooks")
        }
        return {**kept, "_teleporter_state": None, "_loaded_state": self._saved_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    @property
    def last_report(self) -> TeleportReport | None:
        """The report of the last teleport; None before the first."""
        return self.reports[-1] if self.reports else None

    def __repr__(self) -> str:
        return f"TeleportingOptimizer(schedule={self.schedule}, teleporter={self.teleporter.name}, {self.optimizer!r})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of the model's parameters to the inner optimizer.

        Raises:
            ValueError: if they are not the model's.
        """
        if isinstance(param_group, dict) and not isinstance(param_group["params"], Tensor):
            param_group = {**param_group, "params": list(param_group["params"])}
        check_parameters([param_group], self.model)
        super().add_param_group(param_group)

    def remove_hooks(self) -> None:
        """Takes the hooks off the model; from then on steps are the inner optimizer's alone."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def step(self, closure: Callable[[], Any] | None = None, loss: Callable[[Any], Tensor] | None = None) -> Any:
        """Teleports if it is time, then steps.

        Args:
            closure: clears the gradients, evaluates the model, calls `backward()` and returns the loss. On a step that
                teleports it is evaluated once before the teleport; the inner optimizer gets that loss, and evaluates
                it again only after having changed the weights (L-BFGS). Without a closure the teleport starts from
                the last forward pass and `p.grad` as it is.
            loss: maps the model's outputs to the loss of the last forward pass, for teleporters that evaluate it at
                other weights; it has to be the closure's loss.

        Returns:
            The loss that the step started from, which is the closure's, or where a teleport without symmetries led;
            None without a closure.

        Raises:
            TypeError: if `loss` is no function.
            ValueError: if it is time to teleport and the teleporter needs `loss` and there is none, or it is not the
                closure's.
            RuntimeError: if it is time to teleport and there was no forward pass to start from, or no backward pass
                for a teleporter that looks at gradients.
        """
        again = closure
        if self._watch is not None and self._due:
            check_loss(self.teleporter, loss)
            value = None
            if closure is not None:
                self._watch.clear()
                with torch.enable_grad():
                    value = closure()
            self._judge_last()
            report = self._teleport(self._watch, None if value is None else scalar(value), loss)
            self.reports.append(report)
            self._watch.clear()
            self._judge.start()
            # Nothing that the inner optimizer evaluates is wanted.
            self._watch.wanted = False
            if closure is not None:
                if report.size > 0 and not self.teleporter.needs_symmetries:
                    assert value is not None
                    value = value + (report.loss_after - report.loss_before)
                again = known_at_first(closure, value, self.param_groups)
        try:
            result = self.optimizer.step() if again is None else self.optimizer.step(again)
            if self._watch is not None:
                self._look_back(None if closure is None else scalar_or_none(result))
            self.steps += 1
            self._due = self.schedule.due(self.steps)
        finally:
            if self._watch is not None:
                self._watch.wanted = self._due
        return result

    def _look_back(self, loss: Tensor | None) -> None:
        self._judge.see(loss)
        if self._judge.ripe:
            self._judge_last()
        norm = _NAN
        if self.schedule.needs_gradient_norm:
            gradients = [each.grad for group in self.param_groups for each in group["params"] if each.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients)) if gradients else _NAN
        self.schedule.observe(self.steps, norm, teleported=self._due)

    def _judge_last(self) -> None:
        if self.reports:
            self.reports[-1] = self._judge.verdict(self.reports[-1], lambda: held_out_loss(self.held_out, self.model))
