"""Teleporting a model once, in place, for people with a training loop of their own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.capture import point_of
from metateleport.detection import exact_symmetries
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters.base import Move, Teleporter, travel
from metateleport.teleporters.report import (
    TeleportReport,
    failures_of,
    gain_of,
    gradient_norm,
    half_squared_norm,
    moved_names,
    relative_change,
    summary_of,
)

__all__ = [
    "TeleportReport",
    "gradient_norm",
    "half_squared_norm",
    "moved_names",
    "now",
    "relative_change",
    "split_inputs",
    "summary_of",
    "teleport",
]

_NAN = float("nan")


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of a model from a tensor, a tuple or a dict."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def teleport(
    model: nn.Module,
    teleporter: Teleporter,
    inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    symmetries: Sequence[Symmetry] | None = None,
    held_out: tuple[Any, Callable[[Any], Tensor]] | None = None,
) -> TeleportReport:
    """Moves a model once, in place: along its symmetries, or wherever a teleporter without symmetries leads.

    A teleport that breaks the teleporter's trust region, or changes the outputs on `inputs` (the loss, for one that
    keeps the loss alone) by more than its `max_drift`, is refused: the weights then stay bit for bit as they were.

    Args:
        model: the model; its parameters are overwritten, its gradients and buffers are not touched. Dropout draws
            the same in all passes, which leave the global random state as it was.
        teleporter: chooses the group elements.
        inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        loss: maps the outputs to a scalar; only needed by teleporters that look at gradients or at the loss.
        symmetries: those to move along, in the order of the data flow; the exact ones are found if not given, which
            takes a trace of the model: find them once and give them where teleports are many.
        held_out: inputs and loss of other data, to see what becomes of the loss there; two forward passes, counted.

    Returns:
        The report.

    Raises:
        ValueError: if the teleporter needs a loss and there is none, or a symmetry and none is given or found.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 1)).double()
        >>> from metateleport.teleporters import RandomTeleporter
        >>> report = teleport(model, RandomTeleporter(size=1.0, seed=0), torch.ones(2, 3).double())
        >>> report.accepted, report.drift < 1e-12
        (True, True)
    """
    if (teleporter.needs_gradient or teleporter.needs_loss) and loss is None:
        raise ValueError(f"{type(teleporter).__name__} looks at gradients: pass loss=, a callable on the outputs")
    if not teleporter.needs_symmetries:
        symmetries = ()
    elif symmetries is None:
        symmetries = exact_symmetries(model, inputs)
    if not symmetries and teleporter.needs_symmetries:
        raise ValueError("there is no symmetry to move along: leave symmetries= out to have them found")
    positional, keywords = split_inputs(inputs)
    with _same_draws(model):
        point, outputs = point_of(model, symmetries, positional, keywords, loss, teleporter.watches(model))
    if point.loss_at is not None:
        point = point.replace(loss_at=_drawing_the_same(model, point.loss_at))
    device = next(model.parameters()).device
    began = now(device)
    with torch.no_grad():
        arrived, moves, _ = travel(teleporter, point, symmetries)
    seconds = now(device) - began
    size, sizes, reason, evaluations = summary_of(moves)
    with _same_draws(model):
        after = _evaluate(model, arrived, positional, keywords)
    kept, changed = (outputs, after) if teleporter.keeps == "outputs" else (point.loss, loss(after))  # type: ignore[misc]
    drift = relative_change(kept, changed)  # type: ignore[arg-type]
    bound = teleporter.trust_region.max_drift
    moved = drift <= bound and size > 0
    broken = "" if drift <= bound else f"the {teleporter.keeps} would change by {drift:.1e}, more than {bound:g}"
    reason = broken or reason
    here = arrived if moved else point
    before_after, held_out_drift = (_NAN, _NAN), _NAN
    if held_out is not None:
        before_after, held_out_drift = _on_held_out(model, point, here, *held_out)
    if moved:
        _write(model, arrived, moves)
    names = moved_names([move.symmetry for move in moves])
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
        evaluations=evaluations + (1.0 if loss is not None else 1 / 3) + 1 / 3 + (held_out is not None) * 2 / 3,
        seconds=seconds,
        gain=gain_of(moves) if moved else _NAN,
        held_out_before=before_after[0],
        held_out_after=before_after[1],
        held_out_drift=held_out_drift,
        failures=failures_of(moves, drift, broken, torch.finfo(outputs.dtype).eps, before_after),
    )


@contextlib.contextmanager
def _same_draws(model: nn.Module) -> Iterator[None]:
    """Draws random numbers (dropout) from a fixed seed, so that two passes can be compared; then as before."""
    devices = {value.device for value in model.parameters() if value.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def _drawing_the_same(
    model: nn.Module, loss_at: Callable[[Mapping[str, Tensor]], Tensor]
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def evaluate(parameters: Mapping[str, Tensor]) -> Tensor:
        with _same_draws(model):
            return loss_at(parameters)

    return evaluate


def now(device: torch.device) -> float:
    """Wall seconds, once the device is through with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _write(model: nn.Module, arrived: Point, moves: Sequence[Move]) -> None:
    moved = {name for move in moves for name in (*move.symmetry.parameters, *move.symmetry.buffers)}
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name in moved:
                value.copy_(arrived.parameters[name])


def _on_held_out(
    model: nn.Module, start: Point, here: Point, inputs: Any, loss: Callable[[Any], Tensor]
) -> tuple[tuple[float, float], float]:
    """Loss on held-out data before and after, and the relative change of the outputs there."""
    positional, keywords = split_inputs(inputs)
    found = []
    for point in (start, here):
        with _same_draws(model):
            found.append(_evaluate(model, point, positional, keywords))
    return (float(loss(found[0])), float(loss(found[1]))), relative_change(*found)


def _evaluate(model: nn.Module, point: Point, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        return torch.func.functional_call(model, {**buffers, **point.parameters}, positional, keywords)
