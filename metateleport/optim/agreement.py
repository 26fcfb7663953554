"""What the recorded pass says of the gradients that an optimizer is about to use."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from metateleport.capture import PassRecorder, RecordedPass
from metateleport.point import Tensors

__all__ = ["Evidence", "evidence_of"]

_ROUGH = 3e-2
"""How well gradients agree where some of the pass was in half precision."""

_WHOLE = 0.5
"""Share of the last pass's own gradient that a sum over several passes has at least, unless something shortened it."""


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
    tolerance = _ROUGH if _is_rough(recorded) else math.sqrt(torch.finfo(dtype).eps)
    factors: dict[str, float] = {}
    agree, whole = True, True
    for name, cotangent in cotangents.items():
        pair = _held_against(name, cotangent, activations, gradients)
        if pair is None:
            continue
        seen, given = pair
        size, scale = float(given.norm()), float(seen.square().sum())
        if not size or not scale:
            agree = agree and not size
            continue
        factor = float((seen * given).sum()) / scale
        agree = agree and factor > 0 and float((given - factor * seen).norm()) <= tolerance * size
        whole = whole and factor > _WHOLE
        factors[name] = factor
    if not agree:
        return Evidence(loss_fits=whole and recorder.reached > 1, checked=True)
    if not factors:
        # One pass, of whose modules none has a gradient that follows from what it saw.
        return Evidence(activations, cotangents) if recorder.reached == 1 else Evidence()
    usual = math.exp(sum(math.log(each) for each in factors.values()) / len(factors))
    scaled = {name: value * factors.get(name, usual) for name, value in cotangents.items()}
    fits = all(abs(each - 1) <= tolerance for each in factors.values())
    return Evidence(activations, scaled, loss_fits=fits, checked=True)


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
    """A gradient as the pass gives it, and as it is; None where the pass does not tell."""
    weight, bias = gradients.get(f"{name}.weight"), gradients.get(f"{name}.bias")
    inputs = activations.get(name)
    if weight is not None and weight.ndim == 3 and inputs is not None:
        if inputs.shape[-2] == cotangent.shape[-2] and weight.shape[1:] == (cotangent.shape[-1], inputs.shape[-1]):
            return cotangent.mT @ inputs, weight
        return None
    if bias is not None and bias.shape[1:] == cotangent.shape[-1:]:
        return cotangent.sum(-2), bias
    return None
