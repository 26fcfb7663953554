"""Inputs and outputs of modules: which of their tensors counts, and its layout with samples in rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from metateleport.symmetries import Symmetry

__all__ = [
    "at_least_single",
    "channel_modules",
    "copied",
    "first_input",
    "input_of",
    "is_compiled",
    "modules_of",
    "named_module",
    "output_of",
    "rows",
    "tensors_in",
    "unwrapped",
]


def rows(tensor: Tensor, batch: int = 0, channels: bool = False) -> Tensor:
    """A module's input or output with samples in rows, `(*batch, samples, features)`.

    Args:
        tensor: `(*batch, samples, ..., features)`, or `(*batch, samples, channels, ...)` for convolutions; a vector
            is one sample, a scalar one sample of one feature.
        batch: number of batch dimensions in front.
        channels: whether the features are in the dimension after the samples, as for convolutions, and not last.

    Example:
        >>> rows(torch.zeros(8, 3, 5, 5), channels=True).shape
        torch.Size([200, 3])
    """
    if channels:
        tensor = tensor.movedim(batch + 1, -1)
    while tensor.ndim < batch + 2:
        tensor = tensor.unsqueeze(batch)
    return tensor.reshape(*tensor.shape[:batch], -1, tensor.shape[-1])


def modules_of(symmetries: Iterable[Symmetry]) -> tuple[str, ...]:
    """Names of the modules that symmetries read, each once."""
    return tuple(dict.fromkeys(name for symmetry in symmetries for name in symmetry.modules))


def channel_modules(model: nn.Module, modules: Iterable[str]) -> dict[str, bool]:
    """Which of the named modules are convolutions, whose features are in the dimension after the samples."""
    named = dict(model.named_modules(remove_duplicate=False))
    return {name: isinstance(named[name], (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for name in modules}


def first_input(inputs: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> Tensor:
    """A module's input: its first argument, positional or by keyword."""
    return inputs[0] if inputs else next(iter(keywords.values()))


def named_module(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The named modules of a model.

    Raises:
        KeyError: if the model has no such module.
    """
    named, names = dict(model.named_modules(remove_duplicate=False)), tuple(names)
    missing = [name for name in names if name not in named]
    if missing:
        raise KeyError(f"the model has no module named {missing[0]!r}; it has {', '.join(map(repr, named))}")
    return {name: named[name] for name in names}


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside `torch.compile`, `nn.DataParallel` and the like, and the prefix that they give its names.

    Example:
        >>> inner = nn.Linear(2, 1)
        >>> found, prefix = unwrapped(nn.DataParallel(inner))
        >>> found is inner, prefix
        (True, 'module.')
    """
    prefix = ""
    while True:
        if isinstance(model, nn.DataParallel | DistributedDataParallel):
            model, prefix = model.module, f"{prefix}module."
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model, prefix = model._orig_mod, f"{prefix}_orig_mod."  # type: ignore[assignment]
        else:
            return model, prefix


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` has wrapped a model, alone or inside other wrappers."""
    return "_orig_mod." in unwrapped(model)[1]


def input_of(inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor | None:
    """The first tensor among a module's arguments; None if there is none."""
    return next((each for each in (*inputs, *keywords.values()) if isinstance(each, Tensor)), None)


def output_of(output: Any) -> Tensor | None:
    """A module's output tensor, the first of several; None if there is none."""
    return output if isinstance(output, Tensor) else next(iter(tensors_in(output)), None)


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output: a tensor, or tuples, lists, dicts and dataclasses of them.

    Example:
        >>> [t.shape[0] for t in tensors_in({"logits": torch.ones(2), "states": (torch.ones(3), None)})]
        [2, 3]
    """
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for each in value.values() for tensor in tensors_in(each)]
    if isinstance(value, tuple | list):
        return [tensor for each in value for tensor in tensors_in(each)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for field in dataclasses.fields(value) for t in tensors_in(getattr(value, field.name))]
    return []


def copied(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda value: value.detach().clone(), inputs)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
