"""The mixture of directions with outputs that depend on what a tensor is, and not on how it gets on: no network."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metateleport.learned.progress import Progress
from metateleport.learned.rules.adaptive import TOLD_START, AdaptiveRule, layer_scales
from metateleport.learned.rules.base import RuleSettings
from metateleport.learned.rules.mixture import Ledger, Mixture, layer_of
from metateleport.linalg import Blocks
from metateleport.point import Point, Tensors
from metateleport.settings import NOT_NEGATIVE, setting

__all__ = ["StaticRule", "StaticSettings"]

_KINDS = 6
"""Features of what a tensor is."""


@dataclasses.dataclass(frozen=True)
class StaticSettings(RuleSettings):
    """A learned mixture for minibatches without a network (`StaticRule`).

    Args:
        cooling: how fast steps get shorter with time; zero for not at all.
        guarded: whether steps give way to AdamW's where they do worse (`metateleport.learned.rules.guard`).
    """

    kind: ClassVar[str] = "static"

    cooling: float = setting(0.0, NOT_NEGATIVE, 1e6)
    guarded: bool = setting(False)

    @property
    def reads_total(self) -> bool:
        return True

    @property
    def starts_well(self) -> bool:
        return True

    def rule(self) -> StaticRule:
        return StaticRule(self.cooling, self.guarded)


class StaticRule(AdaptiveRule):
    r"""The steps of `AdaptiveRule`, told the length of the run, with outputs that are fixed for each tensor.

    $$(m, \beta, \kappa, c, a) = B + A f,$$

    $f$ what the tensor is: whether it is a vector and whether a bias, the size of its layer's weights at the start
    beside that of all layers, the shape of a matrix (rows over columns, and columns), and the number of layers. $A$ and
    $B$ are learned. Nothing is computed at a step but what the step is made of.

    Args:
        cooling: as in `AdaptiveRule`.
        guarded: whether steps give way to AdamW's (`metateleport.learned.rules.guard.judged`).

    Example:
        >>> sum(p.numel() for p in StaticRule().parameters())
        49
    """

    constants: ClassVar[tuple[str, ...]] = ("kinds",)

    def __init__(self, cooling: float = 0.0, guarded: bool = False) -> None:
        super().__init__(hidden=1, cooling=cooling, told=True, guarded=guarded)
        self.per_tensor = ("kinds", *(each for each in self.per_tensor if each != "cells"))  # type: ignore[misc]
        del self.cell
        self.head = nn.Linear(_KINDS, len(TOLD_START))
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.copy_(torch.tensor(TOLD_START))

    def initial_state(self, point: Point) -> dict[str, Any]:
        state = super().initial_state(point)
        del state["cells"]
        return {**state, "kinds": _kinds(point)}

    def _outputs(
        self,
        point: Point,
        progress: Progress,
        state: dict[str, Any],
        blocks: Blocks,
        seen: tuple[list[Tensor], ...],
        powers: Tensor,
        levels: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        kinds = torch.stack([state["kinds"][name] for name in point.gradients])
        outputs = self.head(kinds.to(self.head.weight.dtype).flatten(0, 1))
        return outputs.to(powers.dtype).reshape(*powers.shape, -1), {}

    def _heard(
        self, point: Point, progress: Progress, state: dict[str, Any], ledger: Ledger, *seen: Any
    ) -> tuple[Mixture, dict[str, Any]]:
        # Compared by their numbers, as their versions do not tell of all ways to exchange them.
        read = torch.cat((self.head.weight, self.head.bias.unsqueeze(1)), 1)
        if ledger.mixture is None or not torch.equal(ledger.mixture[0], read):
            ledger.mixture = read, super()._heard(point, progress, state, ledger, *seen)[0]
        return ledger.mixture[1], {}


def _kinds(point: Point) -> Tensors:
    """What each tensor is, `(tasks, features)`, by its name; features of order one."""
    layers = layer_scales(point)
    logs = {layer: size.detach().log() for layer, size in layers.items()}
    middle = torch.stack(list(logs.values())).mean(0)
    depth = math.log(len(layers)) / 3
    found = {}
    for name, value in point.gradients.items():
        rows, columns = _sides(tuple(value.shape[1:]))
        fixed = (
            float(value.ndim <= 2),
            float(name.rpartition(".")[2] == "bias"),
            math.log(rows / columns) / 5 if value.ndim > 2 else 0.0,
            math.log(columns) / 5 if value.ndim > 2 else 0.0,
            depth,
        )
        heavy = (logs[layer_of(name)] - middle) / 3
        found[name] = torch.stack([heavy, *(torch.full_like(heavy, each) for each in fixed)], -1)
    return found


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the matrix that a tensor is."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)
