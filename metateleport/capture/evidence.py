"""What the recorded pass says of the gradients that an optimizer is about to use."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from metateleport.capture.passes import RecordedPass
from metateleport.capture.recorder import PassRecorder
from metateleport.point import Tensors

__all__ = ["Evidence", "evidence_of"]

_ROUGH = 3e-2
"""How well gradients agree where some of the pass was in half precision."""

_WHOLE = 0.5
"""Share of the last pass's own gradient that a sum over several passes has at least, unless something shortened it."""


_DIRECTIONS = 4
"""Along so many random directions of the outputs the two are compared."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What of the recorded pass may be used beside the gradients.

    Args:
        activations: inputs of modules, samples in rows; empty where the gradients are not that pass's.
        cotangents: gradients on their outputs, times the factor that makes them those of the gradients.
        loss_fits: whether the gradients are those of the loss that was told, and no multiple of them.
        checked: whether there was anything to hold against them.

    Example:
        >>> Evidence().loss_fits
        False
    """

    activations: Tensors = dataclasses.field(default_factory=dict)
    cotangents: Tensors = dataclasses.field(default_factory=dict)
    loss_fits: bool = False
    checked: bool = False


def evidence_of(recorder: PassRecorder, gradients: Tensors) -> Evidence:
    r"""Holds the recorded pass against the gradients.

    A linear layer's gradient follows from the cotangent $c$ on its outputs and its inputs $h$, as $c^\top h$; that of
    its bias is the sum of $c$ over the samples. Up to one positive factor for each tensor that has to be the gradient:
    so it is with clipping, loss scaling and the average over replicas. One that does not agree, as of a sum over
    several passes or clipped entry by entry, says that the pass tells nothing of the others either.

    The two are compared along a few random directions $v$ of the outputs, $(c v)^\top h$ with $v^\top G$: that costs
    hardly more than reading them, where $c^\top h$ would cost a third of the pass. A difference hides from all of the
    directions with probability zero.

    Args:
        recorder: of the model.
        gradients: by parameter name, in the working precision, one task dimension in front.

    Returns:
        The evidence, in the working precision, one task dimension in front.
    """
    recorded = recorder.last
    if recorded is None:
        return Evidence()
    dtype = next(iter(gradients.values())).dtype
    activations = _stacked(recorder.activations(recorded), dtype)
    cotangents = _stacked(recorder.cotangents(recorded), dtype)
    if any(not value.shape[-2] for value in activations.values()):
        # An empty batch.
        return Evidence()
    pairs = {name: _held_against(name, value, activations, gradients) for name, value in cotangents.items()}
    compared = _compared({name: pair for name, pair in pairs.items() if pair is not None})
    tolerance = _ROUGH if _is_rough(recorded) else math.sqrt(torch.finfo(dtype).eps)
    factors: dict[str, float] = {}
    agree, whole = True, True
    for name, (seen, given, factor, apart) in compared.items():
        if not seen or not given:
            agree = agree and not given
            continue
        agree = agree and factor > 0 and apart <= tolerance * given
        whole = whole and factor > _WHOLE
        factors[name] = factor
    if not agree:
        return Evidence(loss_fits=whole and recorder.reached > 1, checked=True)
    if not factors:
        # One pass, of whose modules none has a gradient that follows from what it saw.
        return Evidence(activations, cotangents) if recorder.reached == 1 else Evidence()
    fits = all(abs(each - 1) <= tolerance for each in factors.values())
    if not fits:
        usual = math.exp(sum(math.log(each) for each in factors.values()) / len(factors))
        cotangents = {name: value * factors.get(name, usual) for name, value in cotangents.items()}
    return Evidence(activations, cotangents, loss_fits=fits, checked=True)


def _is_rough(recorded: RecordedPass) -> bool:
    """Whether a module has worked in half precision, of its own or under autocast."""
    half = (torch.float16, torch.bfloat16)
    return any(
        run.input.dtype in half or (run.output is not None and run.output[1] in half)
        for runs in recorded.runs.values()
        for run in runs
    )


def _stacked(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    floating = {name: value for name, value in tensors.items() if value.is_floating_point()}
    return {name: value.to(dtype).unsqueeze(0) for name, value in floating.items()}


def _held_against(
    name: str, cotangent: Tensor, activations: Tensors, gradients: Tensors
) -> tuple[Tensor, Tensor] | None:
    """A gradient as the pass gives it and as it is, along some directions; None where the pass does not tell."""
    weight, bias = gradients.get(f"{name}.weight"), gradients.get(f"{name}.bias")
    inputs = activations.get(name)
    if weight is not None and weight.ndim == 3 and inputs is not None:
        if inputs.shape[-2] == cotangent.shape[-2] and weight.shape[1:] == (cotangent.shape[-1], inputs.shape[-1]):
            directions = _directions(weight.shape[1], weight.dtype, weight.device)
            return (cotangent[0] @ directions).T @ inputs[0], directions.T @ weight[0]
        return None
    if bias is not None and bias.shape[1:] == cotangent.shape[-1:]:
        return cotangent.sum(-2), bias
    return None


def _compared(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[float, float, float, float]]:
    """Norms of what is seen and what is given, the factor between them, and the norm of what it leaves, by name.

    The device is waited for once.
    """
    if not pairs:
        return {}
    rows = []
    for pair in pairs.values():
        seen, given = (each.double().flatten() for each in pair)
        scale = seen @ seen
        factor = torch.where(scale > 0, (seen @ given) / scale, 0.0)
        rows.append(torch.stack((scale.sqrt(), given.norm(), factor, (given - factor * seen).norm())))
    return dict(zip(pairs, torch.stack(rows).tolist(), strict=True))


@functools.lru_cache(maxsize=256)
def _directions(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Directions to compare along, in columns, the same ones always; of few outputs all."""
    if size <= _DIRECTIONS:
        return torch.eye(size, dtype=dtype, device=device)
    source = torch.Generator().manual_seed(size)
    return torch.randn(size, _DIRECTIONS, generator=source, dtype=torch.float64).to(device, dtype)
