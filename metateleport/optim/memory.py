"""A learned optimizer's state as a flat table of named tensors, and back, for saving and loading."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.learned.meta_optimizer import MetaState
from metateleport.learned.stand_in import StandIn
from metateleport.point import Point, Tensors

__all__ = [
    "fingerprint",
    "flattened",
    "renamed",
    "restored_parts",
    "saved_parts",
    "unflattened",
]


def flattened(value: Any, prefix: str) -> Tensors:
    """Flattens dicts, tuples, dataclasses, numbers and tensors into tensors by their paths; None is left out.

    Example:
        >>> flattened({"a": (1, torch.ones(2))}, "state")
        {'state/a/0': tensor(1), 'state/a/1': tensor([1., 1.])}
    """
    if value is None:
        return {}
    if isinstance(value, Tensor):
        return {prefix: value.detach().clone()}
    if isinstance(value, bool | int | float):
        return {prefix: torch.tensor(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
    return {path: each for key, part in pairs for path, each in flattened(part, f"{prefix}/{key}").items()}


def unflattened(like: Any, saved: Mapping[str, Tensor], prefix: str) -> Any:
    """Undoes `flattened`: a state of the types of `like`, whose values stay where nothing was saved.

    Raises:
        ValueError: if a saved tensor has another shape.
    """
    if isinstance(like, Tensor):
        value = saved.get(prefix)
        if value is None:
            return like
        if value.shape != like.shape:
            raise ValueError(
                f"the saved entry {prefix!r} has shape {tuple(value.shape)}, and this model needs "
                f"{tuple(like.shape)}: load it with the same model, symmetries and checkpoint, or start anew"
            )
        return value.to(like)
    if isinstance(like, bool | int | float):
        return type(like)(saved[prefix].item()) if prefix in saved else like
    found = like
    if isinstance(like, dict):
        found = {key: unflattened(each, saved, f"{prefix}/{key}") for key, each in like.items()}
    elif isinstance(like, tuple | list):
        found = type(like)(unflattened(each, saved, f"{prefix}/{index}") for index, each in enumerate(like))
    elif dataclasses.is_dataclass(like) and not isinstance(like, type):
        values = {field.name: getattr(like, field.name) for field in dataclasses.fields(like)}
        found = dataclasses.replace(like, **unflattened(values, saved, prefix))
    return found


def saved_parts(state: MetaState) -> Tensors:
    """A state as tensors by their paths; the rule's state is left out, as it is saved with each parameter."""
    parts = {
        "progress": state.progress,
        "teleporter": state.teleporter,
        "gauge": state.gauge,
        "stand_in": state.stand_in,
        "accepted": _told(state.accepted),
    }
    return {path: each for name, part in parts.items() for path, each in flattened(part, name).items()}


def restored_parts(fresh: MetaState, saved: Mapping[str, Tensor]) -> MetaState:
    """Undoes `saved_parts`; the rule's state is that of `fresh`.

    Raises:
        ValueError: if the saved state does not fit the model and its symmetries.
    """
    like = fresh.progress.start
    changes: dict[str, Any] = {
        name: unflattened(getattr(fresh, name), saved, name) for name in ("progress", "teleporter", "gauge")
    }
    if "stand_in/length" in saved:
        change = _under(saved, "stand_in/change/", like)
        plain = StandIn(like, like, like, {})
        found = dataclasses.replace(unflattened(plain, saved, "stand_in"), change=change)
        changes["stand_in"] = found if bool((found.length > 0).all()) else None
    if "accepted/loss" in saved:
        parts: dict[str, Any] = {name: _under(saved, f"accepted/{name}/", like) for name in _KEPT}
        changes["accepted"] = Point(**parts, loss=saved["accepted/loss"].to(like))
    return dataclasses.replace(fresh, **changes)


def renamed(path: str, names: Mapping[str, str]) -> str:
    """A path of `saved_parts` with the parameter at its end renamed, if `names` has a new name for it.

    Example:
        >>> renamed("accepted/gradients/0.weight", {"0.weight": "3"})
        'accepted/gradients/3'
    """
    for place in _BY_PARAMETER:
        name = path.removeprefix(place)
        if name != path and name in names:
            return place + names[name]
    return path


def fingerprint(meta: nn.Module) -> Tensor:
    """A hash of the networks' weights, to tell checkpoints apart."""
    digest = hashlib.blake2b(digest_size=7)
    for name, value in meta.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().double().numpy().tobytes())
    return torch.tensor(int.from_bytes(digest.digest(), "little"))


_BY_PARAMETER = ("accepted/parameters/", "accepted/gradients/", "stand_in/change/")
_KEPT = ("parameters", "gradients", "activations", "cotangents")


def _told(point: Point | None) -> dict[str, Any] | None:
    return None if point is None else {**{name: getattr(point, name) for name in _KEPT}, "loss": point.loss}


def _under(saved: Mapping[str, Tensor], prefix: str, like: Tensor) -> Tensors:
    return {path.removeprefix(prefix): value.to(like) for path, value in saved.items() if path.startswith(prefix)}
