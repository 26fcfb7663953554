"""Teleporting a model once, in place, for people with a training loop of their own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.capture import point_of
from metateleport.detection import exact_symmetries
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters.base import Move, Teleporter, travel

__all__ = ["TeleportReport", "relative_change", "split_inputs", "summary_of", "teleport"]

_NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class TeleportReport:
    """What one teleport did.

    Args:
        teleporter: the teleporter's name.
        accepted: false where all that was proposed was refused; the weights are then as they were.
        reason: why it was refused, wholly or for some symmetries; empty otherwise.
        loss_before: loss before the teleport; NaN where no loss was seen.
        loss_after: loss after it; NaN where no loss was seen.
        drift: relative change of the model's outputs on the inputs, in the Frobenius norm.
        gradient_norm_before: norm of the gradient before; NaN where there was none.
        gradient_norm_after: norm of the gradient after; NaN where there was none.
        size: Frobenius norm of the generators of all symmetries together.
        sizes: Frobenius norm of the generator of each symmetry, in the order of the symmetries.
        weight_decay_change: change of half the squared norm of the moved parameters, which weight decay pulls on.
        evaluations: gradient evaluations spent; a forward pass alone counts a third.
        state: how the optimizer's state came along, one of `transport`, `keep`, `reset`, `approximate`; empty
            without an optimizer.
        state_entries: what became of each entry of the optimizer's state: `exact`, `approximate`, `kept` or `reset`.
        signatures: signs that the teleport failed, by name, each with what was seen; empty where there are none. An
            optimizer adds those that later steps show.
        held_out_before: held-out loss before it; NaN where none was asked for.
        held_out_after: held-out loss right after it; NaN where none was asked for.
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
    signatures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    held_out_before: float = _NAN
    held_out_after: float = _NAN


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of a model from a tensor, a tuple or a dict."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


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


def half_squared_norm(tensors: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """Half the sum of squares of the named tensors."""
    return sum(0.5 * float(tensors[name].detach().double().square().sum()) for name in names)


def moved_names(symmetries: Sequence[Symmetry]) -> tuple[str, ...]:
    """Names of the parameters that some symmetries move, each once."""
    return tuple(dict.fromkeys(name for symmetry in symmetries for name in symmetry.parameters))


def teleport(
    model: nn.Module,
    teleporter: Teleporter,
    inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    symmetries: Sequence[Symmetry] | None = None,
) -> TeleportReport:
    """Moves a model once along its symmetries, in place.

    A teleport that breaks the teleporter's trust region, or changes the outputs on `inputs` by more than its
    `max_drift`, is refused: the weights then stay bit for bit as they were.

    Args:
        model: the model; its parameters are overwritten, its gradients and buffers are not touched. Dropout draws
            the same in both passes, which leave the global random state as it was.
        teleporter: chooses the group elements.
        inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        loss: maps the outputs to a scalar; only needed by teleporters that look at gradients.
        symmetries: those to move along, in the order of the data flow; the exact ones are found if not given, which
            takes a trace of the model: find them once and give them where teleports are many.

    Returns:
        The report.

    Raises:
        ValueError: if the teleporter needs a loss and there is none, or no symmetry is given or found.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 1)).double()
        >>> from metateleport.teleporters import RandomTeleporter
        >>> report = teleport(model, RandomTeleporter(size=1.0, seed=0), torch.ones(2, 3).double())
        >>> report.accepted, report.drift < 1e-12
        (True, True)
    """
    if teleporter.needs_gradient and loss is None:
        raise ValueError(f"{type(teleporter).__name__} looks at gradients: pass loss=, a callable on the outputs")
    if symmetries is None:
        symmetries = exact_symmetries(model, inputs)
    if not symmetries:
        raise ValueError("there is no symmetry to move along: leave symmetries= out to have them found")
    positional, keywords = split_inputs(inputs)
    with _same_draws(model):
        point, outputs = point_of(model, symmetries, positional, keywords, loss)
    with torch.no_grad():
        arrived, moves, _ = travel(teleporter, point, symmetries)
    size, sizes, reason, evaluations = summary_of(moves)
    with _same_draws(model):
        after = _evaluate(model, arrived, positional, keywords)
    drift = relative_change(outputs, after)
    kept = drift <= teleporter.trust_region.max_drift
    if not kept:
        reason = f"the outputs would change by {drift:.1e}, more than {teleporter.trust_region.max_drift:g}"
    moved = kept and size > 0
    names = moved_names(symmetries)
    buffers = {name for symmetry in symmetries for name in symmetry.buffers}
    if moved:
        with torch.no_grad():
            for name, value in (*model.named_parameters(), *model.named_buffers()):
                if name in names or name in buffers:
                    value.copy_(arrived.parameters[name])
    here = arrived if moved else point
    return TeleportReport(
        teleporter=teleporter.name,
        accepted=moved or not reason,
        reason=reason,
        loss_before=_NAN if point.loss is None else float(point.loss),
        loss_after=_NAN if loss is None else float(loss(after if moved else outputs)),
        drift=drift if moved else 0.0,
        gradient_norm_before=gradient_norm(point),
        gradient_norm_after=gradient_norm(here),
        size=size if moved else 0.0,
        sizes=sizes if moved else tuple(0.0 for _ in sizes),
        weight_decay_change=half_squared_norm(here.parameters, names) - half_squared_norm(point.parameters, names),
        evaluations=evaluations + (1.0 if loss is not None else 1 / 3) + 1 / 3,
    )


def gradient_norm(point: Point) -> float:
    """Norm of the gradient of a single model; NaN where there is none."""
    return float(point.squared_gradient_norm()) ** 0.5 if point.gradients and not point.stale else _NAN


@contextlib.contextmanager
def _same_draws(model: nn.Module) -> Iterator[None]:
    """Draws random numbers (dropout) from a fixed seed, so that two passes can be compared; then as before."""
    devices = {value.device for value in model.parameters() if value.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def _evaluate(model: nn.Module, point: Point, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        return torch.func.functional_call(model, {**buffers, **point.parameters}, positional, keywords)
