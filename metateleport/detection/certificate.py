"""Certifying symmetries: the drift of the outputs under random elements, at the model's weights and at random ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.detection.given import check_model
from metateleport.detection.stage import OWN, WIDE, Stage, Trial
from metateleport.symmetries import Certificate, Symmetry, Unsuitable

__all__ = ["certify"]


_BATCH = {"batch-exact": ("given",)}
_WIDE = tuple(f"{WIDE} {number}" for number in range(3))
TRIALS = (
    Trial(
        OWN,
        size=1.0,
        seed=1,
        inputs={**_BATCH, "approximate": ("fresh", "given"), "exact": ("fresh",)},
    ),
    Trial(1.5, size=3.0, seed=2, inputs={"exact": ("fresh",)}),
    Trial(1.0, size=0.3, seed=3, inputs={**_BATCH, "exact": ("given",)}),
)
"""Weights, inputs and sizes all vary, but not in all combinations, which would take too many passes.

An exact symmetry is not tried on the example input at the model's own weights: there a teleport measures its own drift.
An approximate one need not hold at other weights, nor a batch pair on other inputs. Exact ones come last in a trial:
what they have moved is not moved back where the next trial has weights of its own.
"""


def certify(
    model: nn.Module,
    symmetries: Sequence[Symmetry],
    inputs: tuple[Any, ...],
    keywords: dict[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    wary: bool = False,
) -> list[Certificate]:
    """Measures how far each of some symmetries moves the outputs.

    All symmetries are moved at once, each by its own random element. If the outputs drift, the set is halved until the
    symmetries that do not hold are found. The reported drift is that of the largest set that passed together, so that
    six forward passes in float64 certify any number of exact symmetries.

    The memory needed is one copy of the model in float64 (twice the size of a float32 model) beside a forward pass.
    Parameters are moved in that copy and moved back; those that one symmetry moves (all batch pairs together) are
    briefly there twice.

    Args:
        model: the model, in the mode (train or eval) to certify it in; it is not changed.
        symmetries: those to certify.
        inputs: positional inputs.
        keywords: keyword inputs.
        loss: maps the outputs to the quantity that must not change; the outputs themselves if not given.
        wary: whether control flow may depend on the inputs: then more and wider ones are tried.

    Returns:
        A certificate for each.

    Raises:
        Unsuitable: if the model is wrapped, lazy or sharded, or runs neither in float64 nor in float32.

    Example:
        >>> from metateleport.symmetries import LinearPair
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
        >>> certify(model, [LinearPair(model, "0", "1")], (torch.ones(5, 3),))[0].holds
        True
    """
    if not symmetries:
        return []
    check_model(model)
    stage = _staged(model, inputs, keywords or {}, loss)
    records = [_Record() for _ in symmetries]
    for trial in TRIALS:
        if trial is not stage.trial:
            stage.prepare(trial)
        for exactness, names in trial.inputs.items():
            others = _WIDE if wary and exactness == "exact" else ()
            for name in (*names, *(other for other in others if stage.runs(other))):
                chosen = [
                    i for i, each in enumerate(symmetries) if each.exactness == exactness and not records[i].reason
                ]
                if exactness == "batch-exact":
                    chosen = _conditioned(stage, symmetries, chosen, records)
                _halve(stage, symmetries, chosen, name, records)
    return [record.certificate(stage.dtype) for record in records]


def _staged(
    model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], loss: Callable[[Any], Tensor] | None
) -> Stage:
    # Some models run in the precision that they were made for only, some mix several, and some run on few inputs
    # besides those given.
    for dtype, everywhere in ((torch.float64, False), (torch.float32, False), (torch.float64, True)):
        stage = Stage(model, inputs, keywords, loss, dtype, everywhere)
        for stage.daring in (2, 1, 0, -1):
            stage.prepare(TRIALS[0])
            if stage.runs():
                return stage
        del stage
    own = {value.dtype for value in model.parameters()}
    raise Unsuitable(
        f"{type(model).__name__} runs neither in float64 nor in float32, in which symmetries are certified; its own "
        f"parameters are of {', '.join(sorted(map(str, own)))}"
    )


def _conditioned(stage: Stage, symmetries: Sequence[Symmetry], chosen: list[int], records: list[_Record]) -> list[int]:
    """Those batch pairs whose rank condition is met; the others are refused."""
    met = stage.conditions([symmetries[i] for i in chosen])
    for i, holds in zip(chosen, met, strict=True):
        if not holds:
            records[i].reason = "there are more samples than its layers are wide, or some depend on others"
    return [i for i, holds in zip(chosen, met, strict=True) if holds]


def _halve(stage: Stage, symmetries: Sequence[Symmetry], chosen: list[int], name: str, records: list[_Record]) -> None:
    if not chosen:
        return
    drift, reason = stage.measure([symmetries[i] for i in chosen], name)
    if reason and len(chosen) > 1:
        middle = len(chosen) // 2
        _halve(stage, symmetries, chosen[:middle], name, records)
        _halve(stage, symmetries, chosen[middle:], name, records)
        return
    for i in chosen:
        records[i].add(stage.trial, name, drift, reason, len(chosen))


@dataclasses.dataclass
class _Record:
    """The measurements of one symmetry so far."""

    drift: dict[str, float] = dataclasses.field(default_factory=dict)
    sizes: set[float] = dataclasses.field(default_factory=set)
    weights: set[tuple[float, int]] = dataclasses.field(default_factory=set)
    together: int = 1
    reason: str = ""

    def add(self, trial: Trial, name: str, drift: float, reason: str, together: int) -> None:
        self.drift[name] = max(self.drift.get(name, 0.0), drift)
        self.sizes.add(trial.size)
        self.weights.add((trial.weights, trial.seed))
        self.together = max(self.together, together)
        self.reason = reason

    def certificate(self, dtype: torch.dtype) -> Certificate:
        given = self.drift.get("given", float("nan"))
        return Certificate(
            self.drift.get("fresh", given),
            given,
            tuple(sorted(self.sizes)),
            len(self.weights),
            dtype,
            self.together,
            self.reason,
        )
