"""One teleport between two steps: where it starts, what it does and what is told of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport._optim_failures import held_out_loss
from metateleport._optim_loss import Known, know_loss
from metateleport._optim_saved import OWN, Saving, restored
from metateleport._optim_state import carry_state
from metateleport._optim_teleport import Consequences, consequences_of, pass_to_start_from, start_of
from metateleport.capture import PassRecorder
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move, TeleportReport, failures_of, gain_of, travel
from metateleport.teleporters.once import gradient_norm, half_squared_norm, moved_names, now, summary_of

__all__ = ["Moving"]

_NAN = float("nan")


class Moving(Saving):
    """Moves the model, its gradients and the inner optimizer's state."""

    model: nn.Module
    symmetries: Sequence[Symmetry]
    example_input: Any
    state_mode: str
    held_out: Callable[[], Any] | None
    _warned: set[str]

    def _teleport(
        self, watch: PassRecorder, told: Tensor | None, loss: Callable[[Any], Tensor] | None
    ) -> TeleportReport:
        caught = pass_to_start_from(watch, self.example_input)
        named = dict(self.model.named_parameters())
        point, reason = start_of(watch, caught, named, self.symmetries, told)
        if self.teleporter.needs_gradient and not point.gradients:
            raise RuntimeError(
                f"{type(self.teleporter).__name__} looks at gradients and there are none: call backward() before step()"
            )
        known, free = Known(point), not self.teleporter.needs_symmetries
        if not reason and self.teleporter.needs_loss:
            assert loss is not None
            known = know_loss(watch, caught, point, loss, named, self.param_groups, free)
        start, reason = known.point, reason or known.reason
        arrived, moves, seconds = start, list[Move](), _NAN
        if not reason:
            device = next(self.model.parameters()).device
            began = now(device)
            with torch.no_grad():
                arrived, moves, self._teleporter_state = travel(
                    self.teleporter, start, self.symmetries, self._state_at(start, told)
                )
            seconds = now(device) - began
        size, sizes, refused, evaluations = summary_of(moves)
        reason = reason or refused
        moved, found = size > 0, Consequences()
        if moved:
            found = consequences_of(watch, caught, start, arrived, self.teleporter)
            moved, reason = not found.reason, found.reason or reason
            if not moved:
                self._teleporter_state = self.teleporter.refused(self._teleporter_state)
        if free:
            fresh = {name: known.factor * value for name, value in arrived.gradients.items()}
            arrived = arrived.replace(gradients=fresh)
        held_out = held_out_loss(self.held_out, self.model)
        names = moved_names([move.symmetry for move in moves])
        here = arrived if moved else point
        loss_before = _NAN if start.loss is None else float(start.loss)
        report = TeleportReport(
            teleporter=self.teleporter.name,
            accepted=moved or not reason,
            reason=reason,
            loss_before=loss_before,
            loss_after=loss_before + (found.loss_change if moved else 0.0),
            drift=found.drift if moved else 0.0,
            gradient_norm_before=gradient_norm(point),
            gradient_norm_after=gradient_norm(here),
            size=size if moved else 0.0,
            sizes=sizes if moved else tuple(0.0 for _ in sizes or self.symmetries),
            weight_decay_change=half_squared_norm(here.parameters, names) - half_squared_norm(point.parameters, names),
            evaluations=evaluations + known.evaluations + caught.replays / 3,
            state=self.state_mode,
            seconds=seconds,
            gain=gain_of(moves) if moved else _NAN,
            held_out_before=held_out,
            held_out_after=held_out,
        )
        if moved:
            with torch.no_grad():
                # The state first: the point where the teleport started shares its memory with the weights.
                done = carry_state(self.optimizer, self.state_mode, named, moves, start, self._warned)
                report = dataclasses.replace(report, state=done.summary, state_entries=done.entries)
                for name, parameter in named.items():
                    if arrived.parameters[name] is not start.parameters[name]:
                        parameter.copy_(arrived.parameters[name])
                    if name in point.gradients and arrived.gradients[name] is not point.gradients[name]:
                        assert parameter.grad is not None
                        parameter.grad.copy_(arrived.gradients[name])
            report = dataclasses.replace(report, held_out_after=held_out_loss(self.held_out, self.model))
        eps = max((torch.finfo(each.dtype).eps for each in caught.outputs), default=0.0)
        both = report.held_out_before, report.held_out_after
        return dataclasses.replace(report, failures=failures_of(moves, found.drift, found.broken, eps, both))

    def _state_at(self, point: Point, loss: Tensor | None) -> Any:
        if self._teleporter_state is None and self._loaded_state is not None:
            fresh = self.teleporter.initial_state(point, self.symmetries)
            self._teleporter_state, self._loaded_state = restored(fresh, self._loaded_state, OWN), None
        state = self._teleporter_state
        if loss is not None and isinstance(state, dict) and "progress" in state:
            state = {**state, "progress": state["progress"].judge(loss, deterministic=False)[0]}
        return state
