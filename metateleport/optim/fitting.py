"""Whether a checkpoint, a model and its parameters go together, found out before any work."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.detect import symmetries_of
from metateleport.detection import exact_symmetries
from metateleport.gauges import gauge_symmetries
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.symmetries import Symmetry, Unsuitable

__all__ = ["check_parameters", "fitting_symmetries", "replicated"]


def replicated() -> bool:
    """Whether this process is one of several that train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def check_parameters(groups: Sequence[dict[str, Any]]) -> None:
    """Raises a `ValueError` if parameters are of a kind that no step is taken on.

    Args:
        groups: parameter groups, as `torch.optim` makes them.
    """
    parameters: list[Tensor] = [value for group in groups for value in group["params"]]
    for value in parameters:
        kind = type(value).__name__
        if kind == "FlatParameter" or _is_sharded(value):
            raise ValueError(
                "a learned step reads whole tensors, and these parameters are sharded (FSDP, DTensor): train replicas "
                "with DistributedDataParallel, or use an optimizer of torch.optim"
            )
    devices = {value.device for value in parameters}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"the parameters are on several devices ({names}), and one learned step reads them together: make one "
            "LearnedOptimizer for the parameters of each device"
        )


def _is_sharded(value: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def fitting_symmetries(
    model: nn.Module,
    meta: MetaOptimizer,
    called: str,
    symmetries: Sequence[Symmetry] | None,
    example_input: Any,
) -> tuple[Symmetry, ...]:
    """The symmetries that an optimizer goes on with; found in the model if not given.

    Where none can be found training goes on without them, and one warning says what to give. So does one where none of
    the networks serves any of them.

    Args:
        model: the model.
        meta: the meta-optimizer.
        called: the checkpoint's name, as warnings call it.
        symmetries: those given, or None.
        example_input: of the model, or None.

    Raises:
        ValueError: if a symmetry that was given names what the model does not have, or moves a buffer.
    """
    if symmetries is not None:
        found = tuple(symmetries)
        _check_given(found, model)
    else:
        if not meta.reads_symmetries:
            return ()
        try:
            if example_input is not None:
                found = tuple(exact_symmetries(model, example_input, buffers=False))
            else:
                found = tuple(symmetries_of(model))
        except Unsuitable as error:
            advice = "" if example_input is not None else "give example_input= to have them found in any model, or "
            warnings.warn(
                f"LearnedOptimizer goes on without symmetries: {error}. To teleport, {advice}name them with "
                "symmetries=; symmetries=[] says that none are wanted",
                stacklevel=4,
            )
            return ()
    _say_what_serves(meta, called, found)
    return found


def _check_given(symmetries: Sequence[Symmetry], model: nn.Module) -> None:
    named, modules = dict(model.named_parameters()), dict(model.named_modules())
    for symmetry in symmetries:
        if symmetry.buffers:
            raise ValueError(f"{symmetry!r} moves a buffer, and an optimizer moves parameters: leave it out")
        unknown = [name for name in symmetry.parameters if name not in named]
        unknown += [name for name in symmetry.modules if name not in modules]
        if unknown:
            raise ValueError(f"{symmetry!r} names {unknown[0]!r}, which the model does not have")


def _say_what_serves(meta: MetaOptimizer, called: str, symmetries: Sequence[Symmetry]) -> None:
    if not symmetries:
        return
    gauged = () if meta.gauge is None else gauge_symmetries(symmetries, meta.config.gauge == "linearised")
    has: set[str] = set() if meta.gauge is None else set(meta.gauge.networks)
    served = any(each.group.name in has for each in gauged)
    if meta.teleporter is not None:
        served = served or any(meta.teleporter.serves(each) for each in symmetries)
    if served or (meta.gauge is None and meta.teleporter is None):
        return
    groups = ", ".join(sorted({each.group.name for each in symmetries}))
    warnings.warn(
        f"{called} has networks for symmetries of {', '.join(meta.config.groups)}, and this model's are of {groups}: "
        "its learned steps are taken without teleports and gauges",
        stacklevel=5,
    )
