"""The learned update of every coordinate, for small models: a two-layer LSTM that all coordinates share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metateleport.gauges import Gauge
from metateleport.learned.cell import recur_columns
from metateleport.learned.parts import UNITS
from metateleport.learned.progress import Progress
from metateleport.learned.rules.base import Learns, carried_moments, subtracted
from metateleport.learned.rules.step import StepRule, StepSettings
from metateleport.linalg import finite_gradient, fit, rms
from metateleport.point import Point, Tensors
from metateleport.settings import AT_LEAST_ONE, setting
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move

__all__ = ["CoordinateRule", "CoordinateSettings"]


@dataclasses.dataclass(frozen=True)
class CoordinateSettings(StepSettings):
    """A learned update of every coordinate, for small models (`CoordinateRule`).

    Args:
        hidden: units of the LSTM of each tensor.
        secants, longest, cooling: as in `StepSettings`.
        coordinate_hidden: units of each layer of the LSTM that all coordinates share.
    """

    kind: ClassVar[str] = "coordinate"

    coordinate_hidden: int = setting(20, AT_LEAST_ONE, UNITS)

    @property
    def learns(self) -> Learns:
        return "update"

    def rule(self) -> CoordinateRule:
        return CoordinateRule(self.hidden, self.coordinate_hidden, self.secants, self.longest, self.cooling)


class CoordinateRule(StepRule):
    r"""A learned update of every coordinate: a two-layer LSTM, shared by all, modifies the learned step.

    $$W \mapsto W - \left(2\sigma(o_2)\,\Delta + \mathrm{rms}(\Delta)\tanh(o_1)\right)$$

    with $\Delta$ the learned step and $o_1, o_2$ the LSTM's outputs at the coordinate, from scale-free
    inputs: the gradient over its root mean square, the momentum over the root of the second moment, the log of the
    second moment over its mean, and the time. At the start of meta-training this is the learned step alone.

    Args:
        hidden: units of the per-tensor LSTM.
        coordinate_hidden: units of each layer of the coordinate-wise LSTM.
        secants: number of secant pairs, as in `StepRule`.
        longest, cooling: as in `StepRule`.

    Source: Andrychowicz et al., NeurIPS 2016 (arXiv 1606.04474), section 2.1.
    """

    _FEATURES = 4
    per_tensor: ClassVar[tuple[str, ...]] = (*StepRule.per_tensor, "layers", "momentum", "squares")
    # The rows of one task's coordinates are as many as its tensors have, not the same for all.
    rows_by_task: ClassVar[bool] = False

    def __init__(
        self,
        hidden: int = 32,
        coordinate_hidden: int = 20,
        secants: int = 0,
        longest: float = 1.5,
        cooling: float = 0.0,
    ) -> None:
        super().__init__(hidden, secants, longest, cooling)
        self.coordinate_hidden = coordinate_hidden
        self.observe_coordinates: Callable[[Tensor, Tensor, Tensor, int], Tensor] = _coordinate_features
        self.first = nn.LSTMCell(self._FEATURES, coordinate_hidden)
        self.second = nn.LSTMCell(coordinate_hidden, coordinate_hidden)
        self.coordinate_head = nn.Linear(coordinate_hidden, 2)
        with torch.no_grad():
            self.coordinate_head.weight.mul_(0.1)
            self.coordinate_head.bias.zero_()

    def initial_state(self, point: Point) -> dict[str, Any]:
        own = self.coordinate_head.weight
        layers = {}
        for name, gradient in point.gradients.items():
            zero = torch.zeros(gradient.numel(), self.coordinate_hidden, dtype=own.dtype, device=own.device)
            layers[name] = (zero,) * 4
        moments = {name: torch.zeros_like(gradient) for name, gradient in point.gradients.items()}
        return {**super().initial_state(point), "layers": layers, "momentum": moments, "squares": moments}

    def step(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        gauges: Sequence[Gauge] = (),
        spend: bool = False,
    ) -> tuple[Tensors, dict[str, Any]]:
        steps, remembered = self._changes(point, symmetries, progress, state, gauges)
        own = self.coordinate_head.weight.dtype
        momentum, squares, inputs, sizes = {}, {}, [], {}
        for name, gradient in point.gradients.items():
            fixed = gradient.detach() if self.detach else gradient
            # If the last step is taken back, the moments belong to the point that was left.
            kept = fit(progress.accepted, gradient).to(gradient.dtype)
            momentum[name] = 0.9 * kept * state["momentum"][name] + 0.1 * fixed
            squares[name] = 0.95 * kept * state["squares"][name] + 0.05 * fixed.square()
            sizes[name] = rms(steps[name])
            inputs.append(self.observe_coordinates(fixed, momentum[name], squares[name], progress.time).to(own))
        counts = [gradient.numel() for gradient in point.gradients.values()]
        outputs, layers = self._recurred(torch.cat(inputs, 1), state["layers"], list(point.gradients), counts)
        changes = {}
        for (name, gradient), own_outputs in zip(point.gradients.items(), outputs.split(counts, 1), strict=True):
            shift, gain = own_outputs.to(gradient.dtype).reshape(2, *gradient.shape).unbind(0)
            changes[name] = 2 * gain.sigmoid() * steps[name] + fit(sizes[name], gradient) * shift.tanh()
        moved = {**point.parameters, **subtracted(point.parameters, changes)}
        return moved, {**remembered, "layers": layers, "momentum": momentum, "squares": squares}

    def _recurred(
        self, inputs: Tensor, layers: dict[str, Any], names: Sequence[str], counts: Sequence[int]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The outputs, `(2, coordinates)`, from the features in columns; and the new states by tensor."""
        before = layers.whole if isinstance(layers, _Layers) else None
        if before is None:
            before = tuple(torch.cat([part.mT for part in parts], 1) for parts in zip(*map(layers.get, names)))  # noqa: B905
        first = recur_columns(self.first, inputs, (before[0], before[1]))
        second = recur_columns(self.second, first[0], (before[2], before[3]))
        head = self.coordinate_head
        outputs = finite_gradient(torch.addmm(head.bias.unsqueeze(1), head.weight, second[0]))
        whole = (*first, *second)
        after = zip(*([part.mT for part in each.split(counts, 1)] for each in whole), strict=True)
        # In a graph the tensors' states are never taken apart, only to be put together again.
        made = _Layers(zip(names, after, strict=True))
        made.whole = whole if torch.is_grad_enabled() else None
        return outputs, made if torch.is_grad_enabled() else dict(made)

    def carry(
        self, state: dict[str, Any], moves: Sequence[Move], point: Point, accepted: Tensor, spend: bool = False
    ) -> dict[str, Any]:
        # Here the moments are features, which are kept out of the graph.
        carried = carried_moments(state, moves, point, self.detach)
        return {**super().carry(state, moves, point, accepted, spend), **carried}


class _Layers(dict[str, Any]):
    """States by tensor, and of all tensors side by side as they came out of the cells."""

    whole: tuple[Tensor, ...] | None = None


def _coordinate_features(gradient: Tensor, momentum: Tensor, squares: Tensor, time: int) -> Tensor:
    """Features of every coordinate, `(features, tasks * coordinates)`."""
    tiny = torch.finfo(gradient.dtype).tiny
    normal = gradient / fit(rms(gradient), gradient)
    adaptive = momentum / (squares.sqrt() + tiny)
    mean = squares.reshape(squares.shape[0], -1).mean(-1).clamp_min(tiny)
    relative = (squares / fit(mean, squares)).clamp_min(1e-12).log() / 10
    stacked = torch.stack((normal, adaptive, relative, torch.full_like(normal, time / (time + 10))))
    return torch.nan_to_num(stacked, 0.0, 10.0, -10.0).clamp(-10, 10).flatten(1)
