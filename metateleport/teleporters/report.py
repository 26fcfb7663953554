"""Reports of teleports."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters.base import Move
from metateleport.teleporters.failures import (
    FAILURES,
    NO_GAIN,
    UNSTABLE,
    WORSE_HELD_OUT,
    add_failure,
    held_out_failure,
)

__all__ = [
    "TeleportReport",
    "failures_of",
    "gain_of",
    "gradient_norm",
    "half_squared_norm",
    "moved_names",
    "not_made",
    "relative_change",
    "summary_of",
]

_NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class TeleportReport:
    """What one teleport did.

    Args:
        teleporter: the teleporter's name.
        accepted: false if everything proposed was refused; the weights are then unchanged.
        reason: why it was refused, for all or some symmetries, or why nothing moved (size 0); empty otherwise.
        loss_before: loss before the teleport; NaN where no loss was seen.
        loss_after: loss after it; NaN where no loss was seen.
        drift: relative change of what the teleporter keeps: the model's outputs on the inputs, in the Frobenius norm,
            or the loss.
        gradient_norm_before: norm of the gradient before; NaN where there was none.
        gradient_norm_after: norm of the gradient after; NaN where there was none.
        size: Frobenius norm of the generators of all symmetries together.
        sizes: Frobenius norm of the generator of each symmetry, in the order of the symmetries.
        weight_decay_change: change of half the squared norm of the moved parameters, which weight decay pulls on.
        evaluations: gradient evaluations spent; a forward pass alone counts a third.
        state: how the optimizer's state was treated, one of `transport`, `keep`, `reset`, `approximate`; empty
            without an optimizer.
        state_entries: what became of each entry of the optimizer's state: `exact`, `approximate`, `kept` or `reset`.
        seconds: wall time of choosing and moving; NaN where it was not taken.
        gain: relative change of the objective, summed over the moves, positive in the intended direction; NaN without
            an objective.
        held_out_before: loss on held-out data before; NaN where there was none.
        held_out_after: loss on held-out data after.
        held_out_drift: relative change of the outputs on held-out data.
        failures: those of `metateleport.teleporters.FAILURES` that occurred, each with what was observed, at once or by
            an optimizer in later steps.
        stretch: the largest factor by which all teleports of an optimizer together, this one included, have stretched,
            shrunk or unbalanced anything; NaN where that is not kept.
    """

    teleporter: str
    accepted: bool
    reason: str
    loss_before: float
    loss_after: float
    drift: float
    gradient_norm_before: float
    gradient_norm_after: float
    size: float
    sizes: tuple[float, ...]
    weight_decay_change: float
    evaluations: float
    state: str = ""
    state_entries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = _NAN
    gain: float = _NAN
    held_out_before: float = _NAN
    held_out_after: float = _NAN
    held_out_drift: float = _NAN
    failures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stretch: float = _NAN


def not_made(teleporter: str, reason: str, state: str = "") -> TeleportReport:
    """The report of a teleport that was not tried.

    Example:
        >>> report = not_made("random", "there was no forward pass")
        >>> report.accepted, report.size, report.reason
        (False, 0.0, 'there was no forward pass')
    """
    return TeleportReport(
        teleporter=teleporter,
        accepted=False,
        reason=reason,
        loss_before=_NAN,
        loss_after=_NAN,
        drift=0.0,
        gradient_norm_before=_NAN,
        gradient_norm_after=_NAN,
        size=0.0,
        sizes=(),
        weight_decay_change=0.0,
        evaluations=0.0,
        state=state,
    )


def relative_change(before: Tensor, after: Tensor) -> float:
    """Relative change in the Frobenius norm, computed in float64; infinite where a value is not finite."""
    old, new = before.detach().double(), after.detach().double()
    if not bool(new.isfinite().all()):
        return float("inf")
    scale = float(torch.linalg.vector_norm(old))
    return float(torch.linalg.vector_norm(new - old)) / max(scale, torch.finfo(torch.float64).tiny)


def summary_of(moves: Sequence[Move]) -> tuple[float, tuple[float, ...], str, float]:
    """Size, sizes in the order of the symmetries, reasons of refusal and evaluations of a single model's moves."""
    sizes = tuple(float(move.size) for move in reversed(moves))
    reasons = "; ".join(f"{move.symmetry!r}: {move.reason}" for move in moves if bool(move.refused))
    return sum(size**2 for size in sizes) ** 0.5, sizes, reasons, float(sum(float(move.evaluations) for move in moves))


def gain_of(moves: Sequence[Move]) -> float:
    """Relative gain of a single model's moves together; NaN without an objective."""
    gains = [float(move.gain) for move in moves if move.gain is not None]
    return sum(gains) if gains else _NAN


def failures_of(
    moves: Sequence[Move],
    drift: float = 0.0,
    broken: str = "",
    eps: float = 0.0,
    held_out: tuple[float, float] = (_NAN, _NAN),
) -> dict[str, str]:
    """The failures of a single model's teleport that show at once, by name, in the order of `FAILURES`.

    Args:
        moves: what it did, or would have done.
        drift: relative change of what it has to keep, of what was proposed.
        broken: why its end was refused, where it was; empty otherwise.
        eps: spacing of numbers that the drift is seen in; zero where it is not meant to be rounding alone.
        held_out: loss on held-out data before and after.

    Example:
        >>> failures_of([], held_out=(1.0, 2.0))
        {'worse held-out loss': '2 right after it, 1 before'}
    """
    seen: dict[str, str] = {}
    # One symmetry may lose what another gains twice.
    gained = gain_of(moves)
    if not (gained > 0 or math.isnan(gained)):
        seen = add_failure(seen, NO_GAIN, f"what was sought changed by {gained:.1e}, relatively")
    for text in dict.fromkeys(move.failures.get(UNSTABLE, "") for move in moves):
        seen = add_failure(seen, UNSTABLE, text)
    meant_to_hold = eps > 0 and all(move.symmetry.exactness != "approximate" for move in moves)
    if broken:
        seen = add_failure(seen, UNSTABLE, broken)
    elif meant_to_hold and drift > math.sqrt(eps):
        seen = add_failure(
            seen, UNSTABLE, f"the outputs change by {drift:.1e}: more than half of their digits are lost"
        )
    seen = add_failure(seen, WORSE_HELD_OUT, held_out_failure(*held_out, "right after it"))
    return {name: seen[name] for name in FAILURES if name in seen}


def half_squared_norm(tensors: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """Half the sum of squares of the named tensors."""
    norms = (torch.linalg.vector_norm(tensors[name].detach(), dtype=torch.float64) for name in names)
    return sum(0.5 * float(norm) ** 2 for norm in norms)


def moved_names(symmetries: Sequence[Symmetry]) -> tuple[str, ...]:
    """Names of the parameters that some symmetries move, each once."""
    return tuple(dict.fromkeys(name for symmetry in symmetries for name in symmetry.parameters))


def gradient_norm(point: Point) -> float:
    """Norm of the gradient of a single model; NaN where there is none."""
    return float(point.squared_gradient_norm()) ** 0.5 if point.gradients and not point.stale else _NAN
