"""Teleports a model once, in place, in any training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.capture import point_of
from metateleport.detection import exact_symmetries
from metateleport.detection.draws import seeded
from metateleport.detection.given import check_model, copied, inside, mapped
from metateleport.detection.trace import observables
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters.base import Move, Teleporter, travel
from metateleport.teleporters.precision import change_of, drift_bound, widened
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
    frozen: bool = False,
) -> TeleportReport:
    """Moves a model once, in place.

    A teleport is refused, and the weights stay bit for bit, if it breaks the teleporter's trust region or changes the
    outputs on `inputs` by more than its `max_drift` (the loss, for a teleporter that keeps the loss only). Weights in
    half precision are moved in float32 and rounded at the end; a drift of eight roundings is then allowed.

    Args:
        model: the model; its parameters are overwritten, its gradients and buffers are not touched. It may output a
            tensor or any container of tensors. Dropout draws the same in all passes, which leave the global random
            state as it was. Of a wrapped model (compiled, on several devices) the inner one is moved.
        teleporter: chooses the group elements.
        inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; the model gets copies.
        loss: maps the outputs to a scalar; needed only by teleporters that read gradients or the loss.
        symmetries: those to move along, in the order of the data flow; the exact ones are found if not given. Finding
            traces the model: for many teleports, find them once and pass them.
        held_out: inputs and loss of other data, to report the loss there; costs two forward passes, which are counted.
        frozen: whether symmetries that are found may move parameters that are frozen (`requires_grad=False`).

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
        raise ValueError(f"{type(teleporter).__name__} needs gradients: pass loss=, a function of the outputs")
    model = inside(model)
    check_model(model)
    if not teleporter.needs_symmetries:
        symmetries = ()
    elif symmetries is None:
        symmetries = exact_symmetries(model, inputs, frozen=frozen)
    if not symmetries and teleporter.needs_symmetries:
        raise ValueError("there is no symmetry to move along: leave symmetries= out to have them found")
    _check_names(model, symmetries)
    positional, keywords = copied(split_inputs(inputs))
    with seeded(model), _dense_gradients(model):
        point, outputs = point_of(model, symmetries, positional, keywords, loss, teleporter.watches(model))
    passes = _Passes(model, inputs, {name: value.dtype for name, value in point.parameters.items()})
    if loss is not None:
        everything = point.parameters
        point = point.replace(loss_at=lambda parameters: passes.loss_at({**everything, **parameters}, loss))
    start = widened(point)
    device = next(model.parameters()).device
    began = now(device)
    with torch.no_grad():
        arrived, moves, _ = travel(teleporter, start, symmetries)
    seconds = now(device) - began
    size, sizes, reason, evaluations = summary_of(moves)
    after = passes.outputs(arrived.parameters)
    drift = change_of(outputs, after) if teleporter.keeps == "outputs" else change_of(point.loss, loss(after))  # type: ignore[misc]
    seen = [value.dtype for value in observables(outputs) if value.is_floating_point()]
    eps = max((torch.finfo(each).eps for each in seen), default=0.0)
    bound = drift_bound(teleporter.trust_region.max_drift, [*seen, *passes.dtypes.values()])
    moved = drift <= bound and size > 0
    broken = "" if drift <= bound else f"the {teleporter.keeps} would change by {drift:.1e}, more than {bound:g}"
    refused = broken or reason
    here = arrived if moved else start
    before_after, held_out_drift = (_NAN, _NAN), _NAN
    if held_out is not None:
        before_after, held_out_drift = _on_held_out(passes, start, here, *held_out)
    if moved:
        _write(model, arrived, moves)
    names = moved_names([move.symmetry for move in moves])
    return TeleportReport(
        teleporter=teleporter.name,
        accepted=moved or not refused,
        reason=refused or ("" if size > 0 else "every element that was chosen is the identity: nothing moves"),
        loss_before=_NAN if point.loss is None else float(point.loss),
        loss_after=_NAN if loss is None else float(loss(after if moved else outputs)),
        drift=drift if moved else 0.0,
        gradient_norm_before=gradient_norm(start),
        gradient_norm_after=gradient_norm(here),
        size=size if moved else 0.0,
        sizes=sizes if moved else tuple(0.0 for _ in sizes),
        weight_decay_change=half_squared_norm(here.parameters, names) - half_squared_norm(start.parameters, names),
        evaluations=evaluations + (1.0 if loss is not None else 1 / 3) + 1 / 3 + (held_out is not None) * 2 / 3,
        seconds=seconds,
        gain=gain_of(moves) if moved else _NAN,
        held_out_before=before_after[0],
        held_out_after=before_after[1],
        held_out_drift=held_out_drift,
        failures=failures_of(moves, drift, broken, eps, before_after),
    )


class _Passes:
    """Forward passes of one model, all on the same random numbers and on copies of its inputs and buffers.

    Parameters are given to it as wide as they were computed in; the model gets them in its own dtypes.

    Args:
        model: the model.
        inputs: as `teleport` takes them.
        dtypes: of parameters and buffers, by name.
    """

    def __init__(self, model: nn.Module, inputs: Any, dtypes: Mapping[str, torch.dtype]) -> None:
        self.model, self.inputs, self.dtypes = model, inputs, dtypes

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Any = None, graph: bool = False) -> Any:
        """The model's outputs at some parameters, on its own inputs if no others are given."""
        positional, keywords = copied(split_inputs(self.inputs if inputs is None else inputs))
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        narrow = {name: value.to(self.dtypes[name]) for name, value in parameters.items()}
        narrow = narrow if graph else {name: value.detach() for name, value in narrow.items()}
        # With gradients where nothing requires any too: a model may differentiate by what it is given.
        with torch.enable_grad(), seeded(self.model), _dense_gradients(self.model):
            found = torch.func.functional_call(self.model, {**buffers, **narrow}, positional, keywords)
        return found if graph else mapped(found, Tensor.detach)

    def loss_at(self, parameters: Mapping[str, Tensor], loss: Callable[[Any], Tensor]) -> Tensor:
        """The loss at some parameters, in the graph."""
        return loss(self.outputs(parameters, graph=torch.is_grad_enabled()))


@contextlib.contextmanager
def _dense_gradients(model: nn.Module) -> Iterator[None]:
    """Embeddings with sparse gradients give dense ones meanwhile: sparse ones cannot be differentiated again."""
    sparse = [module for module in model.modules() if getattr(module, "sparse", None) is True]
    for module in sparse:
        setattr(module, "sparse", False)  # noqa: B010
    try:
        yield
    finally:
        for module in sparse:
            setattr(module, "sparse", True)  # noqa: B010


def _check_names(model: nn.Module, symmetries: Sequence[Symmetry]) -> None:
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for symmetry in symmetries:
        unknown = [name for name in (*symmetry.parameters, *symmetry.buffers) if name not in known]
        if unknown:
            raise ValueError(f"{symmetry!r} moves {unknown[0]!r}, which this {type(model).__name__} does not have")


def now(device: torch.device) -> float:
    """Wall seconds, after the device has finished."""
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
    passes: _Passes, start: Point, here: Point, inputs: Any, loss: Callable[[Any], Tensor]
) -> tuple[tuple[float, float], float]:
    """Loss on held-out data before and after, and the relative change of the outputs there."""
    found = [passes.outputs(point.parameters, inputs) for point in (start, here)]
    return (float(loss(found[0])), float(loss(found[1]))), change_of(*found)
