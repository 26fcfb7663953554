"""Where a teleport between two steps starts, and what it would do: nothing here writes to the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.capture import PassRecorder, RecordedPass
from metateleport.point import Point, Tensors
from metateleport.symmetries import Pair, Symmetry
from metateleport.teleporters import Teleporter
from metateleport.teleporters.once import relative_change, split_inputs

__all__ = ["Consequences", "consequences_of", "pass_to_start_from", "relative_drift", "start_of"]


def pass_to_start_from(watch: PassRecorder, example_input: Any) -> RecordedPass:
    """The last forward pass, or one on the example where there was none.

    Raises:
        RuntimeError: if there is neither.
    """
    caught, problem = watch.last, ""
    if caught is None:
        problem = (
            "there was no forward pass of the model since the last step (passes under torch.no_grad() do not count)"
        )
    elif caught.training != watch.model.training:
        modes = ("evaluation", "training")
        problem = (
            f"the last forward pass was in {modes[caught.training]} mode and the model now is in "
            f"{modes[watch.model.training]} mode"
        )
    if caught is not None and not problem:
        return caught
    if example_input is None:
        raise RuntimeError(
            f"cannot teleport: {problem}. Call the model and backward() before step(), or give example_input="
        )
    return watch.evaluate(*split_inputs(example_input))


def start_of(
    watch: PassRecorder,
    caught: RecordedPass,
    named: Mapping[str, nn.Parameter],
    symmetries: Sequence[Symmetry],
    loss: Tensor | None,
) -> tuple[Point, str]:
    """The point that a teleport starts from.

    Args:
        watch: of the model.
        caught: the forward pass to start from.
        named: the model's parameters, with the gradients that the optimizer is about to use.
        symmetries: those to move along.
        loss: the loss, where it is known.

    Returns:
        The point, and why a teleport cannot start there; empty if it can.
    """
    gradients = {
        name: value.grad.detach()
        for name, value in named.items()
        if value.grad is not None and not value.grad.is_sparse
    }
    point = Point(
        parameters={name: value.detach() for name, value in named.items()},
        gradients=gradients,
        activations=watch.activations(caught),
        loss=loss,
    )
    for symmetry in symmetries:
        missing = [name for name in symmetry.modules if name not in point.activations]
        if missing:
            return point, f"the module {missing[0]!r} did not run in the last forward pass"
        frozen = [name for name in symmetry.parameters if not named[name].requires_grad]
        if frozen:
            return point, f"{frozen[0]!r} is frozen (requires_grad=False) now"
    rebuilding = [each for each in symmetries if each.exactness == "batch-exact" and isinstance(each, Pair)]
    if not rebuilding or not gradients:
        return point, ""
    cotangents = watch.cotangents(caught)
    factor, reason = _factor(rebuilding, point, cotangents)
    scaled = {name: factor * value for name, value in cotangents.items()}
    return point.replace(cotangents=scaled, pullback=watch.pullback(caught, point.parameters, gradients)), reason


def _factor(rebuilding: Sequence[Pair], point: Point, cotangents: Tensors) -> tuple[float, str]:
    """What the gradients of the caught pass have to be multiplied by to be `p.grad`, and why there is no such number.

    The gradient of a layer follows from the cotangent on its outputs and its inputs: it is held against `p.grad`.
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
    """What a teleport would do.

    Args:
        drift: relative change of the outputs, or of the loss where that is all that has to stay.
        loss_change: change of the loss, to first order in the drift where it was not evaluated; NaN where the gradient
            on the outputs is not known either.
        reason: why it may not be carried out; empty if it may.
        broken: the same, where it is for what would come of it: a drift beyond the bound, values that are not finite.
    """

    drift: float = 0.0
    loss_change: float = 0.0
    reason: str = ""
    broken: str = ""


def consequences_of(
    watch: PassRecorder, caught: RecordedPass, start: Point, arrived: Point, teleporter: Teleporter
) -> Consequences:
    """Looks at a teleport's end before anything is written.

    Args:
        watch: of the model.
        caught: the forward pass that the teleport started from; it is repeated at the end, a third of an evaluation,
            unless the loss is all that has to stay.
        start: where it starts.
        arrived: where it ends.
        teleporter: says what has to stay, and by how much it may change.
    """
    keeps, bound = teleporter.keeps, teleporter.trust_region.max_drift
    stale = [name for name in start.gradients if name in arrived.stale]
    if stale:
        return Consequences(reason=f"the gradient of {stale[0]!r} could not be rebuilt")
    values = [*arrived.parameters.items(), *((name, arrived.gradients[name]) for name in start.gradients)]
    lost = [name for name, value in values if not bool(value.isfinite().all())]
    if lost:
        reason = f"the value or the gradient of {lost[0]!r} would not be finite"
        return Consequences(reason=reason, broken=reason)
    if keeps == "outputs":
        after = watch.replay(caught, arrived.parameters)
        drift = relative_drift(caught.outputs, after)
    else:
        assert start.loss is not None
        assert arrived.loss is not None
        drift = relative_change(start.loss, arrived.loss)
    if not drift <= bound:
        broken = f"the {keeps} would change by {drift:.1e}, more than {bound:g}"
        return Consequences(drift, reason=broken, broken=broken)
    if not teleporter.needs_symmetries:
        # It has evaluated the loss where it went.
        return Consequences(drift, float(arrived.loss) - float(start.loss))  # type: ignore[arg-type]
    # The gradient on the outputs of the last pass says nothing of others before it.
    if watch.passes != 1 or not caught.output_cotangents:
        return Consequences(drift, float("nan"))
    change = sum(
        float((cotangent.double() * (after[place].double() - caught.outputs[place].double())).sum())
        for place, cotangent in caught.output_cotangents.items()
    )
    return Consequences(drift, change)


def relative_drift(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Relative change of a model's outputs, all of them taken as one vector."""
    return relative_change(
        *(torch.cat([each.detach().double().reshape(-1) for each in side]) for side in (before, after))
    )
