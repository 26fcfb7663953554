"""A learned gauge as a teleport that stays: the element it would step in, moved by instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.gauges import gauge_symmetries
from metateleport.learned.gauge import LearnedGauge
from metateleport.learned.progress import Progress
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Teleporter, TrustRegion
from metateleport.teleporters.base import Chosen

__all__ = ["GaugeTeleporter"]


class GaugeTeleporter(Teleporter, nn.Module):
    """Moves by the group element whose gauge a learned optimizer would step the symmetry's upper tensors in.

    A step in a gauge that is then undone, and a teleport to the gauge followed by the step, are one and the same up to
    where on the orbit the model stands. So a gauge that was learned together with a step serves any other optimizer as
    a teleport: one element for each symmetry, the one that its upper side has chosen.

    Args:
        gauge: the learned gauge.
        trust_region: bounds on what is carried out.

    Example:
        >>> teleporter = GaugeTeleporter(LearnedGauge(("GL",), hidden=4))
        >>> teleporter.name
        'learned'
    """

    name = "learned"
    needs_gradient = True

    def __init__(self, gauge: LearnedGauge, trust_region: TrustRegion | None = None) -> None:
        nn.Module.__init__(self)
        Teleporter.__init__(self, trust_region)
        self.gauge = gauge

    def initial_state(self, point: Point, symmetries: Sequence[Symmetry]) -> dict[str, Any]:
        """The gauge's own state for each symmetry that it serves, and the progress."""
        loss = _loss(point)
        stacked = _stacked(point)
        state: dict[str, Any] = {
            symmetry.key: self.gauge.initial_state(stacked, _linear(symmetry)) for symmetry in symmetries
        }
        state["progress"] = Progress.begin(loss).judge(loss, deterministic=True)[0]
        return state

    def serves(self, symmetry: Symmetry) -> bool:
        """Whether there is a network for a gauge of the symmetry's own group."""
        served = [each.group for each in _linear(symmetry) if each.group.name in self.gauge.networks]
        return symmetry.group in served

    def told(self, state: dict[str, Any], loss: Tensor, deterministic: bool) -> dict[str, Any]:
        """The state with the progress brought up to date; see `Teleporter.told`."""
        return {**state, "progress": state["progress"].judge(loss, deterministic)[0]}

    def judged(self, state: dict[str, Any], progress: Progress, accepted: Tensor) -> dict[str, Any]:
        """The state once the last step is judged; see `Teleporter.judged`."""
        return {**state, "progress": progress}

    def choose(self, symmetry: Symmetry, point: Point, state: dict[str, Any]) -> tuple[Tensor | Chosen, dict[str, Any]]:
        """The element of the upper side's gauge; the identity where the symmetry has none."""
        stacked = _stacked(point)
        assert stacked.loss is not None
        tasks = stacked.loss.shape
        # Where a teleport has moved the model, running means of what was seen before it are void.
        moved = torch.ones_like(stacked.loss, dtype=torch.bool)
        progress = state["progress"].map(lambda value: value.reshape(tasks))
        gauges, after = self.gauge.choose(
            stacked, _linear(symmetry), progress, state[symmetry.key], deterministic=False, moved=moved
        )
        upper = [gauge for gauge in gauges if gauge.side == "in"]
        batch = () if point.loss is None else point.loss.shape
        if not upper:
            weight = point.parameters[symmetry.parameters[0]]
            return weight.new_zeros(*batch, *symmetry.group.shape), state
        element = upper[0].element.reshape(*batch, *symmetry.group.shape)
        return Chosen(element, upper[0].size.reshape(batch)), {**state, symmetry.key: after}


def _linear(symmetry: Symmetry) -> tuple[Symmetry, ...]:
    """The linear action of the symmetry's own group to choose a gauge from, if there is one."""
    found = gauge_symmetries([symmetry], linearised=True)
    same = tuple(each for each in found if each.group.name == symmetry.group.name)
    return same or gauge_symmetries([symmetry], linearised=False)


def _loss(point: Point) -> Tensor:
    """The loss; one where it was not seen, as after a caller's own backward pass."""
    if point.loss is None:
        return next(iter(point.parameters.values())).new_ones(())
    return point.loss.detach()


def _stacked(point: Point) -> Point:
    """The point with a loss and with one task dimension in front, as the gauge wants it."""
    seen = point.replace(loss=_loss(point))
    return seen if point.loss is not None and point.loss.ndim else seen.map(lambda value: value.unsqueeze(0))
