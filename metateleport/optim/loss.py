"""The loss as a function of the weights, between two steps, for teleporters that evaluate it elsewhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.capture import PassRecorder, RecordedPass
from metateleport.optim.closure import scalar
from metateleport.point import Point
from metateleport.teleporters import Teleporter
from metateleport.teleporters.free import gradients_at

__all__ = ["Known", "check_loss", "know_loss"]


@dataclasses.dataclass(frozen=True)
class Known:
    """A point that knows its loss as a function of the weights.

    Args:
        point: where to start. For a teleporter without symmetries its gradients are those of the loss function.
        evaluations: gradient evaluations that were spent on this.
        factor: the number that makes those gradients equal to `p.grad`.
        reason: why no teleport can start here; empty if one can.
    """

    point: Point
    evaluations: float = 0.0
    factor: float = 1.0
    reason: str = ""


def check_loss(teleporter: Teleporter, loss: Any) -> None:
    """Raises if a step that teleports lacks the loss that its teleporter needs.

    Raises:
        TypeError: if the loss is not a function.
        ValueError: if there is no loss and the teleporter evaluates it.
    """
    known = isinstance(loss, Tensor | float | int) and not teleporter.needs_loss
    if loss is not None and not callable(loss) and not known:
        raise TypeError(f"loss is a function from the model's outputs to the loss, not a {type(loss).__name__}")
    if teleporter.needs_loss and loss is None:
        raise ValueError(
            f"{type(teleporter).__name__} evaluates the loss at other weights: give it to the step as a function of "
            "the model's outputs, step(closure, loss=lambda outputs: ...)"
        )


def know_loss(
    recorder: PassRecorder,
    recorded: RecordedPass,
    point: Point,
    loss: Callable[[Any], Tensor],
    named: Mapping[str, nn.Parameter],
    groups: Sequence[dict[str, Any]],
    free: bool,
) -> Known:
    """Gives a point the loss as a function, on the recorded pass's inputs and with its draws.

    The function is evaluated at the current weights and compared with the loss that the closure returned, which costs a
    third of a gradient evaluation. For a teleporter without symmetries its gradient is evaluated there too, one
    evaluation. If `p.grad` is a multiple of that gradient, it is known after the teleport as well; else not.

    Args:
        recorder: of the model.
        recorded: the forward pass to start from.
        point: where to start, with `p.grad`, and with the closure's loss if there is one.
        loss: maps the model's outputs to the loss.
        named: the model's parameters.
        groups: the optimizer's parameter groups, whose parameters may move.
        free: whether the teleporter moves along no symmetry.

    Raises:
        ValueError: if the function is not the closure's loss, or does not return a scalar.
    """

    def loss_at(parameters: Mapping[str, Tensor]) -> Tensor:
        value = recorder.outputs_at(recorded, parameters, loss)
        if value.numel() != 1:
            raise ValueError(f"loss= has to return a scalar; it returned shape {tuple(value.shape)}")
        return value.reshape(())

    told, known = point.loss, point.replace(loss_at=loss_at)
    if not free:
        if told is None:
            return Known(known)
        with torch.no_grad():
            _compare(told, loss_at(point.parameters), recorder.passes)
        return Known(known, evaluations=1 / 3)
    held = {id(value) for group in groups for value in group["params"]}
    left = [n for n, value in named.items() if value.grad is not None and (n not in point.gradients)]
    left += [name for name in point.gradients if id(named[name]) not in held or not named[name].requires_grad]
    if left:
        reason = f"the gradient of {left[0]!r} would stay that of the old weights (sparse, frozen, or held elsewhere)"
        return Known(known, reason=reason)
    value, gradients = gradients_at(known, {})
    if told is not None:
        _compare(told, value, recorder.passes)
    factor = _factor(point.gradients, gradients)
    start = known.replace(loss=scalar(value), gradients=gradients)
    if factor is None:
        reason = "the gradients are no multiple of those of loss= on the last pass (accumulated, or clipped by entry)"
        return Known(start, 1.0, reason=reason)
    return Known(start, 1.0, factor)


def _compare(told: Tensor, value: Tensor, passes: int) -> None:
    closure, ours = float(told), float(value)
    if not math.isfinite(closure) or not math.isfinite(ours):
        return
    tolerance = math.sqrt(torch.finfo(value.dtype).eps)
    if abs(closure - ours) > tolerance * max(abs(closure), abs(ours)):
        raise ValueError(
            f"loss= gives {ours:.6g} where the closure returned {closure:.6g} after {passes} forward passes: it has "
            "to be the closure's loss, a function of the outputs of one pass alone (no penalty on the weights)"
        )


def _factor(given: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> float | None:
    """The number that, times the fresh gradients, gives the given ones; None if there is none."""
    squares = sum(float(value.double().square().sum()) for value in fresh.values())
    both = sum(float((value.double() * given[name].double()).sum()) for name, value in fresh.items())
    factor = both / squares if squares > 0 else 0.0
    off = sum(float((given[name].double() - factor * value.double()).square().sum()) for name, value in fresh.items())
    size = sum(float(value.double().square().sum()) for value in given.values())
    eps = max((torch.finfo(value.dtype).eps for value in fresh.values()), default=0.0)
    return factor if math.isfinite(off) and off <= eps * size else None
