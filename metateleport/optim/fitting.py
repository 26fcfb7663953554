"""Checks that a checkpoint, a model and its parameters go together, before any work."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.detection import exact_symmetries
from metateleport.detection.adapters import told_symmetries
from metateleport.detection.chain import symmetries_of
from metateleport.gauges import factor_pairs, gauge_symmetries
from metateleport.learned.factors import has_gauges
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.optim.checks import check_matrices, left_alone
from metateleport.optim.choice import DEFAULT
from metateleport.symmetries import Pair, Symmetry, Unsuitable

__all__ = [
    "as_number",
    "check_parameters",
    "check_total_steps",
    "fitting_symmetries",
    "say_what_fits",
    "say_what_has_no_gauge",
]

_FOR_ANY = DEFAULT
"""The checkpoint that warnings recommend."""

_MOST = 0.5
"""Share of the weights that need a known bound on the curvature; below it a warning says so."""


def check_parameters(groups: Sequence[dict[str, Any]]) -> None:
    """Raises a `ValueError` if no step can be taken on some of the parameters.

    Args:
        groups: parameter groups, as `torch.optim` makes them.
    """
    parameters: list[Tensor] = [value for group in groups for value in group["params"]]
    if any(isinstance(value, nn.parameter.UninitializedParameter) for value in parameters):
        raise ValueError("a lazy module has no weights yet: run one forward pass, then make the optimizer")
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
    if any(value.is_meta for value in parameters):
        raise ValueError("the parameters are on the device 'meta' and hold no numbers: materialise the model first")


def as_number(value: Any) -> float:
    """A setting as a number; NaN if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def check_total_steps(total_steps: Any) -> None:
    """Raises a `ValueError` if that is no length of a run."""
    whole = isinstance(total_steps, int) and not isinstance(total_steps, bool) and total_steps >= 1
    if total_steps is not None and not whole:
        raise ValueError(f"total_steps is the number of steps of the run, or None; not {total_steps!r}")


def _is_sharded(value: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def fitting_symmetries(
    model: nn.Module,
    meta: MetaOptimizer,
    symmetries: Sequence[Symmetry] | None,
    example_input: Any,
) -> tuple[Symmetry, ...]:
    """The symmetries that an optimizer will use; found in the model if not given.

    Where none can be found, training goes on without symmetries, and one warning says what to pass.

    Args:
        model: the model.
        meta: the meta-optimizer.
        symmetries: the symmetries that were given, or None.
        example_input: of the model, or None.

    Raises:
        ValueError: if a given symmetry names something that the model does not have, or moves a buffer.
    """
    if symmetries is not None:
        found = tuple(symmetries)
        _check_given(found, model)
        if meta.reads_symmetries:
            check_matrices(found)
    else:
        if not meta.reads_symmetries:
            return ()
        try:
            told = told_symmetries(model, frozen=True) if meta.rule.reads_factors else ()
            if example_input is not None:
                known = {frozenset(each.parameters) for each in told}
                exact = exact_symmetries(model, example_input, buffers=False)
                found = (*told, *(each for each in exact if frozenset(each.parameters) not in known))
            elif told:
                found = told
            else:
                found = tuple(symmetries_of(model))
        except Unsuitable as error:
            warnings.warn(
                f"LearnedOptimizer goes on without symmetries: {error}. symmetries=[] says that none are wanted",
                stacklevel=3,
            )
            return ()
    return found


def _check_given(symmetries: Sequence[Symmetry], model: nn.Module) -> None:
    named, modules = dict(model.named_parameters()), dict(model.named_modules())
    for symmetry in symmetries:
        if symmetry.buffers:
            raise ValueError(
                f"{symmetry!r} moves a buffer, and an optimizer moves parameters: leave it out "
                "(exact_symmetries(model, example, buffers=False) finds none that do)"
            )
        unknown = [name for name in symmetry.parameters if name not in named]
        unknown += [name for name in symmetry.modules if name not in modules]
        if unknown:
            raise ValueError(f"{symmetry!r} names {unknown[0]!r}, which the model does not have")


def say_what_has_no_gauge(model: nn.Module, symmetries: Sequence[Symmetry]) -> None:
    """Gives one warning if a rule of factors steps some of them like other tensors.

    Args:
        model: the model.
        symmetries: those that the optimizer will use.
    """
    weights = {name: value.detach().unsqueeze(0) for name, value in model.named_parameters(remove_duplicate=False)}
    plain = [pair for pair in factor_pairs(symmetries) if not has_gauges(pair, weights)]
    if plain:
        warnings.warn(
            f"LearnedOptimizer steps {len(plain)} pairs of factors like other tensors, the first one "
            f"{' and '.join(plain[0].names('out'))}: their rank is above the number of features that they take in, and "
            "such factors have no gauge. A smaller rank makes the same products",
            stacklevel=3,
        )


def say_what_fits(
    meta: MetaOptimizer,
    called: str,
    made_for: Mapping[str, Any],
    symmetries: Sequence[Symmetry],
    parameters: Mapping[str, Tensor],
    deterministic: bool,
) -> None:
    """Gives one warning if a checkpoint is not made for its model, its data or its parameters.

    Args:
        meta: the meta-optimizer.
        called: the checkpoint's name, as warnings call it.
        made_for: the entry `made_for` of its card: whether it was trained on `minibatches`, with which
            `losses` and along symmetries of which `groups`.
        symmetries: those that the optimizer will use.
        parameters: those that it trains, by name.
        deterministic: whether every step sees the same data.
    """
    own = {each.group.name for each in symmetries}
    reasons = []
    unread = [each for each in symmetries if not _reads(meta, each)]
    if symmetries and len(unread) == len(symmetries):
        reasons.append(
            f"it has networks for symmetries of {', '.join(meta.config.groups)}, and this model's are of "
            f"{', '.join(sorted(own))}: it steps without teleports and gauges"
        )
    if not deterministic and not made_for.get("minibatches", True):
        reasons.append(
            "it has learned on data sets that every step sees whole, which deterministic=True promises; on minibatches "
            "it is behind AdamW"
        )
    if not deterministic and made_for.get("losses"):
        reasons.append(
            f"it has learned on {made_for['losses']} alone, and on minibatches with another loss may end behind AdamW"
        )
    if made_for.get("groups") and not own & set(made_for["groups"]):
        reasons.append(
            f"it has learned on models with symmetries of {', '.join(made_for['groups'])}, of which there is none"
        )
    if meta.rule.divides_by_loss:
        bounded = {name for each in symmetries if isinstance(each, Pair) for name in each.modules}
        known = sum(value.numel() for name, value in parameters.items() if name.rpartition(".")[0] in bounded)
        share = known / max(1, sum(value.numel() for value in parameters.values()))
        if share < _MOST:
            reasons.append(
                f"it bounds steps by the curvature of layers that follow one another, which holds {share:.0%} of these "
                "weights; the others take Polyak's step"
            )
    if reasons:
        other = "" if called == repr(_FOR_ANY) else f". {_FOR_ANY!r} is made for any model, on minibatches"
        warnings.warn(f"{called} is not made for this: {'; '.join(reasons)}{other}", stacklevel=3)
    if unread and len(unread) < len(symmetries):
        text = left_alone(called, meta.config.groups, unread, len(symmetries))
        warnings.warn(f"LearnedOptimizer: {text}", stacklevel=3)


def _reads(meta: MetaOptimizer, symmetry: Symmetry) -> bool:
    """Whether networks serve the group of a symmetry; true if the checkpoint has none that would."""
    if meta.gauge is None and meta.teleporter is None:
        return True
    if meta.gauge is not None:
        gauged = gauge_symmetries([symmetry], meta.config.linearised)
        if any(each.group.name in meta.gauge.networks for each in gauged):
            return True
    if meta.teleporter is None:
        return False
    groups = meta.teleporter.groups
    return groups is None or symmetry.group.name in groups
