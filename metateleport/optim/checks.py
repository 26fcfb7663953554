"""Checks of a teleporting optimizer's arguments against the model and the inner optimizer, before any work."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map_only

from metateleport.capture import PassRecorder
from metateleport.detection import exact_symmetries
from metateleport.detection.chain import symmetries_of
from metateleport.optim.start import relative_drift, start_of
from metateleport.symmetries import Symmetry, Unsuitable
from metateleport.teleporters import Teleporter

__all__ = [
    "check_fit",
    "check_kinds",
    "check_matrices",
    "check_parameters",
    "check_symmetries",
    "checked_state",
    "found_symmetries",
    "is_averaged",
    "left_alone",
    "try_symmetries",
]


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
    """How a teleport treats the optimizer's state: as asked for, or the default.

    Args:
        state: one of `transport`, `keep` and `reset`, or None.
        optimizer: the inner optimizer.
        teleporter: if it moves along no symmetry, there is no group element to transport the state by.

    Raises:
        ValueError: if `state` is none of these, or is not defined for this teleporter.
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
    # L-BFGS remembers differences between points; after a teleport one of the two points is no longer there.
    usual = "reset" if isinstance(optimizer, torch.optim.LBFGS) else "keep"
    return usual if state is None else str(state)


def check_parameters(groups: Sequence[dict[str, Any]], model: nn.Module) -> None:
    """Raises a `ValueError` if a parameter is not the model's, or is sharded over processes."""
    known = {id(value) for value in model.parameters()}
    for name, value in model.named_parameters():
        if type(value).__name__ in ("DTensor", "FlatParameter") or hasattr(value, "device_mesh"):
            raise ValueError(
                f"{name!r} is sharded over processes (FSDP or DTensor), and a teleport needs whole tensors: teleport "
                "before sharding, with metateleport.teleport, or train with DistributedDataParallel"
            )
    for group in groups:
        parameters = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        tensors = [each[1] if isinstance(each, tuple) else each for each in parameters]
        foreign = [each for each in tensors if id(each) not in known]
        if foreign:
            raise ValueError(
                f"the optimizer holds a parameter of shape {tuple(foreign[0].shape)} that is not the model's: make it "
                "from this model's parameters(), after the model is built"
            )


def found_symmetries(model: nn.Module, optimizer: torch.optim.Optimizer, example_input: Any) -> Sequence[Symmetry]:
    """The exact symmetries of a model that move only parameters that an optimizer holds.

    Args:
        model: the model.
        optimizer: the inner optimizer.
        example_input: input to trace and certify the model on; without one only an `nn.Sequential` is searched.

    Raises:
        ValueError: if there are none, or they cannot be found without `example_input`.
    """
    if example_input is None:
        try:
            found = symmetries_of(model)
        except Unsuitable as error:
            raise Unsuitable(
                f"teleports need symmetries, and none were found in this {type(model).__name__}: {error}; give "
                "example_input=, a batch that the model takes, to find and certify the symmetries of any model, or "
                "name them with symmetries="
            ) from error
    else:
        # Cloned, because a model may overwrite its inputs.
        copied = tree_map_only(Tensor, lambda value: value.detach().clone(), example_input)
        found = exact_symmetries(model, copied, buffers=False)
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    named = dict(model.named_parameters())
    names = {name for name, value in named.items() if id(value) in held and value.requires_grad}
    kept = [each for each in found if names.issuperset(each.parameters)]
    if not kept:
        why = f"; all {len(found)} that exist move parameters that are frozen or not the optimizer's" if found else ""
        raise Unsuitable(
            f"teleports need symmetries, and none were found that move only what the optimizer trains{why}: name them "
            "with symmetries=, or train without teleports"
        )
    return kept


def check_fit(teleporter: Teleporter, symmetries: Sequence[Symmetry], given: bool) -> None:
    """Raises a `ValueError` if a teleporter could not move along any of the symmetries.

    Args:
        teleporter: the teleporter.
        symmetries: the symmetries that it is to move along.
        given: whether a person named them: then each has to be one that it reads.
    """
    groups = teleporter.groups
    if groups is None or not symmetries:
        return
    if given:
        check_matrices(symmetries)
    present = sorted({symmetry.group.name for symmetry in symmetries})
    if not set(present) & set(groups):
        raise ValueError(
            f"this teleporter has networks for {_listed(groups)} only, and the model's symmetries have "
            f"{_listed(present)}: it could move nothing. "
            + ("Take" if given else "Only exact symmetries are looked for: name others with symmetries=, or take")
            + " a checkpoint that was trained on a model with the same activations (metateleport.symmetries_of(model) "
            "shows the groups), or another teleporter"
        )
    left_out = [each for each in symmetries if each.group.name not in groups]
    if left_out:
        warnings.warn(left_alone("this teleporter", groups, left_out, len(symmetries)), stacklevel=3)


def left_alone(called: str, groups: Sequence[str], symmetries: Sequence[Symmetry], count: int) -> str:
    """What to say of symmetries that a learned teleporter or gauge has no networks for.

    Args:
        called: what has the networks.
        groups: names of the groups that it has networks for.
        symmetries: those of other groups, at least one.
        count: number of all symmetries.
    """
    return (
        f"{called} has networks for {_listed(groups)} and leaves {len(symmetries)} of {count} symmetries alone, the "
        f"first one {symmetries[0]!r}: other checkpoints move along those, and symmetries= names the wanted ones"
    )


def check_matrices(symmetries: Sequence[Symmetry]) -> None:
    """Raises a `ValueError` if a symmetry has no matrices, which learned teleporters and gauges read."""
    without = next((each for each in symmetries if not each.has_matrices), None)
    if without is not None:
        raise ValueError(
            f"{type(without).__name__} has no matrices, which learned teleporters and gauges read: give it a method "
            "matrices (or diagonals), leave it out, or take a teleporter that is not learned"
        )


def _listed(names: Sequence[str]) -> str:
    return ("groups " if len(names) != 1 else "the group ") + ", ".join(map(repr, names))


def check_symmetries(symmetries: Sequence[Symmetry], optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises a `ValueError` if a symmetry moves a parameter that is missing, frozen or not held by the optimizer."""
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
                raise ValueError(f"{symmetry!r} reads the module {name!r}, which the model does not have")
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


def is_averaged(model: nn.Module) -> bool:
    """Whether a `torch.optim.swa_utils.AveragedModel` exists that may average this model."""
    shapes = [value.shape for value in model.parameters()]
    # It copies the model and keeps no link to it. Not isinstance: some objects load a module when they are asked.
    kinds: list[type] = [AveragedModel]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    # An object refers to its type: a look at who refers to these takes a quarter of the time of a look at all objects.
    averaged = [each for each in gc.get_referrers(*kinds) if issubclass(type(each), AveragedModel)]
    return any([value.shape for value in each.parameters()] == shapes for each in averaged)


def try_symmetries(
    recorder: PassRecorder,
    symmetries: Sequence[Symmetry],
    positional: tuple[Any, ...],
    keywords: dict[str, Any],
    limit: float,
) -> None:
    """Checks that a small element of each symmetry leaves the outputs unchanged; the model is not moved.

    Args:
        recorder: of the model.
        symmetries: the symmetries to try; one whose condition fails on these inputs is skipped.
        positional: the model's positional inputs.
        keywords: its keyword inputs.
        limit: largest relative change of the outputs.

    Raises:
        Unsuitable: if the outputs change, or a module that a symmetry reads does not run.
    """
    recorded = recorder.evaluate(positional, keywords)
    named = dict(recorder.model.named_parameters())
    point = start_of(recorder, recorded, named, (), None).point.replace(gradients={})
    for symmetry in symmetries:
        missing = [name for name in symmetry.modules if name not in point.activations]
        if missing:
            raise Unsuitable(f"{symmetry!r}: the module {missing[0]!r} does not run on example_input")
        weight = point.parameters[symmetry.parameters[0]]
        element = symmetry.group.random(size=0.5, seed=0, dtype=weight.dtype, device=weight.device)
        if not bool(symmetry.holds(point) & symmetry.holds(point, element)):
            continue
        drift = relative_drift(recorded.outputs, recorder.replay(recorded, symmetry.act(element, point).parameters))
        if not drift <= limit:
            raise Unsuitable(
                f"{symmetry!r} does not hold in this model: a small element changes the outputs on example_input "
                f"by {drift:.1e}; leave it out of symmetries="
            )
