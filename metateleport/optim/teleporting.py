"""Teleports inside an ordinary training loop: an optimizer that wraps any other."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.capture import PassRecorder, modules_of, unwrapped
from metateleport.linalg import without_autocast
from metateleport.optim.checks import (
    check_fit,
    check_kinds,
    check_parameters,
    check_symmetries,
    checked_state,
    found_symmetries,
    is_averaged,
    try_symmetries,
)
from metateleport.optim.closure import known_at_first, scalar_or_none, told_loss
from metateleport.optim.judge import Judge, held_out_loss
from metateleport.optim.loss import Known, check_loss, know_loss
from metateleport.optim.orbit import Orbit, travel_along
from metateleport.optim.replicas import all_agree, all_can, check_replicas, chosen_by_first, group_of
from metateleport.optim.saved import OWN, merged, plain, restored, sources_of, without
from metateleport.optim.schedules import Schedule, schedule_of
from metateleport.optim.start import Consequences, NothingSeen, Start, consequences_of, pass_to_start_from, start_of
from metateleport.optim.state import cannot_carry, carry_state
from metateleport.optim.wrapper import Wrapping
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move, Teleporter, TeleportReport, failures_of, gain_of, travel
from metateleport.teleporters.once import gradient_norm, half_squared_norm, moved_names, now, split_inputs, summary_of
from metateleport.teleporters.report import not_made

__all__ = ["TeleportingOptimizer"]

_NAN = float("nan")


class TeleportingOptimizer(Wrapping):
    r"""Teleports a model every few steps and takes the steps with any other optimizer.

    Before the steps that its schedule names (by default 0, `every`, 2 `every`, ...) it moves the model along its
    symmetries, carries `p.grad` and the optimizer's state along, and then lets the inner optimizer step. Parameter
    groups, defaults and state are the inner optimizer's own, so learning-rate schedulers, `zero_grad`,
    `add_param_group`, `torch.amp.GradScaler` and step hooks work on the wrapper. The state dict is the inner
    optimizer's with one more entry, `teleporting`.

    Hooks on the model record the forward passes with gradients before a step that teleports. The loss has to depend on
    the parameters through the model's outputs only: a penalty on the weights themselves is not invariant. Weight decay
    in the optimizer is allowed; a teleport changes $\tfrac12|w|^2$, and the report says by how much.

    **Gradients.** Under exact symmetries `p.grad` is carried along as a covector, whatever was done to it: summed over
    several backward passes, clipped, unscaled by a `GradScaler`. Under batch-exact symmetries the part of it below the
    moved layer is rebuilt from the last forward pass, times the factor between that pass's gradient and `p.grad`. If
    there is no such factor (gradients accumulated over several batches, or clipped entry by entry), the teleport is
    refused.

    **Without symmetries.** Some teleporters evaluate the loss at other weights: level set, null space, gradient ascent
    on the sharpness. They need `step(closure, loss=...)` at every step that teleports, where `loss` is a function of
    the model's outputs; it is evaluated on the recorded pass. Teleporters that need no symmetries move all parameters
    that the optimizer holds and that have a gradient. `p.grad` then becomes the gradient at the arrival, which the
    teleporter has evaluated, times the factor between `p.grad` and the loss's gradient at the start; if there is no
    such factor, the teleport is refused.

    If the loss or a gradient is not finite, or the batch is empty, the teleport is refused, and the inner optimizer
    steps as it would alone.

    **Where it may go.** All teleports together stretch, shrink or unbalance nothing by more than `max_stretch`: an
    element that would lead further is shortened to the bound. Each report tells how far all teleports have led.
    Nothing moves along a symmetry with a tensor that is frozen now, or with a module that did not run in the last pass;
    the other symmetries are used.

    **State.** With `state="transport"` sums of gradients (momentum) are carried as the gradient is, and sums of squared
    gradients by squared coefficients. That is exact for momentum under exact symmetries and for squares under diagonal
    groups, else approximate; the report says which for each entry. Entries of other kinds (the preconditioners of
    Shampoo and SOAP) are kept, with a warning, and the report names them. L-BFGS remembers differences of flattened
    weights, so it starts anew after a teleport (`reset`). A move along no symmetry has no group element to transport
    by: there `state` is `keep` or `reset`. Copies of weights in the state (the averages of schedule-free optimizers,
    the slow weights of Lookahead) move as the weights do, whatever `state` is, along exact symmetries; along others the
    teleport is refused.

    **Averages of weights** outside the optimizer (`torch.optim.swa_utils.AveragedModel`, EMA): a mean of two points of
    an orbit is not on the orbit. So average between teleports only: start a new average after each `last_report` with
    a size above zero, or end teleports before averaging begins (`schedule=metateleport.optim.AtSteps([0])`).

    **Wrapped models.** The model may be wrapped in `nn.DataParallel`, `DistributedDataParallel` or `torch.compile`,
    before or after it is given here. Names are those of the model inside. Hooks inside a compiled model never run, so
    there the pass is repeated once without compilation before each teleport. Under `DistributedDataParallel` the first
    process chooses the elements and all processes carry them out, along exact symmetries.

    **Refusals.** A teleport outside the teleporter's trust region, or with a drift above its `max_drift`, is refused:
    weights, gradients and the optimizer's state stay bit for bit as they were. The teleporter's own state goes on.

    **Failures.** A report's `failures` name what went wrong:

    - `no gain`: the teleporter's objective did not improve, or the loss fell no faster in the steps after the teleport
      than in those before it, as told by the closure. Every run slows down by itself, so this is a sign and no proof.
    - `worse held-out loss`: `held_out` rose, right after the teleport or `window` steps later.
    - `unstable element`: it was refused as too large, ill-conditioned, not finite or with too large a drift; or the
      outputs lost half of their digits.

    Failures that show in the steps after a teleport are added to its report once those steps are taken.

    **Cost.** A teleport that moves repeats the model's forward pass once to measure the drift, which counts a third of
    a gradient evaluation; it uses the recorded pass's random numbers and buffers and leaves the current ones as they
    are. Rebuilding adds another third and its share of a backward pass. The loss after a teleport is reported to first
    order in the drift, from the gradient on the outputs, without another evaluation. The function `loss` is compared
    with the closure's loss at the current weights, for a third; without symmetries its gradient is evaluated there too,
    which makes one evaluation in all.

    Args:
        optimizer: the optimizer that steps.
        model: the model whose parameters it holds.
        teleporter: chooses the group elements. A learned one is moved to the model's device.
        symmetries: the symmetries to move along, in the order of the data flow; found in the model if not given. A
            teleporter that needs no symmetries ignores them.
        every: number of steps from one teleport to the next; 10 if neither this nor a schedule is given.
        example_input: a tensor, a tuple of positional or a dict of keyword inputs. With it the symmetries of any model
            are found and certified; given symmetries are tried on it at once. If a step had no forward pass, the
            teleport starts from a pass on it.
        state: how a teleport treats the optimizer's state: `transport`, `keep` or `reset` (of the moved parameters).
            By default it is transported along symmetries, and kept if the teleporter moves along none.
        schedule: says before which steps to teleport, instead of `every`: a `metateleport.optim.Schedule`, or a
            function of the step's number.
        held_out: evaluates the loss on held-out data and returns it. It is called before and after each teleport and
            once more `window` steps later, without gradients, and is not counted in a report's evaluations.
        window: number of steps before and after a teleport in which failures are looked for.
        max_stretch: the largest factor by which all teleports together may stretch, shrink or unbalance anything; None
            for no bound.

    Raises:
        TypeError: if the optimizer, the teleporter, the schedule or `held_out` is of another type.
        ValueError: if `every`, `window`, `max_stretch` or `state` is out of range; the state is to be transported but
            the teleporter moves along no symmetry; the optimizer's parameters are not the model's or are sharded over
            processes; no symmetry is found or given; the teleporter has no network for the group of any of them; a
            symmetry moves a parameter that is frozen or that the optimizer does not hold; or one does not hold on the
            example input.

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
    """Number of reports that are kept; the latest ones."""

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
        max_stretch: float | None = 10.0,
    ) -> None:
        check_kinds(optimizer, teleporter, held_out, window)
        self.state_mode = checked_state(state, optimizer, teleporter)
        self.schedule = schedule_of(every, schedule)
        self._orbit = Orbit(max_stretch)
        self.optimizer, self.model, self.teleporter = optimizer, model, teleporter
        check_parameters(optimizer.param_groups, model)
        given = symmetries is not None and teleporter.needs_symmetries
        if not teleporter.needs_symmetries:
            symmetries = ()
        elif symmetries is None:
            symmetries = found_symmetries(unwrapped(model)[0], optimizer, example_input)
        self.symmetries = tuple(symmetries)
        self.example_input, self.held_out = example_input, held_out
        if teleporter.needs_symmetries:
            check_symmetries(self.symmetries, optimizer, self._named_model())
            check_fit(teleporter, self.symmetries, given)
        if group_of(model) is not None and check_replicas(teleporter, self.symmetries):
            raise ValueError(check_replicas(teleporter, self.symmetries))
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
        self._recorder: PassRecorder | None = None
        self._set_up()
        # Symmetries that were found are certified already.
        if example_input is not None and given:
            assert self._recorder is not None
            limit = teleporter.trust_region.max_drift
            try:
                try_symmetries(self._recorder, self.symmetries, *split_inputs(example_input), limit)
            except BaseException:
                self.remove_hooks()
                raise

    def _named_model(self) -> nn.Module:
        """The model whose parameter names the symmetries use: the one inside the wrappers, unless the symmetries were
        made with the wrappers' names."""
        inner = unwrapped(self.model)[0]
        named = dict(inner.named_parameters())
        outside = any(name not in named for each in self.symmetries for name in each.parameters)
        return self.model if outside else inner

    def _set_up(self) -> None:
        self._become_an_optimizer()
        seen = (*modules_of(self.symmetries), *self.teleporter.watches(unwrapped(self.model)[0]))
        self._recorder = PassRecorder(self.model, seen)
        self._recorder.wanted = self._due

    def __getstate__(self) -> dict[str, Any]:
        kept = {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_recorder", "step", "_zero_grad_profile_name") and not name.endswith("_hooks")
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
        """Takes the hooks off the model; from then on there are no teleports, only the inner optimizer's steps."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    # --- stepping ----------------------------------------------------------------------------------------------------

    def step(
        self, closure: Callable[[], Any] | None = None, loss: Callable[[Any], Tensor] | Tensor | float | None = None
    ) -> Any:
        """Teleports if a teleport is due, then steps.

        Args:
            closure: clears the gradients, evaluates the model, calls `backward()` and returns the loss. On a step that
                teleports it is called once before the teleport. The inner optimizer gets that loss, and the closure is
                called again only after the weights have changed (L-BFGS). Without a closure the teleport starts from
                the last forward pass that has had a backward pass, and from `p.grad` as it is.
            loss: a function from the model's outputs to the loss of the last forward pass, for teleporters that
                evaluate the loss at other weights; it has to be the closure's loss. For other teleporters it may be
                the value of the loss, if there is no closure.

        Returns:
            The loss that the step started from: the closure's or, after a teleport without symmetries, the loss where
            it led. None without a closure.

        Raises:
            TypeError: if `loss` is not a function and the teleporter needs one.
            ValueError: if a teleport is due and needs `loss`, and it is missing or not the closure's.
        """
        if closure is None and self._only_sets_up():
            return self.optimizer.step()
        again = closure
        if self._recorder is not None and self._due:
            check_loss(self.teleporter, loss)
            value: Any = None if callable(loss) else loss
            if closure is not None:
                self._recorder.renew()
                with torch.enable_grad():
                    value = closure()
            self._judge_last()
            function = loss if callable(loss) else None
            try:
                with without_autocast(self.model.parameters()):
                    report = self._teleport(self._recorder, told_loss(value), function)
            except NothingSeen as error:
                self._warn_once(str(error))
                report = not_made(self.teleporter.name, str(error), self.state_mode)
            self.reports.append(report)
            self._recorder.clear()
            self._judge.start()
            # Passes that the inner optimizer evaluates are not recorded.
            self._recorder.wanted = False
            if closure is not None:
                if report.size > 0 and not self.teleporter.needs_symmetries:
                    assert value is not None
                    value = value + (report.loss_after - report.loss_before)
                again = known_at_first(closure, value, self.param_groups)
        try:
            result = self.optimizer.step() if again is None else self.optimizer.step(again)
            if self._recorder is not None:
                told = loss if closure is None and not callable(loss) else result
                self._look_back(scalar_or_none(told))
            self.steps += 1
            self._due = self.schedule.due(self.steps)
        finally:
            if self._recorder is not None:
                self._recorder.wanted = self._due
        return result

    def _only_sets_up(self) -> bool:
        """Whether this step only makes the state's entries, as `torch.distributed.checkpoint` does before it saves:
        no backward pass, zero gradients and zero step sizes."""
        if self.optimizer.state or (self._recorder is not None and self._recorder.reached):
            return False
        if any(bool(torch.as_tensor(group.get("lr", 1.0) != 0)) for group in self.param_groups):
            return False
        gradients = [each.grad for group in self.param_groups for each in group["params"] if each.grad is not None]
        return bool(gradients) and not any(bool(each.any()) for each in gradients)

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

    # --- one teleport ------------------------------------------------------------------------------------------------

    def _teleport(
        self, recorder: PassRecorder, told: Tensor | None, loss: Callable[[Any], Tensor] | None
    ) -> TeleportReport:
        recorded = pass_to_start_from(recorder, self.example_input)
        named = dict(self._named_model().named_parameters())
        begun = self._allowed_from(recorder, start_of(recorder, recorded, named, self.symmetries, told), named)
        point, free, reason = begun.point, not self.teleporter.needs_symmetries, begun.reason
        if self.teleporter.needs_gradient and not point.gradients:
            raise NothingSeen(
                f"{type(self.teleporter).__name__} looks at gradients and there are none: call backward() before step()"
            )
        known = Known(point)
        if not reason and self.teleporter.needs_loss:
            assert loss is not None
            known = know_loss(recorder, recorded, point, loss, named, self.param_groups, free)
        start, reason = known.point, reason or known.reason
        arrived, moves, seconds = start, list[Move](), _NAN
        if not reason:
            began = now(self._device)
            arrived, moves, reason = self._travel(recorder, start, begun.symmetries, told)
            seconds = now(self._device) - began
        size, sizes, refused, evaluations = summary_of(moves)
        moved, found = size > 0 and not reason, Consequences()
        reason = "; ".join(filter(None, (reason, refused, *begun.left_out))) if reason not in begun.left_out else reason
        if moved:
            found = consequences_of(recorder, recorded, start, arrived, self.teleporter)
            broken = found.reason
            if recorder.replicas is not None and not all_agree(not broken, recorder.replicas, self._device):
                broken = broken or "another replica refused it"
            moved, reason = not broken, broken or reason
            if not moved:
                self._teleporter_state = self.teleporter.refused(self._teleporter_state)
        accepted = moved or not reason
        if not moved and not reason:
            reason = "the teleporter chose to stay where it is"
        if free:
            fresh = {name: known.factor * value for name, value in arrived.gradients.items()}
            arrived = arrived.replace(gradients=fresh)
        held_out = held_out_loss(self.held_out, self.model)
        names = moved_names([move.symmetry for move in moves])
        here = arrived if moved else point
        loss_before = _NAN if start.loss is None else float(start.loss)
        norm, lighter = gradient_norm(point), 0.0
        if moved:
            lighter = half_squared_norm(here.parameters, names) - half_squared_norm(point.parameters, names)
        report = TeleportReport(
            teleporter=self.teleporter.name,
            accepted=accepted,
            reason=reason,
            loss_before=loss_before,
            loss_after=loss_before + (found.loss_change if moved else 0.0),
            drift=found.drift if moved else 0.0,
            gradient_norm_before=norm,
            gradient_norm_after=gradient_norm(here) if moved else norm,
            size=size if moved else 0.0,
            sizes=self._sizes(moves) if moved else tuple(0.0 for _ in (self.symmetries or sizes)),
            weight_decay_change=lighter,
            evaluations=evaluations + known.evaluations + recorded.replays / 3,
            state=self.state_mode,
            seconds=seconds,
            gain=gain_of(moves) if moved else _NAN,
            held_out_before=held_out,
            held_out_after=held_out,
        )
        if moved:
            report = self._carry_out(report, named, moves, point, start, arrived)
        eps = max((torch.finfo(each.dtype).eps for each in recorded.outputs), default=0.0)
        both = report.held_out_before, report.held_out_after
        return dataclasses.replace(
            report,
            failures=failures_of(moves, found.drift, found.broken, eps, both),
            stretch=self._orbit.stretch(self.symmetries),
        )

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _sizes(self, moves: Sequence[Move]) -> tuple[float, ...]:
        """Sizes in the order of all symmetries; zero for those that were left out."""
        if not self.symmetries:
            return tuple(float(move.size) for move in reversed(moves))
        own = {move.symmetry.key: float(move.size) for move in moves}
        return tuple(own.get(symmetry.key, 0.0) for symmetry in self.symmetries)

    def _allowed_from(self, recorder: PassRecorder, begun: Start, named: dict[str, nn.Parameter]) -> Start:
        """Leaves out symmetries that some replica cannot use, and refuses a teleport that the state cannot follow."""
        symmetries = None if not self.teleporter.needs_symmetries else begun.symmetries
        reason = begun.reason or cannot_carry(self.optimizer, named, symmetries)
        group = recorder.replicas = group_of(self.model) or recorder.replicas
        if group is not None:
            usable = all_can([each in begun.symmetries for each in self.symmetries] + [not reason], group, self._device)
            if not usable[-1]:
                reason = reason or "another replica cannot teleport from its batch"
            kept = tuple(each for each, can in zip(self.symmetries, usable[:-1], strict=True) if can)
            begun = begun._replace(symmetries=kept)
            reason = reason or check_replicas(self.teleporter, kept)
        for text in begun.left_out:
            self._warn_once(f"not moved along for now: {text}")
        return begun._replace(reason=reason)

    def _travel(
        self, recorder: PassRecorder, start: Point, symmetries: Sequence[Symmetry], told: Tensor | None
    ) -> tuple[Point, list[Move], str]:
        """Where the teleporter leads, within `max_stretch`, and its moves; or a sentence that says why it cannot go."""
        with torch.no_grad():
            before = self._teleporter_state
            try:
                arrived, moves, self._teleporter_state = travel(
                    self.teleporter, start, symmetries, self._state_at(start, symmetries, told)
                )
            except torch.linalg.LinAlgError as error:
                self._teleporter_state = before
                if recorder.replicas is not None:
                    raise
                return start, [], f"the teleporter could not choose an element ({error})"
            if not self.teleporter.needs_symmetries:
                reason = self._orbit.unbalanced(start, arrived)
                if reason:
                    self._warn_once(
                        f"all teleports together have come to the bound max_stretch={self._orbit.max_stretch:g}: those "
                        "that lead beyond it are refused"
                    )
                return (start, [], reason) if reason else (arrived, moves, "")
            if recorder.replicas is not None:
                moves = chosen_by_first(moves, recorder.replicas)
                arrived, moves = travel_along(self.teleporter, start, moves, {})
            proposed, reason, held_back = moves, "", False
            for share in (1.0, 0.5):
                shorter = self._orbit.shortened(proposed, share)
                if shorter:
                    arrived, moves = travel_along(self.teleporter, start, proposed, shorter)
                reason = self._orbit.unbalanced(start, arrived)
                held_back = held_back or bool(shorter) or bool(reason)
                if not reason:
                    break
        if held_back:
            self._warn_once(
                f"all teleports together have come to the bound max_stretch={self._orbit.max_stretch:g} on how far "
                "they may stretch or unbalance anything: they are shortened or refused from now on"
            )
        if held_back and not any(bool(move.size > 0) for move in moves):
            reason = reason or "all teleports together are at the bound max_stretch"
        return arrived, moves, reason

    def _carry_out(
        self,
        report: TeleportReport,
        named: dict[str, nn.Parameter],
        moves: Sequence[Move],
        point: Point,
        start: Point,
        arrived: Point,
    ) -> TeleportReport:
        """Writes weights, gradients and the inner optimizer's state."""
        with torch.no_grad():
            # The state first: the point where the teleport started shares its memory with the weights.
            done = carry_state(self.optimizer, self.state_mode, named, moves, start, self._warned)
            self._orbit.go(moves if self.symmetries else (), start, arrived)
            for name, parameter in named.items():
                if arrived.parameters[name] is not start.parameters[name]:
                    parameter.copy_(arrived.parameters[name])
                if name in point.gradients and arrived.gradients[name] is not point.gradients[name]:
                    assert parameter.grad is not None
                    parameter.grad.copy_(arrived.gradients[name])
        # Rarely, as the test reads all objects in memory.
        if len(self.reports) in (0, 10, 100) and is_averaged(self.model):
            self._warn_once(
                "an AveragedModel averages the weights of this model: a mean of weights before and after a teleport is "
                "on no orbit. Start it anew after a report with a size above zero, or end teleports before averaging"
            )
        return dataclasses.replace(
            report,
            state=done.summary,
            state_entries=done.entries,
            held_out_after=held_out_loss(self.held_out, self.model),
        )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=6)

    # --- what is remembered ------------------------------------------------------------------------------------------

    def _state_at(self, point: Point, symmetries: Sequence[Symmetry], loss: Tensor | None) -> Any:
        fresh = self.teleporter.initial_state(point, symmetries)
        if self._teleporter_state is None and self._loaded_state is not None:
            # Symmetries that are left out now may be used later: their saved state is kept.
            later = {each.key for each in self.symmetries} - {each.key for each in symmetries}
            self._teleporter_state = restored(fresh, without(self._loaded_state, later), OWN)
            self._loaded_state = None
        state = merged(fresh, self._teleporter_state) if self._teleporter_state is not None else fresh
        if loss is not None and state is not None:
            state = self.teleporter.told(state, loss, deterministic=False)
        return state

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict with one more entry, `teleporting`.

        That entry has the number of steps, the place on the orbit that all teleports have led to, and the states of the
        teleporter, its random numbers and the schedule, so that a resumed run takes the same steps. The state-dict API
        of `torch.distributed.checkpoint` keeps parameters' states only and leaves the entry out: save it separately.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed: dict[str, Any] = self.optimizer.state_dict()
        packed[OWN] = {
            "steps": self.steps,
            "teleporter": self.teleporter.name,
            "state": self._saved_state(),
            "orbit": self._orbit.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": {name: source.get_state() for name, source in sources_of(self.teleporter)},
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of the bare inner optimizer.

        With the latter the steps are counted from 0, and the known place on the orbit stays.

        Raises:
            ValueError: if it was saved with another teleporter or schedule, or does not fit the inner optimizer.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own = state_dict.pop(OWN, {"steps": 0, "teleporter": self.teleporter.name, "state": None, "random": {}})
        if own["teleporter"] != self.teleporter.name:
            raise ValueError(
                f"this state was saved with the teleporter {own['teleporter']!r} and cannot go on with "
                f"{self.teleporter.name!r}: take {OWN!r} out of it to start teleporting anew"
            )
        self.schedule.load_state_dict(own.get("schedule", self._fresh_schedule))
        self.optimizer.load_state_dict(state_dict)
        self.steps = own["steps"]
        self._due = self.schedule.due(self.steps)
        self._judge = Judge(self._judge.window)
        self._teleporter_state, self._loaded_state = None, own["state"]
        if "orbit" in own:
            self._orbit.load_state_dict(own["orbit"])
        for name, source in sources_of(self.teleporter):
            if name in own["random"]:
                source.set_state(own["random"][name].cpu())
        if self._recorder is not None:
            self._recorder.clear()
            self._recorder.wanted = self._due
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _saved_state(self) -> Any:
        # A loaded state is converted at the next teleport; until then it is passed on as it is.
        return self._loaded_state if self._teleporter_state is None else plain(self._teleporter_state)
