"""Teleports inside an ordinary training loop: an optimizer around any other."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport._optim_capture import Watch
from metateleport._optim_checks import check_kinds, check_parameters, check_symmetries, try_symmetries
from metateleport._optim_closure import known_at_first, scalar, scalar_or_none
from metateleport._optim_saved import plain, restored
from metateleport._optim_signatures import Judge, held_out_loss, signatures_of
from metateleport._optim_state import carry_state
from metateleport._optim_teleport import Consequences, consequences_of, pass_to_start_from, start_of
from metateleport._optim_wrapper import Wrapping
from metateleport.capture import modules_of
from metateleport.detect import symmetries_of
from metateleport.detection import exact_symmetries
from metateleport.point import Point
from metateleport.schedules import Schedule, schedule_of
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move, Teleporter, TeleportReport, travel
from metateleport.teleporters.once import gradient_norm, half_squared_norm, moved_names, split_inputs, summary_of

__all__ = ["TeleportingOptimizer"]

_OWN = "teleporting"
_NAN = float("nan")


class TeleportingOptimizer(Wrapping):
    r"""Teleports a model every few steps, and steps with any other optimizer.

    Before the steps that its schedule names, 0, `every`, 2 `every`, ... if no other is given, it moves the model along
    its symmetries, brings `p.grad` and the optimizer's state along, and then lets the optimizer step as ever. Parameter
    groups, defaults and state are the
    inner optimizer's own, so that learning-rate schedulers, `zero_grad`, `add_param_group`, `torch.amp.GradScaler`
    and step hooks work on the wrapper. The state dict is the inner optimizer's with one more entry, `teleporting`.

    What a teleport needs to know is caught by hooks on the model, during forward passes with gradients before a step
    that teleports. The loss has to depend on the parameters through the model's outputs only: a penalty on the
    weights themselves is no invariant (weight decay in the optimizer is what it is: a teleport changes
    $\tfrac12|w|^2$, and the report says by how much).

    **Gradients.** Under exact symmetries `p.grad` is a covector and is carried along, whatever was done to it: summed
    over several backward passes, clipped, unscaled by a `GradScaler`. Under batch-exact ones the part below the moved
    layer is rebuilt from the last forward pass, times whatever factor lies between that pass and `p.grad`; where
    there is no such factor (accumulated over several batches, clipped entry by entry) the teleport is refused.

    **State.** With `state="transport"` sums of gradients (momentum) are carried as the gradient is, and sums of squared
    gradients by squared coefficients: exact for momentum under exact symmetries and for squares under diagonal
    groups, else approximate; the report says so of each entry. What is of another kind (the preconditioners of Shampoo
    and SOAP) is kept, with a warning, and named in the report. L-BFGS remembers differences of flattened weights: it
    starts anew after a teleport (`reset`).

    **Refusals.** A teleport out of the teleporter's trust region, or with a drift above its `max_drift`, is refused:
    weights, gradients and state stay bit for bit as they were. What the teleporter itself remembers goes on.

    **Signs of failure.** A report's `signatures` name what was seen to go wrong: `no gain`, the loss fell no faster in
    the steps after the teleport than in those before it (the closure tells the loss; as every run slows down by
    itself, this is a sign and no proof); `worse held-out loss`, where `held_out` is given, right after the teleport
    or those steps later; `unstable element`, refused as too large, ill-conditioned or not finite, or with outputs
    that lost half of their digits. The first two appear once the steps have been taken.

    **Cost.** A teleport that moves repeats the model's forward pass once to measure the drift, which counts a third,
    with the random numbers and buffers of the caught pass, that are left as they were; rebuilding adds another third
    and its share of a backward pass. The loss after a teleport is told to first order in the drift, from the
    gradient on the outputs, without another evaluation.

    Args:
        optimizer: the optimizer that steps.
        model: the model whose parameters it holds.
        teleporter: chooses the group elements. A learned one is moved to the model's device.
        symmetries: those to move along, in the order of the data flow; found in the model if not given.
        every: number of steps from one teleport to the next; 10 if neither this nor a schedule is given.
        example_input: a tensor, a tuple of positional or a dict of keyword inputs. If given, the symmetries are tried
            on it at once, and it stands in where a step has had no forward pass.
        state: what becomes of the optimizer's state: `transport`, `keep` or `reset` (of the moved parameters).
        schedule: says before which steps to teleport, instead of `every`: a `metateleport.Schedule`, or a function of
            the step's number.
        held_out: evaluates the loss on held-out data and returns it. It is called before and after each teleport and
            once more `window` steps later, without gradients, and is not counted in a report's evaluations.
        window: number of steps on either side of a teleport that signs of failure are looked for in.

    Raises:
        TypeError: if the optimizer, the teleporter, the schedule or `held_out` is something else.
        ValueError: if `every`, `window` or `state` cannot be, the optimizer's parameters are not the model's, a
            symmetry moves what the optimizer does not hold or may not change, or one does not hold on the example.

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
        state: str = "transport",
        schedule: Schedule | Callable[[int], bool] | None = None,
        held_out: Callable[[], Any] | None = None,
        window: int = 10,
    ) -> None:
        check_kinds(optimizer, teleporter, state, held_out, window)
        self.schedule = schedule_of(every, schedule)
        self.optimizer, self.model, self.teleporter = optimizer, model, teleporter
        if symmetries is None and example_input is None:
            symmetries = symmetries_of(model)
        elif symmetries is None:
            held = {id(value) for group in optimizer.param_groups for value in group["params"]}
            names = {name for name, value in model.named_parameters() if id(value) in held}
            found = exact_symmetries(model, example_input, buffers=False)
            symmetries = [each for each in found if names.issuperset(each.parameters)]
        self.symmetries = tuple(symmetries)
        self.example_input, self.state_mode, self.held_out = example_input, state, held_out
        check_parameters(optimizer.param_groups, model)
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
        self._watch: Watch | None = None
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
        self._watch = Watch(self.model, modules_of(self.symmetries))
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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Teleports if it is time, then steps.

        Args:
            closure: clears the gradients, evaluates the model, calls `backward()` and returns the loss. On a step that
                teleports it is evaluated once before the teleport; the inner optimizer gets that loss, and evaluates
                it again only after having changed the weights (L-BFGS). Without a closure the teleport starts from
                the last forward pass and `p.grad` as it is.

        Returns:
            The closure's loss before the step; None without a closure.

        Raises:
            RuntimeError: if it is time to teleport and there was no forward pass to start from, or no backward pass
                for a teleporter that looks at gradients.
        """
        again = closure
        if self._watch is not None and self._due:
            loss = None
            if closure is not None:
                self._watch.clear()
                with torch.enable_grad():
                    loss = closure()
            self._judge_last()
            self.reports.append(self._teleport(self._watch, None if loss is None else scalar(loss)))
            self._watch.clear()
            self._judge.start()
            # Nothing that the inner optimizer evaluates is wanted.
            self._watch.wanted = False
            if closure is not None:
                again = known_at_first(closure, loss, self.param_groups)
        try:
            result = self.optimizer.step() if again is None else self.optimizer.step(again)
            if self._watch is not None:
                self._stepped(None if closure is None else scalar_or_none(result))
        finally:
            if self._watch is not None:
                self._watch.wanted = self._due
        return result

    def _stepped(self, loss: Tensor | None) -> None:
        self._judge.see(loss)
        if self._judge.ripe:
            self._judge_last()
        norm = _NAN
        if self.schedule.needs_gradient_norm:
            gradients = [each.grad for group in self.param_groups for each in group["params"] if each.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients)) if gradients else _NAN
        self.schedule.observe(self.steps, norm, teleported=self._due)
        self.steps += 1
        self._due = self.schedule.due(self.steps)

    def _judge_last(self) -> None:
        if self.reports:
            self.reports[-1] = self._judge.verdict(self.reports[-1], lambda: held_out_loss(self.held_out, self.model))

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict; its entry `teleporting` has the number of steps and what the teleporter and
        the schedule remember, draws of random numbers included, so that a run that goes on from it takes the same
        steps."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed: dict[str, Any] = self.optimizer.state_dict()
        packed[_OWN] = {
            "steps": self.steps,
            "teleporter": self.teleporter.name,
            "state": self._saved_state(),
            "schedule": self.schedule.state_dict(),
            "random": {name: source.get_state() for name, source in self._sources()},
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of the bare inner optimizer; from the latter it starts at step 0.

        Raises:
            ValueError: if it was saved with another teleporter or schedule, or does not fit the inner optimizer.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own = state_dict.pop(_OWN, {"steps": 0, "teleporter": self.teleporter.name, "state": None, "random": {}})
        if own["teleporter"] != self.teleporter.name:
            raise ValueError(
                f"this state was saved with the teleporter {own['teleporter']!r} and cannot go on with "
                f"{self.teleporter.name!r}: take {_OWN!r} out of it to start teleporting anew"
            )
        self.schedule.load_state_dict(own.get("schedule", self._fresh_schedule))
        self.optimizer.load_state_dict(state_dict)
        self.steps = own["steps"]
        self._due = self.schedule.due(self.steps)
        self._judge = Judge(self._judge.window)
        self._teleporter_state, self._loaded_state = None, own["state"]
        for name, source in self._sources():
            if name in own["random"]:
                source.set_state(own["random"][name].cpu())
        if self._watch is not None:
            self._watch.clear()
            self._watch.wanted = self._due
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _saved_state(self) -> Any:
        # What was loaded takes its form at the next teleport; until then it is passed on as it is.
        return self._loaded_state if self._teleporter_state is None else plain(self._teleporter_state)

    def _sources(self) -> list[tuple[str, torch.Generator]]:
        return [(name, each) for name, each in vars(self.teleporter).items() if isinstance(each, torch.Generator)]

    def _teleport(self, watch: Watch, loss: Tensor | None) -> TeleportReport:
        caught = pass_to_start_from(watch, self.example_input)
        named = dict(self.model.named_parameters())
        point, reason = start_of(watch, caught, named, self.symmetries, loss)
        if self.teleporter.needs_gradient and not point.gradients:
            raise RuntimeError(
                f"{type(self.teleporter).__name__} looks at gradients and there are none: call backward() before step()"
            )
        arrived, moves = point, list[Move]()
        if not reason:
            with torch.no_grad():
                arrived, moves, self._teleporter_state = travel(
                    self.teleporter, point, self.symmetries, self._state_at(point, loss)
                )
        size, sizes, refused, evaluations = summary_of(moves)
        reason = reason or refused
        moved, found = size > 0, Consequences()
        if moved:
            limit = self.teleporter.trust_region.max_drift
            found = consequences_of(watch, caught, point, arrived, limit)
            moved, reason = not found.reason, found.reason or reason
        held_out = held_out_loss(self.held_out, self.model)
        names = moved_names(self.symmetries)
        here = arrived if moved else point
        report = TeleportReport(
            teleporter=self.teleporter.name,
            accepted=moved or not reason,
            reason=reason,
            loss_before=_NAN if loss is None else float(loss),
            loss_after=_NAN if loss is None else float(loss) + (found.loss_change if moved else 0.0),
            drift=found.drift if moved else 0.0,
            gradient_norm_before=gradient_norm(point),
            gradient_norm_after=gradient_norm(here),
            size=size if moved else 0.0,
            sizes=sizes if moved else tuple(0.0 for _ in self.symmetries),
            weight_decay_change=half_squared_norm(here.parameters, names) - half_squared_norm(point.parameters, names),
            evaluations=evaluations + caught.replays / 3,
            state=self.state_mode,
            held_out_before=held_out,
            held_out_after=held_out,
        )
        if moved:
            with torch.no_grad():
                # The state first: the point where the teleport started shares its memory with the weights.
                done = carry_state(self.optimizer, self.state_mode, named, moves, point, self._warned)
                report = dataclasses.replace(report, state=done.summary, state_entries=done.entries)
                for name, parameter in named.items():
                    if arrived.parameters[name] is not point.parameters[name]:
                        parameter.copy_(arrived.parameters[name])
                    if name in point.gradients and arrived.gradients[name] is not point.gradients[name]:
                        assert parameter.grad is not None
                        parameter.grad.copy_(arrived.gradients[name])
            report = dataclasses.replace(report, held_out_after=held_out_loss(self.held_out, self.model))
        return dataclasses.replace(report, signatures=signatures_of(report, moves, found, caught.outputs))

    def _state_at(self, point: Point, loss: Tensor | None) -> Any:
        if self._teleporter_state is None and self._loaded_state is not None:
            fresh = self.teleporter.initial_state(point, self.symmetries)
            self._teleporter_state, self._loaded_state = restored(fresh, self._loaded_state, _OWN), None
        state = self._teleporter_state
        if loss is not None and isinstance(state, dict) and "progress" in state:
            state = {**state, "progress": state["progress"].judge(loss, deterministic=False)[0]}
        return state
