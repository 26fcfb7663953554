"""Parameters as a stack of one task in one working precision, and the state that is kept for each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.learned.rules import UpdateRule
from metateleport.point import Tensors

__all__ = [
    "dense_gradient",
    "known_state",
    "master",
    "raised",
    "replicated",
    "rule_state",
    "stacked_pullback",
    "trainable",
    "update_entries",
    "within",
    "working_dtype",
    "write",
    "write_all",
]

_SMALLEST = 0.04
"""Smallest root mean square of a tensor that bounds on its steps are computed from."""

REACH = "reach"
"""Entry of a parameter's state: the bound on its steps."""

COMPENSATION = "compensation"
"""Entry of a parameter's state: the rounding error of its half-precision weights."""


Entries = MutableMapping[str, Tensor]


def trainable(parameter: Tensor) -> bool:
    """Whether a step can be taken on a parameter now: it has a gradient, requires one and is not empty.

    Example:
        >>> trainable(nn.Parameter(torch.ones(2)))
        False
    """
    return parameter.grad is not None and parameter.requires_grad and parameter.numel() > 0


def working_dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that steps are computed in: float64 if a parameter is float64 or complex128, else float32.

    Example:
        >>> working_dtype({"w": torch.ones(1, dtype=torch.bfloat16)})
        torch.float32
    """
    wide = any(value.dtype in (torch.float64, torch.complex128) for value in parameters.values())
    return torch.float64 if wide else torch.float32


def raised(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the working precision with a task dimension in front: complex numbers as pairs, scalars as vectors.

    Args:
        tensor: a parameter or its gradient, detached.
        dtype: the working precision.

    Returns:
        `(1, *shape)`, of at least two dimensions; a view where nothing has to be converted.

    Example:
        >>> raised(torch.ones(3, dtype=torch.complex64), torch.float32).shape
        torch.Size([1, 3, 2])
    """
    if tensor.is_complex():
        # A lazily conjugated tensor has no view as pairs of real numbers.
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.ndim == 0:
        tensor = tensor.reshape(1)
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).unsqueeze(0)


def dense_gradient(parameter: Tensor) -> Tensor:
    """A parameter's gradient as a dense tensor."""
    assert parameter.grad is not None
    gradient = parameter.grad.detach()
    return gradient.to_dense() if gradient.layout != torch.strided else gradient


def write(parameter: Tensor, value: Tensor, state: dict[str, Tensor]) -> None:
    """Writes a value of the working precision into a parameter.

    In half precision a step is often smaller than the spacing of the numbers and would be lost. So the rounding error
    is kept, in half precision too, and `master` adds it again (Kahan summation).

    Args:
        parameter: overwritten.
        value: `(1, *shape)`, as `raised` gives it.
        state: the parameter's state; gets the entry `compensation` in half precision.
    """
    flat = value.squeeze(0)
    if parameter.is_complex():
        parameter.copy_(torch.view_as_complex(flat.contiguous()).reshape(parameter.shape))
        return
    flat = flat.reshape(parameter.shape)
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    if half:
        largest = torch.finfo(parameter.dtype).max
        flat = flat.clamp(-largest, largest)
    parameter.copy_(flat)
    if half:
        state[COMPENSATION] = (flat - parameter.to(flat.dtype)).to(parameter.dtype)


def write_all(values: Sequence[tuple[Tensor, Tensor]], states: Mapping[Tensor, dict[str, Tensor]]) -> None:
    """`write` for several parameters: in one call those that need nothing else.

    Args:
        values: parameters, and what is written into them.
        states: of the parameters.
    """
    plain = [pair for pair in values if pair[0].dtype == pair[1].dtype and pair[0].shape == pair[1].shape[1:]]
    if plain:
        torch._foreach_copy_([parameter for parameter, _ in plain], [value.squeeze(0) for _, value in plain])
    if len(plain) < len(values):
        known = {id(parameter) for parameter, _ in plain}
        for parameter, value in values:
            if id(parameter) not in known:
                write(parameter, value, states[parameter])


def stacked_pullback(
    single: Callable[[str, Tensor], tuple[Tensors, Tensors]],
) -> Callable[[str, Tensor], tuple[Tensors, Tensors]]:
    """The pullback of a model as the pullback of a stack of one task."""

    def pullback(module: str, cotangent: Tensor) -> tuple[Tensors, Tensors]:
        gradients, cotangents = single(module, cotangent.squeeze(0))
        return _unsqueezed(gradients), _unsqueezed(cotangents)

    return pullback


def _unsqueezed(tensors: Tensors) -> Tensors:
    return {name: value.unsqueeze(0) for name, value in tensors.items()}


def within(start: Tensor, value: Tensor, state: dict[str, Tensor]) -> Tensor:
    """A step shortened to half of its tensor's norm at the first step: near zero weights curvature bounds are too low.

    The norm is that at the first step, so that weights which grow without end do so linearly and not exponentially.

    Args:
        start: where the step starts, `(1, *shape)`.
        value: where it leads.
        state: the parameter's state; gets the entry `reach` at the first step.

    Example:
        >>> within(torch.ones(1, 2), torch.full((1, 2), 5.0), {})
        tensor([[1.5000, 1.5000]])
    """
    if REACH not in state:
        state[REACH] = 0.5 * start.norm().clamp_min(_SMALLEST * start.numel() ** 0.5)
    step, reach = value - start, state[REACH]
    return start + step * (reach / step.norm().clamp_min(torch.finfo(step.dtype).tiny)).clamp_max(1.0)


def master(parameter: Tensor, dtype: torch.dtype, state: Mapping[str, Tensor]) -> Tensor:
    """A parameter in the working precision, `(1, *shape)`, with the rounding error that `write` kept added."""
    value = raised(parameter.detach(), dtype)
    kept = state.get(COMPENSATION)
    return value if kept is None else value + raised(kept, dtype)


def rule_state(
    rule: UpdateRule, whole: Mapping[str, Any] | None, entries: Mapping[str, Entries], fresh: Mapping[str, Any]
) -> dict[str, Any]:
    """A rule's state for the tensors of one step; tensors that are stepped for the first time get a fresh state.

    Args:
        rule: says which entries of its state are kept for each tensor.
        whole: its other entries; None before the first step.
        entries: what is kept for each tensor, by its name.
        fresh: the rule's initial state for all tensors.
    """
    # Fresh entries may share memory: loading a state dict in place would then write one over the other.
    fresh = _copied(fresh)
    state = {**fresh, **(whole or {})}
    for entry in rule.per_tensor:
        kept = {}
        for name, own in fresh[entry].items():
            if isinstance(own, tuple):
                parts = [f"{entry}.{index}" for index in range(len(own))]
                known = all(part in entries[name] for part in parts)
                kept[name] = tuple(entries[name][part] for part in parts) if known else own
            else:
                kept[name] = entries[name].get(entry, own)
        state[entry] = kept
    return state


def known_state(rule: UpdateRule, whole: Mapping[str, Any], entries: Mapping[str, Entries]) -> dict[str, Any]:
    """A rule's state if all tensors have been stepped before.

    Args:
        rule: says which entries of its state are kept for each tensor.
        whole: its other entries.
        entries: what is kept for each tensor, by its name.
    """
    state = dict(whole)
    for entry in rule.per_tensor:
        kept: dict[str, Any] = {}
        for name, own in entries.items():
            kept[name] = own.get(entry)
            if kept[name] is None:
                count = sum(key.startswith(f"{entry}.") for key in own)
                kept[name] = tuple(own[f"{entry}.{index}"] for index in range(count))
        state[entry] = kept
    return state


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_copied(each) for each in value)
    return value


def update_entries(rule: UpdateRule, state: Mapping[str, Any], entries: Mapping[str, Entries]) -> dict[str, Any]:
    """Writes a rule's entries for each tensor into the tensors' states; returns the other entries."""
    for entry in rule.per_tensor:
        for name, value in state[entry].items():
            if isinstance(value, tuple):
                entries[name].update({f"{entry}.{index}": part for index, part in enumerate(value)})
            else:
                entries[name][entry] = value
    return {key: value for key, value in state.items() if key not in rule.per_tensor}


def replicated() -> bool:
    """Whether this process is one of several that train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
