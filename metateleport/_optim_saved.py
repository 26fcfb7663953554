"""What a teleporter or a meta-optimizer remembers, as a state dict holds it, saved and loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from metateleport._optim_failures import Judge
from metateleport._optim_wrapper import Wrapping
from metateleport.capture import PassRecorder
from metateleport.schedules import Schedule
from metateleport.teleporters import Teleporter

__all__ = ["OWN", "Saving", "plain", "restored"]

OWN = "teleporting"
"""The entry of a state dict that is not the inner optimizer's."""


def plain(value: Any) -> Any:
    """A state as dicts, lists, tensors and numbers, which a checkpoint takes."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value.detach() if isinstance(value, Tensor) else value


def restored(like: Any, saved: Any, entry: str) -> Any:
    """What `plain` was given, of the types of a fresh state.

    Args:
        like: a fresh state.
        saved: what `plain` gave.
        entry: the entry of the state dict that it came from.

    Raises:
        ValueError: if the two do not fit together.
    """
    try:
        if isinstance(like, Tensor):
            return torch.as_tensor(saved).to(like).reshape(like.shape)
        if isinstance(like, dict):
            if like.keys() != saved.keys():
                raise ValueError("the entries differ")
            return {key: restored(each, saved[key], entry) for key, each in like.items()}
        if isinstance(like, tuple | list):
            return type(like)(restored(each, other, entry) for each, other in zip(like, saved, strict=True))
        if dataclasses.is_dataclass(like) and not isinstance(like, type):
            fields = {f.name: restored(getattr(like, f.name), saved[f.name], entry) for f in dataclasses.fields(like)}
            return dataclasses.replace(like, **fields)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the saved entry {entry!r} does not fit this model and its symmetries: load it with the same ones, or "
            f"take {entry!r} out of the state ({error})"
        ) from error
    return saved


class Saving(Wrapping):
    """Saves and loads where a teleporting optimizer stands, beside the inner optimizer's state."""

    teleporter: Teleporter
    schedule: Schedule
    steps: int
    _due: bool
    _judge: Judge
    _watch: PassRecorder | None
    _fresh_schedule: Any
    _teleporter_state: Any
    _loaded_state: Any

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict; its entry `teleporting` has the number of steps and what the teleporter and
        the schedule remember, draws of random numbers included, so that a run that goes on from it takes the same
        steps."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed: dict[str, Any] = self.optimizer.state_dict()
        packed[OWN] = {
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
