"""The learned update for large models: an LSTM for each tensor modulates a small network over its coordinates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metateleport.gauges import Gauge
from metateleport.groups import still
from metateleport.learned.copies import weight_by_task
from metateleport.learned.progress import Progress
from metateleport.learned.rules.base import Learns
from metateleport.learned.rules.step import StepRule, StepSettings
from metateleport.linalg import finite_gradient, fit, rms
from metateleport.point import Point, Tensors
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move

__all__ = ["TensorRule", "TensorSettings"]

_FEATURES = 5
_SQUARES_MEMORY = 0.99


@dataclasses.dataclass(frozen=True)
class TensorSettings(StepSettings):
    """A learned update for large models (`TensorRule`).

    Args:
        hidden: units of the LSTM of each tensor.
        secants, longest, cooling: as in `StepSettings`.
    """

    kind: ClassVar[str] = "tensor"

    @property
    def learns(self) -> Learns:
        return "update"

    def rule(self) -> TensorRule:
        return TensorRule(self.hidden, secants=self.secants, longest=self.longest, cooling=self.cooling)


class TensorRule(StepRule):
    r"""A learned update of every coordinate, with one LSTM state for each tensor, that modifies the learned step.

    $$W \mapsto W - \left(2\sigma(o_2)\,\Delta + \mathrm{rms}(\Delta)\tanh(o_1)\right)$$

    $$\phi = \tanh((1 + \gamma) \odot A f + \delta), \qquad o_1 = a_1^\top \phi + k^\top f, \qquad
      o_2 = a_2^\top \phi + b$$

    with $\Delta$ the learned step. $f$ are scale-free features of a coordinate: gradient,
    velocity, velocity over the root of the second moment, and weight, each over its root mean square in the tensor,
    and the log of the second moment over its mean. $A, a_1, a_2$ are shared by all coordinates of all tensors;
    $\gamma, \delta, k, b$ come from the hidden state of the tensor's LSTM, so that a tensor can be stepped like
    gradient descent, like Adam or by the sign, and differently as time goes on. At the start of meta-training they are
    near zero, and this is the learned step alone.

    The state is a velocity and a second moment for each coordinate, and one LSTM state for each tensor. A coordinate's
    step is at most twice its learned step plus once the root mean square of the tensor's.

    Args:
        hidden: units of the LSTM of each tensor.
        units: units of the network over coordinates.
        secants: number of secant pairs; each keeps two more numbers per coordinate.
        longest, cooling: as in `StepRule`.

    Example:
        >>> rule = TensorRule(hidden=8, units=4)
        >>> weights = {"weight": torch.zeros(1, 30, 30)}
        >>> state = rule.initial_state(Point(weights, gradients=weights, loss=torch.ones(1)))
        >>> [tuple(state[name]["weight"].shape) for name in ("velocity", "squares")]
        [(1, 30, 30), (1, 30, 30)]

    Source: Metz et al., "Practical tradeoffs between memory, compute, and performance in learned optimizers", CoLLAs
    2022 (arXiv 2203.11860), section 3: a tensor's LSTM over small networks of its coordinates.
    """

    per_tensor: ClassVar[tuple[str, ...]] = (*StepRule.per_tensor, "squares")

    def __init__(
        self, hidden: int = 32, units: int = 8, secants: int = 0, longest: float = 1.5, cooling: float = 0.0
    ) -> None:
        super().__init__(hidden, secants, longest, cooling)
        self.units = units
        self.observe_coordinates: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _coordinate_features
        self.steering = nn.Linear(hidden, 2 * units + _FEATURES + 1)
        self.first = nn.Linear(_FEATURES, units, bias=False)
        self.second = nn.Linear(units, 2, bias=False)
        with torch.no_grad():
            self.steering.weight.mul_(0.1)
            self.steering.bias.zero_()
            self.second.weight.mul_(0.1)

    def initial_state(self, point: Point) -> dict[str, Any]:
        squares = {name: torch.zeros_like(gradient) for name, gradient in point.gradients.items()}
        return {**super().initial_state(point), "squares": squares}

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
        moved, squares = dict(point.parameters), {}
        for name, step in steps.items():
            seen = (point.gradients[name], remembered["velocity"][name], point.parameters[name])
            gradient, fixed, weight = (each.detach() for each in seen) if self.detach else seen
            kept = state["squares"][name]
            if not progress.all_accepted:
                # If the last step is taken back, the moments belong to the point that was left.
                kept = torch.where(fit(progress.accepted, gradient), kept, 0.0)
            squares[name] = torch.addcmul(_SQUARES_MEMORY * kept, gradient, gradient, value=1 - _SQUARES_MEMORY)
            features = self.observe_coordinates(gradient, fixed, squares[name], weight)
            shift, gain = self._outputs(features, remembered["cells"][name][0], step)
            change = torch.addcmul(gain * step, fit(rms(step), step), shift)
            moved[name] = point.parameters[name] - change
        return moved, {**remembered, "squares": squares}

    def carry(
        self, state: dict[str, Any], moves: Sequence[Move], point: Point, accepted: Tensor, spend: bool = False
    ) -> dict[str, Any]:
        squares = dict(state["squares"])
        for move in moves:
            # Here second moments are features, which are kept out of the graph.
            element = still(move.element) if self.detach else move.element
            squares.update(move.symmetry.carry_squares(element, squares, point).tensors)
        return {**super().carry(state, moves, point, accepted, spend), "squares": squares}

    def _outputs(self, features: Tensor, hidden: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        r"""$\tanh(o_1)$ and $2 \sigma(o_2)$ at every coordinate, in the shape and dtype of `like`.

        Args:
            features: `(tasks, features, coordinates)`.
            hidden: hidden state of the tensor's LSTM, `(tasks, hidden)`.
            like: the tensor.
        """
        sizes = (self.units, self.units, _FEATURES, 1)
        gamma, delta, skip, bias = self.steering(hidden).unsqueeze(-1).split(sizes, 1)
        # The matrices are a task's own and small: what is the same at all coordinates is done with them. The hyperbolic
        # tangent is 2 sigmoid(2 x) - 1, which processors compute several times as fast.
        first, out = (weight_by_task(layer, len(features)) for layer in (self.first, self.second))
        into = (2 + 2 * gamma) * first
        past = torch.stack((skip.squeeze(-1), torch.zeros_like(skip).squeeze(-1)), 1)
        level = torch.cat((torch.zeros_like(bias), bias), 1) - out.sum(2, keepdim=True)
        features = features.to(gamma.dtype)
        inner = torch.baddbmm(2 * delta, into, features).sigmoid()
        outputs = torch.baddbmm(torch.baddbmm(level, past, features), 2 * out, inner)
        shift, gain = finite_gradient(outputs).unbind(1)
        shift, gain = (each.to(like.dtype).reshape(like.shape) for each in (shift.tanh(), 2 * gain.sigmoid()))
        return shift, gain


def _coordinate_features(gradient: Tensor, velocity: Tensor, squares: Tensor, weight: Tensor) -> Tensor:
    """Features of every coordinate, of order one, `(tasks, features, coordinates)`."""
    tiny = torch.finfo(gradient.dtype).tiny
    gradient, velocity, squares, weight = (each.flatten(1) for each in (gradient, velocity, squares, weight))
    mean = squares.mean(-1, keepdim=True).clamp_min(tiny)
    relative = squares / mean + 1e-12
    adaptive = velocity / relative.sqrt()
    normal = [each / rms(each).unsqueeze(1) for each in (gradient, velocity, adaptive, weight)]
    stacked = torch.stack((*normal, relative.log() / 10), 1)
    return torch.nan_to_num(stacked, 0.0, 10.0, -10.0).clamp(-10, 10)
