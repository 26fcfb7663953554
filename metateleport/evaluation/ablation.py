"""The effect of each part of the basis: runs of a learned optimizer that leave some generators out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.checkpoint import Checkpoint
from metateleport.evaluation.methods.learned import Learned
from metateleport.evaluation.run import EvaluationError
from metateleport.evaluation.words import ABLATED
from metateleport.learned import MetaOptimizer
from metateleport.learned.gauge import GAUGE_BASIS, GaugeBasis
from metateleport.learned.teleporter import BASIS, LearnedTeleporter, Observation

__all__ = ["EACH", "ablated_methods", "basis_of", "parts_of", "without"]

EACH = "each"
"""Stands for every element of the basis, one at a time."""

_AND, _ALL_BUT = " + ", "all but "


def basis_of(meta: MetaOptimizer) -> tuple[str, ...]:
    """Names of the generators that a meta-optimizer combines: those of its teleport that stays, then of its gauges.

    Args:
        meta: the meta-optimizer.

    Returns:
        The names, each once; empty if there is no basis, as for the `flat` networks.

    Example:
        >>> from metateleport.learned import MetaOptimizerConfig
        >>> basis_of(MetaOptimizer(MetaOptimizerConfig(groups=("O",))))
        ('ascent', 'second_ascent', 'descent')
    """
    names: list[str] = []
    if isinstance(meta.teleporter, LearnedTeleporter):
        names += [name for group in meta.teleporter.networks for name in BASIS[group]]
    if meta.gauge is not None:
        names += GAUGE_BASIS
    return tuple(dict.fromkeys(names))


def parts_of(asked: Sequence[str], meta: MetaOptimizer) -> dict[str, tuple[str, ...]]:
    """The generators to leave out, for each run.

    Args:
        asked: for each run the name of a generator, or several joined by ` + `, to leave out; with `all but ` in front,
            those to keep. Or `each`, for one run without each generator.
        meta: the meta-optimizer.

    Returns:
        For each run, by the text that asked for it, the names to leave out.

    Raises:
        EvaluationError: if there is no such generator, or no basis.

    Example:
        >>> from metateleport.learned import MetaOptimizerConfig
        >>> meta = MetaOptimizer(MetaOptimizerConfig(groups=("O",)))
        >>> parts_of(["ascent + descent", "all but ascent"], meta)
        {'ascent + descent': ('ascent', 'descent'), 'all but ascent': ('second_ascent', 'descent')}
    """
    known = basis_of(meta)
    if asked and not known:
        raise EvaluationError("no group element is combined from a basis here: there is nothing to leave out")
    parts: dict[str, tuple[str, ...]] = {}
    for each in (name for whole in asked for name in (known if whole == EACH else (whole,))):
        names = tuple(name.strip() for name in each.removeprefix(_ALL_BUT).split(_AND))
        for name in names:
            if name not in known:
                raise EvaluationError(
                    f"the basis has no {name!r}: it has {'; '.join(known)}; join several that are to be left out "
                    f"together by {_AND!r}, put {_ALL_BUT!r} in front to leave out the others, or give {EACH!r}"
                )
        parts[each] = tuple(name for name in known if name not in names) if each.startswith(_ALL_BUT) else names
    return parts


def without(meta: MetaOptimizer, names: Sequence[str]) -> MetaOptimizer:
    """A copy of a meta-optimizer whose teleports and gauges leave out some generators of their basis.

    Networks and features are the same, and nothing is trained anew: the other coefficients change only because the run
    comes to other points.

    Args:
        meta: the meta-optimizer; it is not changed.
        names: names of the generators, as `basis_of` returns them.

    Example:
        >>> from metateleport.checkpoint import load_checkpoint
        >>> learned = load_checkpoint("leaky_mlp").learned
        >>> without(learned, ("log metric",)) is learned
        False
    """
    made = copy.deepcopy(meta)
    if isinstance(made.teleporter, LearnedTeleporter):
        observe = made.teleporter.observe

        def observed(symmetry: Any, *rest: Any) -> Observation:
            seen = observe(symmetry, *rest)
            return seen._replace(basis=_emptied(seen.basis, BASIS[symmetry.group.name], names, symmetry))

        made.teleporter.observe = observed
    if made.gauge is not None:
        made.gauge.observe = _gauge_without(made.gauge.observe, names)
    return made


def ablated_methods(checkpoint: Checkpoint, parts: Mapping[str, Sequence[str]]) -> list[Learned]:
    """The learned optimizer of a checkpoint without each of some parts of its basis.

    Args:
        checkpoint: the checkpoint.
        parts: the names to leave out, by the name of the part, as `parts_of` returns them.

    Example:
        >>> from metateleport.checkpoint import load_checkpoint
        >>> checkpoint = load_checkpoint("leaky_mlp")
        >>> [method.name for method in ablated_methods(checkpoint, parts_of(["each"], checkpoint.learned))]
        ['learned/without log metric', 'learned/without log gradient covariance']
    """
    methods = []
    for part, names in parts.items():
        method = Learned(ABLATED + part, without(checkpoint.learned, names))
        method.settings["without"] = list(names)
        methods.append(method)
    return methods


def _gauge_without(
    observe: Callable[..., tuple[GaugeBasis, Tensor]], names: Sequence[str]
) -> Callable[..., tuple[GaugeBasis, Tensor]]:
    metric, gradients = GAUGE_BASIS

    def observed(*given: Any) -> tuple[GaugeBasis, Tensor]:
        basis, features = observe(*given)
        if metric in names:
            # The logarithms of a spectrum that is not usable are zero.
            spectrum = dataclasses.replace(basis.metric, usable=torch.zeros_like(basis.metric.usable))
            basis = basis._replace(metric=spectrum)
        if gradients in names:
            basis = basis._replace(gradients=torch.zeros_like(basis.gradients))
        return basis, features

    return observed


def _emptied(basis: Tensor, known: Sequence[str], names: Sequence[str], symmetry: Any) -> Tensor:
    """The generators, `(*batch, count, *group.shape)`, with those of the given names set to zero."""
    empty = torch.tensor([name in names for name in known], device=basis.device)
    return basis.masked_fill(symmetry.group.expand(empty), 0.0)
