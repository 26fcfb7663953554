"""Teleports inside an ordinary training loop: an optimizer around any other."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport._optim_capture import CaughtPass, Watch
from metateleport._optim_checks import check_parameters, check_symmetries, try_symmetries
from metateleport._optim_state import carry_state, plain, restored
from metateleport._optim_teleport import Consequences, consequences_of, start_of
from metateleport.capture import modules_of
from metateleport.detect import symmetries_of
from metateleport.detection import exact_symmetries
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move, Teleporter, TeleportReport, travel
from metateleport.teleporters.once import gradient_norm, half_squared_norm, moved_names, split_inputs, summary_of

__all__ = ["TeleportingOptimizer"]

_STATES = ("transport", "keep", "reset")
_OWN = "teleporting"
_NAN = float("nan")


class TeleportingOptimizer(torch.optim.Optimizer):
    r"""Teleports a model every few steps, and steps with any other optimizer.

    Before its steps number 0, `every`, 2 `every`, ... it moves the model along its symmetries, brings `p.grad` and the
    optimizer's state along, and then lets the optimizer step as ever. Parameter groups, defaults and state are the
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
    groups, else approximate, and the report says so. Tensors of unknown meaning stay, with a warning. L-BFGS remembers
    differences of flattened weights: it starts anew after a teleport (`reset`).

    **Refusals.** A teleport out of the teleporter's trust region, or with a drift above its `max_drift`, is refused:
    weights, gradients and state stay bit for bit as they were. What the teleporter itself remembers goes on.

    **Cost.** A teleport that moves repeats the model's forward pass once to measure the drift, which counts a third,
    with the random numbers and buffers of the caught pass, that are left as they were; rebuilding adds another third
    and its share of a backward pass. The loss after a teleport is told to first order in the drift, from the
    gradient on the outputs, without another evaluation.

    Args:
        optimizer: the optimizer that steps.
        model: the model whose parameters it holds.
        teleporter: chooses the group elements. A learned one is moved to the model's device.
        symmetries: those to move along, in the order of the data flow; found in the model if not given.
        every: number of steps from one teleport to the next.
        example_input: a tensor, a tuple of positional or a dict of keyword inputs. If given, the symmetries are tried
            on it at once, and it stands in where a step has had no forward pass.
        state: what becomes of the optimizer's state: `transport`, `keep` or `reset` (of the moved parameters).

    Raises:
        TypeError: if the optimizer or the teleporter is something else.
        ValueError: if `every` or `state` cannot be, the optimizer's parameters are not the model's, a symmetry moves
            what the optimizer does not hold or may not change, or one does not hold on the example.

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
        every: int = 10,
        example_input: Any = None,
        state: str = "transport",
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"the first argument is a torch.optim optimizer, not a {type(optimizer).__name__}")
        if not isinstance(teleporter, Teleporter):
            raise TypeError(f"the teleporter is a metateleport.Teleporter, not a {type(teleporter).__name__}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is the number of steps between teleports, an integer of at least 1, not {every!r}")
        if state not in _STATES:
            raise ValueError(f"state is one of {', '.join(_STATES)}, not {state!r}")
        self.optimizer, self.model, self.teleporter = optimizer, model, teleporter
        if symmetries is None and example_input is None:
            symmetries = symmetries_of(model)
        elif symmetries is None:
            held = {id(value) for group in optimizer.param_groups for value in group["params"]}
            names = {name for name, value in model.named_parameters() if id(value) in held}
            found = exact_symmetries(model, example_input, buffers=False)
            symmetries = [each for each in found if names.issuperset(each.parameters)]
        self.symmetries = tuple(symmetries)
        self.every, self.example_input, self.state_mode = every, example_input, state
        check_parameters(optimizer.param_groups, model)
        check_symmetries(self.symmetries, optimizer, model)
        if isinstance(teleporter, nn.Module):
            teleporter.to(next(model.parameters()).device)
        self.steps = 0
        self.reports: collections.deque[TeleportReport] = collections.deque(maxlen=self.REPORTS)
        self._teleporter_state: Any = None
        self._loaded_state: Any = None
        self._warned: set[str] = set()
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
        # Not through the base class, which would make parameter groups and a state of its own.
        for kind in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                setattr(self, f"_optimizer_{kind}_{when}_hooks", collections.OrderedDict())
        self._patch_step_function()
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
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's parameter groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    @property
    def last_report(self) -> TeleportReport | None:
        """The report of the last teleport; None before the first."""
        return self.reports[-1] if self.reports else None

    def __repr__(self) -> str:
        return f"TeleportingOptimizer(every={self.every}, teleporter={self.teleporter.name}, {self.optimizer!r})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as the inner optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of the model's parameters to the inner optimizer.

        Raises:
            ValueError: if they are not the model's.
        """
        if isinstance(param_group, dict) and not isinstance(param_group["params"], Tensor):
            param_group = {**param_group, "params": list(param_group["params"])}
        check_parameters([param_group], self.model)
        self.optimizer.add_param_group(param_group)

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
            self.reports.append(self._teleport(self._watch, None if loss is None else _scalar(loss)))
            self._watch.clear()
            # Nothing that the inner optimizer evaluates is wanted.
            self._watch.wanted = False
            if closure is not None:
                again = _known_at_first(closure, loss, self.param_groups)
        try:
            result = self.optimizer.step() if again is None else self.optimizer.step(again)
            self.steps += 1
        finally:
            if self._watch is not None:
                self._watch.wanted = self._due
        return result

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict; its entry `teleporting` has the number of steps and what the teleporter
        remembers, draws of random numbers included, so that a run that goes on from it takes the same steps."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed: dict[str, Any] = self.optimizer.state_dict()
        packed[_OWN] = {
            "steps": self.steps,
            "teleporter": self.teleporter.name,
            "state": self._saved_state(),
            "random": {name: source.get_state() for name, source in self._sources()},
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of the bare inner optimizer; from the latter it starts at step 0.

        Raises:
            ValueError: if it was saved with another teleporter, or does not fit the inner optimizer.
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
        self.optimizer.load_state_dict(state_dict)
        self.steps = own["steps"]
        self._teleporter_state, self._loaded_state = None, own["state"]
        for name, source in self._sources():
            if name in own["random"]:
                source.set_state(own["random"][name].cpu())
        if self._watch is not None:
            self._watch.clear()
            self._watch.wanted = self._due
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @property
    def _due(self) -> bool:
        return self.steps % self.every == 0

    def _saved_state(self) -> Any:
        # What was loaded takes its form at the next teleport; until then it is passed on as it is.
        return self._loaded_state if self._teleporter_state is None else plain(self._teleporter_state)

    def _sources(self) -> list[tuple[str, torch.Generator]]:
        return [(name, each) for name, each in vars(self.teleporter).items() if isinstance(each, torch.Generator)]

    def _teleport(self, watch: Watch, loss: Tensor | None) -> TeleportReport:
        caught = self._pass_to_start_from(watch)
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
        )
        if moved:
            with torch.no_grad():
                # The state first: the point where the teleport started shares its memory with the weights.
                done = carry_state(self.optimizer, self.state_mode, named, moves, point, self._warned)
                report = dataclasses.replace(report, state=done)
                for name, parameter in named.items():
                    if arrived.parameters[name] is not point.parameters[name]:
                        parameter.copy_(arrived.parameters[name])
                    if name in point.gradients and arrived.gradients[name] is not point.gradients[name]:
                        assert parameter.grad is not None
                        parameter.grad.copy_(arrived.gradients[name])
        return report

    def _pass_to_start_from(self, watch: Watch) -> CaughtPass:
        caught, problem = watch.last, ""
        if caught is None:
            problem = (
                "there was no forward pass of the model since the last step (passes under torch.no_grad() do not count)"
            )
        elif caught.training != self.model.training:
            modes = ("evaluation", "training")
            problem = (
                f"the last forward pass was in {modes[caught.training]} mode and the model now is in "
                f"{modes[self.model.training]} mode"
            )
        if caught is not None and not problem:
            return caught
        if self.example_input is None:
            raise RuntimeError(
                f"cannot teleport: {problem}. Call the model and backward() before step(), or give example_input="
            )
        return watch.evaluate(*split_inputs(self.example_input))

    def _state_at(self, point: Point, loss: Tensor | None) -> Any:
        if self._teleporter_state is None and self._loaded_state is not None:
            fresh = self.teleporter.initial_state(point, self.symmetries)
            self._teleporter_state, self._loaded_state = restored(fresh, self._loaded_state), None
        state = self._teleporter_state
        if loss is not None and isinstance(state, dict) and "progress" in state:
            state = {**state, "progress": state["progress"].judge(loss, deterministic=False)[0]}
        return state


def _scalar(loss: Any) -> Tensor:
    loss = torch.as_tensor(loss).detach()
    if loss.numel() != 1:
        raise ValueError(f"the closure has to return a scalar loss; it returned shape {tuple(loss.shape)}")
    return loss.reshape(())


def _known_at_first(closure: Callable[[], Any], loss: Any, groups: Sequence[dict[str, Any]]) -> Callable[[], Any]:
    """The closure, whose value is known as long as nobody changes the weights or the gradients."""

    def versions() -> list[tuple[int, int | None, int | None]]:
        return [
            (each._version, *((None, None) if each.grad is None else (id(each.grad), each.grad._version)))
            for group in groups
            for each in group["params"]
        ]

    known = versions()

    def evaluate() -> Any:
        return loss if versions() == known else closure()

    return evaluate
