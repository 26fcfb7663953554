"""A learned gauge used as a teleporter: its element moves the model, and the move stays."""

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
    """Moves along each symmetry by the element that a learned gauge has chosen for the symmetry's upper tensors.

    A step in a gauge that is undone after it, and a teleport by the gauge's element followed by the step, differ only
    in the place on the orbit where the model ends. So a gauge that was learned together with a step also serves as a
    teleport for any other optimizer. It takes one element for each symmetry: that of the upper side.

    Args:
        gauge: the learned gauge.
        trust_region: bounds on each teleport.

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

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that the gauge has a network for."""
        return tuple(self.gauge.networks)

    def initial_state(self, point: Point, symmetries: Sequence[Symmetry]) -> dict[str, Any]:
        """The gauge's state for each symmetry that it has a network for, and the progress."""
        loss = _loss(point)
        stacked = _stacked(point)
        state: dict[str, Any] = {
            symmetry.key: self.gauge.initial_state(stacked, _linear(symmetry)) for symmetry in symmetries
        }
        state["progress"] = Progress.begin(loss).judge(loss, deterministic=True)[0]
        return state

    def told(self, state: dict[str, Any], loss: Tensor, deterministic: bool) -> dict[str, Any]:
        """The state with the progress brought up to date; see `Teleporter.told`."""
        return {**state, "progress": state["progress"].judge(loss, deterministic)[0]}

    def judged(self, state: dict[str, Any], progress: Progress, accepted: Tensor) -> dict[str, Any]:
        """The state after the last step was judged; see `Teleporter.judged`."""
        return {**state, "progress": progress}

    def choose(self, symmetry: Symmetry, point: Point, state: dict[str, Any]) -> tuple[Tensor | Chosen, dict[str, Any]]:
        """The element of the upper side's gauge; the identity if the symmetry has no gauge."""
        stacked = _stacked(point)
        assert stacked.loss is not None
        tasks = stacked.loss.shape
        # After a teleport the running means of the metric, which belong to the point before it, are void.
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
    """The linear action of the symmetry's group that a gauge can be chosen along, if there is one."""
    found = gauge_symmetries([symmetry], linearised=True)
    same = tuple(each for each in found if each.group.name == symmetry.group.name)
    return same or gauge_symmetries([symmetry], linearised=False)


def _loss(point: Point) -> Tensor:
    """The point's loss; one if it is not known, as after a caller's own backward pass."""
    if point.loss is None:
        return next(iter(point.parameters.values())).new_ones(())
    return point.loss.detach()


def _stacked(point: Point) -> Point:
    """The point with a loss and with one task dimension in front, as the gauge needs it."""
    seen = point.replace(loss=_loss(point))
    return seen if point.loss is not None and point.loss.ndim else seen.map(lambda value: value.unsqueeze(0))
