"""What a teleporter or a meta-optimizer remembers, as a state dict holds it, saved and loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from metateleport.teleporters import Teleporter

__all__ = ["OWN", "merged", "plain", "restored", "sources_of", "without"]

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


def merged(fresh: Any, state: Any) -> Any:
    """What a teleporter or a gauge remembers, with what a fresh one has for symmetries that it has not met yet.

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
    """A saved state with some entries left out, in all dicts inside it too.

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
