"""The state of a teleporter or a meta-optimizer in the form of a state dict, for saving and loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from metateleport.teleporters import Teleporter

__all__ = ["OWN", "merged", "plain", "restored", "sources_of", "without"]

OWN = "teleporting"
"""Name of the entry that is added to the inner optimizer's state dict."""


def plain(value: Any) -> Any:
    """A state as dicts, lists, tensors and numbers, which `torch.save` and `torch.load(weights_only=True)` take."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value.detach() if isinstance(value, Tensor) else value


def restored(like: Any, saved: Any, entry: str) -> Any:
    """Undoes `plain`: a saved state in the types of a fresh one.

    Args:
        like: a fresh state.
        saved: what `plain` gave.
        entry: name of the state dict's entry, for the error message.

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


def merged(fresh: Any, state: Any) -> Any:
    """A state with the entries of a fresh one added for symmetries that were not moved along yet.

    Example:
        >>> merged({"a": 0, "places": {"a": 0, "b": 0}}, {"a": 1, "places": {"a": 1}})
        {'a': 1, 'places': {'a': 1, 'b': 0}}
    """
    if not isinstance(fresh, dict) or not isinstance(state, dict):
        return state
    return {
        **{key: merged(each, state[key]) if key in state else each for key, each in fresh.items()},
        **{key: each for key, each in state.items() if key not in fresh},
    }


def without(state: Any, keys: Collection[str]) -> Any:
    """A saved state without some entries; nested dicts are searched too.

    Example:
        >>> without({"a": 1, "places": {"a": 1, "b": 2}}, {"a"})
        {'places': {'b': 2}}
    """
    if not isinstance(state, dict):
        return state
    return {key: without(value, keys) for key, value in state.items() if key not in keys}


def sources_of(teleporter: Teleporter) -> list[tuple[str, torch.Generator]]:
    """The sources of random numbers of a teleporter, by attribute."""
    return [(name, each) for name, each in vars(teleporter).items() if isinstance(each, torch.Generator)]
