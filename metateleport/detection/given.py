"""Checks of the user's model, and containers of inputs that the library must not change."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.symmetries import Unsuitable

__all__ = ["check_model", "copied", "inside", "mapped", "tensors_in"]

_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""The attribute that holds the model inside, by the name of a wrapper's class."""

_SHARDED = "{}, and symmetries act on whole tensors: train such a model without them (symmetries=[])"


def inside(model: nn.Module) -> nn.Module:
    """The model inside `DataParallel`, `DistributedDataParallel` and what `torch.compile` gives, or the model itself.

    Example:
        >>> inside(nn.DataParallel(nn.Linear(2, 3)))
        Linear(in_features=2, out_features=3, bias=True)
    """
    while (held := _held(model)) is not None:
        model = getattr(model, held)
    return model


def check_model(model: nn.Module) -> None:
    """Refuses a model that is wrapped, lazy or sharded.

    Raises:
        Unsuitable: if it is; the message says what to do.
    """
    held = _held(model)
    if held is not None:
        raise Unsuitable(
            f"this {type(model).__name__} is wrapped around the model: give the model inside (its attribute {held!r}), "
            "whose parameters are the same"
        )
    if any(kind.__name__ == "FullyShardedDataParallel" for module in model.modules() for kind in type(module).__mro__):
        raise Unsuitable(_SHARDED.format("the model is in FullyShardedDataParallel"))
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise Unsuitable(
                f"{name!r} belongs to a lazy layer that has no shape yet: run one forward pass first, "
                "model(example_input), and then look for symmetries"
            )
        if any(kind.__name__ == "DTensor" for kind in type(value).__mro__):
            raise Unsuitable(_SHARDED.format(f"{name!r} is a DTensor"))


def _held(model: nn.Module) -> str | None:
    for kind in type(model).__mro__:
        held = _WRAPPERS.get(kind.__name__)
        if (
            held is not None
            and kind.__module__.startswith("torch.")
            and isinstance(getattr(model, held, None), nn.Module)
        ):
            return held
    return None


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Containers with a function applied to every tensor in them.

    Example:
        >>> mapped((torch.ones(1), {"flag": True}), torch.neg)
        (tensor([-1.]), {'flag': True})
    """

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            changed = copy.copy(leaf)
            for field in dataclasses.fields(leaf):
                if hasattr(leaf, field.name):
                    object.__setattr__(changed, field.name, mapped(getattr(leaf, field.name), function))
            return changed
        return leaf

    return torch.utils._pytree.tree_map(of_leaf, value)


def copied(inputs: Any) -> Any:
    """Copies of inputs that a model may overwrite; a tensor that occurs twice is copied once.

    Example:
        >>> given = torch.zeros(2)
        >>> one, other = copied((given, given))
        >>> one is other, one is given
        (True, False)
    """
    copies: dict[int, Tensor] = {}

    def copy_of(value: Tensor) -> Tensor:
        if id(value) not in copies:
            copies[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        return copies[id(value)]

    return mapped(inputs, copy_of)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that an attribute of a module holds, in containers too.

    Example:
        >>> len(tensors_in({"kept": [torch.ones(1), 3], "more": (torch.ones(2),)}))
        2
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [each for item in value.values() for each in tensors_in(item)]
    if isinstance(value, tuple | list | set):
        return [each for item in value for each in tensors_in(item)]
    return []
