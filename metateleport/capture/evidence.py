"""Whether a recorded pass belongs to the gradients that an optimizer is about to use, and what it adds to them."""

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
"""Relative tolerance between gradients if a part of the pass was in half precision."""

_WHOLE = 0.5
"""A sum over several passes has at least this share of the last pass's gradient in it, unless it was shortened."""


_DIRECTIONS = 4
"""Number of random directions of the outputs along which gradients are compared."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The part of a recorded pass that may be used beside the gradients.

    Args:
        activations: inputs of modules, samples in rows; empty if the gradients are not those of the recorded pass.
        cotangents: gradients on the modules' outputs, scaled by the factor between the pass and the gradients.
        loss_fits: whether the gradients are those of the recorded pass's loss itself, and not of a multiple of it.
        checked: whether the pass had anything to compare the gradients with.

    Example:
        >>> Evidence().loss_fits
        False
    """

    activations: Tensors = dataclasses.field(default_factory=dict)
    cotangents: Tensors = dataclasses.field(default_factory=dict)
    loss_fits: bool = False
    checked: bool = False


def evidence_of(recorder: PassRecorder, gradients: Tensors) -> Evidence:
    r"""Compares the recorded pass with the gradients.

    The gradient of a linear layer is $c^\top h$, with $h$ its inputs and $c$ the cotangent on its outputs; the gradient
    of its bias is the sum of $c$ over the samples. The actual gradient $G$ has to be that, up to one positive factor
    for each tensor, as left by clipping, loss scaling and the average over replicas. If one tensor does not agree, as
    after several passes or clipping entry by entry, the pass is used for none of them.

    The two are compared along a few random directions $v$ of the outputs, $(c v)^\top h$ with $v^\top G$. That costs
    hardly more than reading them, where $c^\top h$ would cost a third of the pass. The probability that a difference is
    zero along all directions is zero.

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
        # No module's gradient can be compared; after a single pass there is no doubt whose gradients these are.
        return Evidence(activations, cotangents) if recorder.reached == 1 else Evidence()
    fits = all(abs(each - 1) <= tolerance for each in factors.values())
    if not fits:
        usual = math.exp(sum(math.log(each) for each in factors.values()) / len(factors))
        cotangents = {name: value * factors.get(name, usual) for name, value in cotangents.items()}
    return Evidence(activations, cotangents, loss_fits=fits, checked=True)


def _is_rough(recorded: RecordedPass) -> bool:
    """Whether a module ran in half precision, of its own or under autocast."""
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
    """A gradient computed from the pass, and the actual one, along some directions; None if the pass gives none."""
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
    """By name the norms of computed and actual gradient, the factor between them, and the norm of the rest.

    The device is synchronised once.
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
    """Directions to compare along, in columns, always the same; the whole basis if there are few outputs."""
    if size <= _DIRECTIONS:
        return torch.eye(size, dtype=dtype, device=device)
    source = torch.Generator().manual_seed(size)
    return torch.randn(size, _DIRECTIONS, generator=source, dtype=torch.float64).to(device, dtype)
