"""The point where a teleport between two steps starts, and its consequences; nothing here writes to the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metateleport.capture import PassRecorder, RecordedPass
from metateleport.linalg import first_not_finite
from metateleport.point import Point, Tensors
from metateleport.symmetries import Pair, Symmetry
from metateleport.teleporters import Teleporter
from metateleport.teleporters.once import relative_change, split_inputs

__all__ = [
    "Consequences",
    "NothingSeen",
    "Start",
    "consequences_of",
    "pass_to_start_from",
    "relative_drift",
    "start_of",
]


class NothingSeen(RuntimeError):
    """There is no forward pass, or no gradient, that a teleport could start from."""


def pass_to_start_from(recorder: PassRecorder, example_input: Any) -> RecordedPass:
    """The last forward pass that has had a backward pass; else the last forward pass; else one on the example input.

    Raises:
        NothingSeen: if there is none of these.
    """
    recorded, problem = recorder.last, ""
    if recorded is None:
        problem = (
            "there was no forward pass of the model since the last step (passes under torch.no_grad() do not count)"
        )
        if recorder.silent:
            problem = f"{problem}: {recorder.silent}"
    elif recorded.training != recorder.model.training:
        modes = ("evaluation", "training")
        problem = (
            f"the last forward pass was in {modes[recorded.training]} mode and the model now is in "
            f"{modes[recorder.model.training]} mode"
        )
    if recorded is not None and not problem:
        if recorder.silent and recorder.modules:
            recorder.complete(recorded)
        return recorded
    if example_input is None:
        raise NothingSeen(
            f"cannot teleport: {problem}. Call the model and backward() before step(), or give example_input="
        )
    return recorder.evaluate(*split_inputs(example_input))


class Start(NamedTuple):
    """Where a teleport starts.

    Args:
        point: the point.
        symmetries: the symmetries that can be moved along from there.
        left_out: for each of the others a sentence that says why not.
        reason: why a teleport cannot start there at all; empty if it can.
    """

    point: Point
    symmetries: tuple[Symmetry, ...]
    left_out: tuple[str, ...] = ()
    reason: str = ""


def start_of(
    recorder: PassRecorder,
    recorded: RecordedPass,
    named: Mapping[str, nn.Parameter],
    symmetries: Sequence[Symmetry],
    loss: Tensor | None,
) -> Start:
    """The point that a teleport starts from, in float32 or better, and the symmetries that it can move along.

    Args:
        recorder: of the model.
        recorded: the forward pass to start from.
        named: the model's parameters, with the gradients that the optimizer is about to use.
        symmetries: the symmetries to move along.
        loss: the loss, where it is known.
    """
    gradients = {
        name: _single(value.grad.detach())
        for name, value in named.items()
        if value.grad is not None and value.grad.layout == torch.strided
    }
    point = Point(
        parameters={name: _single(value.detach()) for name, value in named.items()},
        gradients=gradients,
        activations=recorder.activations(recorded),
        loss=loss,
    )
    usable, left_out = [], []
    for symmetry in symmetries:
        why = _unusable(symmetry, point, recorded, named)
        if why:
            left_out.append(f"{symmetry!r}: {why}")
        else:
            usable.append(symmetry)
    begun = Start(point, tuple(usable), tuple(left_out))
    reason = _not_finite(point, recorded) or ("; ".join(left_out) if symmetries and not usable else "")
    rebuilding = [each for each in usable if each.exactness == "batch-exact" and isinstance(each, Pair)]
    if reason or not rebuilding or not gradients:
        return begun._replace(reason=reason)
    cotangents = recorder.cotangents(recorded)
    factor, reason = _factor(rebuilding, point, cotangents)
    scaled = {name: factor * value for name, value in cotangents.items()}
    pullback = recorder.pullback(recorded, point.parameters, gradients)
    return begun._replace(point=point.replace(cotangents=scaled, pullback=pullback), reason=reason)


def _unusable(symmetry: Symmetry, point: Point, recorded: RecordedPass, named: Mapping[str, nn.Parameter]) -> str:
    """A sentence that says why a symmetry cannot be moved along after this pass; empty if it can."""
    missing = [name for name in symmetry.parameters if name not in named]
    if missing:
        return f"the model has no parameter {missing[0]!r} any more"
    frozen = [name for name in symmetry.parameters if not named[name].requires_grad]
    if frozen:
        return f"{frozen[0]!r} is frozen (requires_grad=False) now"
    unused = [name for name in symmetry.modules if name not in point.activations]
    if unused:
        return f"the module {unused[0]!r} did not run in the last forward pass"
    sparse = [name for name in symmetry.parameters if named[name].grad is not None and name not in point.gradients]
    if sparse:
        return f"the gradient of {sparse[0]!r} is sparse"
    repeated = [name for name in symmetry.modules if name in recorded.repeated]
    if repeated and symmetry.exactness != "exact":
        return f"the module {repeated[0]!r} ran several times in the last forward pass"
    return ""


def _not_finite(point: Point, recorded: RecordedPass) -> str:
    if point.loss is not None and not bool(point.loss.isfinite().all()):
        return f"the loss is not finite ({float(point.loss)})"
    lost = first_not_finite(point.gradients)
    if lost:
        return f"the gradient of {lost!r} is not finite"
    if recorded.outputs and not any(value.numel() for value in recorded.outputs):
        return "the batch is empty"
    return ""


def _single(value: Tensor) -> Tensor:
    """A half-precision tensor in float32, as group elements are; others as they are."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _factor(rebuilding: Sequence[Pair], point: Point, cotangents: Tensors) -> tuple[float, str]:
    """The number that, times the gradients of the recorded pass, gives `p.grad`; and a sentence if there is none.

    The gradient of a layer follows from its inputs and the cotangent on its outputs; it is compared with `p.grad`.
    """
    found: float | None = None
    for symmetry in rebuilding:
        name = symmetry.second_weight
        if name not in point.gradients:
            continue
        if symmetry.second not in cotangents:
            return (
                1.0,
                f"the backward pass through {symmetry.second!r} was not seen; {symmetry.kind} rebuilds part of it",
            )
        seen, given = cotangents[symmetry.second].mT @ point.activations[symmetry.second], point.gradients[name]
        scale, size = float(seen.square().sum()), float(given.norm())
        factor = float((seen * given).sum()) / scale if scale > 0 else 0.0
        tolerance = math.sqrt(torch.finfo(seen.dtype).eps)
        fits = float((given - factor * seen).norm()) <= tolerance * size
        if not fits or (found is not None and size > 0 and not math.isclose(factor, found, rel_tol=tolerance)):
            return 1.0, (
                f"the gradient of {name!r} is no multiple of the last pass's (accumulated, or clipped entry by entry); "
                f"{symmetry.kind} rebuilds part of that pass"
            )
        found = factor if size > 0 else found
    return (1.0 if found is None else found), ""


@dataclasses.dataclass(frozen=True)
class Consequences:
    """The consequences that a teleport would have.

    Args:
        drift: relative change of the outputs, or of the loss if the teleporter keeps only the loss.
        loss_change: change of the loss; to first order in the drift where it was not evaluated; NaN if the gradient on
            the outputs is not known either.
        reason: why the teleport may not be carried out; empty if it may.
        broken: the same reason if it is a drift beyond the bound or a value that is not finite; else empty.
    """

    drift: float = 0.0
    loss_change: float = 0.0
    reason: str = ""
    broken: str = ""


def consequences_of(
    recorder: PassRecorder, recorded: RecordedPass, start: Point, arrived: Point, teleporter: Teleporter
) -> Consequences:
    """Measures the consequences of a teleport before anything is written.

    Args:
        recorder: of the model.
        recorded: the forward pass that the teleport started from. It is repeated at the arrival, for a third of an
            evaluation, unless the teleporter keeps only the loss.
        start: where it starts.
        arrived: where it ends.
        teleporter: says whether outputs or loss are kept, and by how much they may change.
    """
    keeps, bound = teleporter.keeps, teleporter.trust_region.max_drift
    stale = [name for name in start.gradients if name in arrived.stale]
    if stale:
        return Consequences(reason=f"the gradient of {stale[0]!r} could not be rebuilt")
    lost = first_not_finite(arrived.parameters) or first_not_finite(
        {name: arrived.gradients[name] for name in start.gradients}
    )
    if lost:
        reason = f"the value or the gradient of {lost!r} would not be finite"
        return Consequences(reason=reason, broken=reason)
    if keeps == "outputs":
        after = recorder.replay(recorded, arrived.parameters)
        drift = relative_drift(recorded.outputs, after)
    else:
        assert start.loss is not None
        assert arrived.loss is not None
        drift = relative_change(start.loss, arrived.loss)
    if not drift <= bound:
        broken = f"the {keeps} would change by {drift:.1e}, more than {bound:g}"
        return Consequences(drift, reason=broken, broken=broken)
    if not teleporter.needs_symmetries:
        # The teleporter has evaluated the loss at the arrival.
        return Consequences(drift, float(arrived.loss) - float(start.loss))  # type: ignore[arg-type]
    # After several passes the gradient on the outputs of the last one does not give the change of the whole loss.
    if recorder.passes != 1 or not recorded.output_cotangents:
        return Consequences(drift, float("nan"))
    change = sum(
        float((cotangent.double() * (after[place].double() - recorded.outputs[place].double())).sum())
        for place, cotangent in recorded.output_cotangents.items()
    )
    return Consequences(drift, change)


def relative_drift(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Relative change of a model's outputs, all of them taken as one vector."""
    return relative_change(
        *(torch.cat([each.detach().double().reshape(-1) for each in side]) for side in (before, after))
    )
