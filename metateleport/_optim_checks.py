"""What a teleporting optimizer is asked to do, held against the model and the inner optimizer before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport._optim_teleport import relative_drift
from metateleport.capture import PassRecorder
from metateleport.point import Point
from metateleport.symmetries import Symmetry, Unsuitable
from metateleport.teleporters import Teleporter

__all__ = ["check_kinds", "check_parameters", "check_symmetries", "checked_state", "try_symmetries"]


_STATES = ("transport", "keep", "reset")


def check_kinds(optimizer: Any, teleporter: Any, held_out: Any, window: Any) -> None:
    """Raises a `TypeError` or a `ValueError` if an argument is not of its kind."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"the first argument is a torch.optim optimizer, not a {type(optimizer).__name__}")
    if not isinstance(teleporter, Teleporter):
        raise TypeError(f"the teleporter is a metateleport.Teleporter, not a {type(teleporter).__name__}")
    if held_out is not None and not callable(held_out):
        raise TypeError(
            f"held_out is a function that returns the loss on held-out data, not a {type(held_out).__name__}"
        )
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window is a number of steps, an integer of at least 1, not {window!r}")


def checked_state(state: Any, optimizer: torch.optim.Optimizer, teleporter: Teleporter) -> str:
    """What becomes of the optimizer's state in a teleport: what was asked for, or what is usual.

    Args:
        state: one of `transport`, `keep` and `reset`, or None.
        optimizer: the inner one.
        teleporter: there is nothing to transport by where it moves along no symmetry.

    Raises:
        ValueError: if it is none of these, or not defined under the teleporter.
    """
    if state not in (None, *_STATES):
        raise ValueError(f"state is one of {', '.join(_STATES)}, not {state!r}")
    if state == "transport" and not teleporter.needs_symmetries:
        raise ValueError(
            f"state='transport' is not defined under {type(teleporter).__name__}, which moves the weights along no "
            "symmetry: there is no group element to carry the state by; choose 'keep' or 'reset'"
        )
    if state is None and teleporter.needs_symmetries:
        return "transport"
    # What L-BFGS remembers are differences between points, of which one is no longer there.
    usual = "reset" if isinstance(optimizer, torch.optim.LBFGS) else "keep"
    return usual if state is None else str(state)


def check_parameters(groups: Sequence[dict[str, Any]], model: nn.Module) -> None:
    """Raises a `ValueError` if parameter groups hold what is not the model's."""
    known = {id(value) for value in model.parameters()}
    for group in groups:
        parameters = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        tensors = [each[1] if isinstance(each, tuple) else each for each in parameters]
        foreign = [each for each in tensors if id(each) not in known]
        if foreign:
            raise ValueError(
                f"the optimizer holds a parameter of shape {tuple(foreign[0].shape)} that is not the model's: make it "
                "from this model's parameters(), after the model is built"
            )


def check_symmetries(symmetries: Sequence[Symmetry], optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises a `ValueError` if a symmetry moves what the model lacks, the optimizer does not hold or is frozen."""
    if not symmetries:
        raise ValueError("there is no symmetry to move along: leave symmetries= out to have them found")
    named, modules = dict(model.named_parameters()), dict(model.named_modules())
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    for symmetry in symmetries:
        if symmetry.buffers:
            raise ValueError(
                f"{symmetry!r} moves the buffer {symmetry.buffers[0]!r}, and an optimizer moves parameters: leave it "
                "out, or move along it with metateleport.teleport"
            )
        for name in symmetry.modules:
            if name not in modules:
                raise ValueError(f"{symmetry!r} wants to see the module {name!r}, which the model does not have")
        for name in symmetry.parameters:
            if name not in named:
                raise ValueError(f"{symmetry!r} moves {name!r}, which the model does not have")
            if not named[name].requires_grad:
                raise ValueError(f"{symmetry!r} moves {name!r}, which is frozen: leave the symmetry out")
            if id(named[name]) not in held:
                raise ValueError(
                    f"{symmetry!r} moves {name!r}, which the optimizer does not hold: give it to the optimizer, or "
                    "leave the symmetry out"
                )


def try_symmetries(
    watch: PassRecorder,
    symmetries: Sequence[Symmetry],
    positional: tuple[Any, ...],
    keywords: dict[str, Any],
    limit: float,
) -> None:
    """Moves the model by a small element of each symmetry, out of place, and looks at its outputs.

    Args:
        watch: of the model.
        symmetries: what to try; those whose condition fails on these inputs are passed over.
        positional: the model's positional inputs.
        keywords: its keyword inputs.
        limit: largest relative change of the outputs.

    Raises:
        Unsuitable: if the outputs change, or a module that a symmetry looks at does not run.
    """
    caught = watch.evaluate(positional, keywords)
    point = Point(
        {name: value.detach() for name, value in watch.model.named_parameters()}, activations=watch.activations(caught)
    )
    for symmetry in symmetries:
        missing = [name for name in symmetry.modules if name not in point.activations]
        if missing:
            raise Unsuitable(f"{symmetry!r}: the module {missing[0]!r} does not run on example_input")
        weight = point.parameters[symmetry.parameters[0]]
        element = symmetry.group.random(size=0.5, seed=0, dtype=weight.dtype, device=weight.device)
        if not bool(symmetry.holds(point) & symmetry.holds(point, element)):
            continue
        drift = relative_drift(caught.outputs, watch.replay(caught, symmetry.act(element, point).parameters))
        if not drift <= limit:
            raise Unsuitable(
                f"{symmetry!r} does not hold in this model: a small element changes the outputs on example_input "
                f"by {drift:.1e}; leave it out of symmetries="
            )
