"""The base of an optimizer that wraps another one."""

from __future__ import annotations

import collections
from typing import Any

import torch

__all__ = ["Wrapping"]


class Wrapping(torch.optim.Optimizer):
    """Shares parameter groups, defaults and state with the optimizer inside it, and has hooks of its own.

    A subclass sets `optimizer` and calls `_become_an_optimizer`. The base class's constructor, which would make new
    groups and a new state, is never called.
    """

    optimizer: torch.optim.Optimizer

    def _become_an_optimizer(self) -> None:
        for kind in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                setattr(self, f"_optimizer_{kind}_{when}_hooks", collections.OrderedDict())
        self._patch_step_function()

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as the inner optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters to the inner optimizer."""
        self.optimizer.add_param_group(param_group)
