"""Update rules: how a learned network turns gradients into a step, bounded by the curvature."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.gauges import Gauge, precondition
from metateleport.learned.curvature import curvature_bounds, smooth_largest
from metateleport.learned.finite import finite_gradient
from metateleport.learned.progress import PROGRESS_FEATURES, Progress
from metateleport.learned.secants import Secant, secant_between, with_secants
from metateleport.point import Point, Tensors
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move

__all__ = ["BASES", "BaseRule", "CoordinateRule", "StepRule", "UpdateRule"]

BASES = ("sgd", "momentum", "adam")
"""Names of the hand-designed optimizers of mode `tele`."""

Cell = tuple[Tensor, Tensor]
_TENSOR_FEATURES = 6


_AT_REST: dict[str, Any] = {"moving": False, "secants": (), "from": None}


class UpdateRule(abc.ABC):
    """Turns a point into the parameters to evaluate next."""

    @abc.abstractmethod
    def initial_state(self, point: Point) -> Any:
        """The state before the first step."""

    @abc.abstractmethod
    def step(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: Any,
        gauges: Sequence[Gauge] = (),
    ) -> tuple[Tensors, Any]:
        """The next parameters and the new state.

        Args:
            point: where the model stands after its teleport, gradients carried along; one task dimension in front.
            symmetries: which tell how the layers follow one another.
            progress: how each task is getting on.
            state: what `initial_state` or the last call gave.
            gauges: that the tensors are to be stepped in; rules that learn no step of their own take none.
        """

    def carry(self, state: Any, moves: Sequence[Move], point: Point, accepted: Tensor) -> Any:
        """Carries what the state remembers along with a teleport; by default it remembers nothing.

        Args:
            state: what `initial_state` or the last call of `step` gave.
            moves: the teleport.
            point: where it starts.
            accepted: where the point is what the last step led to, `(tasks,)`; elsewhere that was taken back.
        """
        return state


class StepRule(nn.Module, UpdateRule):
    r"""Gradient descent with momentum, step and momentum of each tensor learned.

    $$v \mapsto \beta v + (1 - \beta) G, \qquad W \mapsto W - m\,d\,P v / \kappa$$

    $P$ is the gauge of the tensor (`metateleport.gauges.precondition`; one where there is none), $\kappa$ the smooth
    curvature bound of the layer in it, $d \le 1$ the task's damping. An LSTM for each tensor (weights
    shared, state its own) puts out $m \in (e^{-4}, e^4)$, which at the start is one half, and $\beta \in (0, 1)$, at
    the start a twentieth. The bound lies far above the curvature where several layers follow, so $m$ may learn to be
    large; what it then spoils, the acceptance test takes back. The velocity is a covector and moves with a teleport;
    a task that goes back to its last accepted point starts with $v = G$. Tensors without a bound take Polyak's step
    $L / \langle G, P G \rangle$, summed over all such, in the place of $1 / \kappa$.

    The LSTM's inputs are kept out of the graph, as those of the teleporter are; only tests of the gradient itself set
    `detach` to False, or put another function in the place of `observe`.

    With `secants` the last so many steps and changes of the gradient are built around $m P / \kappa$ as limited-memory
    BFGS does around its scaled identity; what they tell is kept out of the graph, and a learned trust in (0, 1) mixes
    that step with the one above, tensor by tensor. Only where all data are seen at every evaluation: the gradients of
    two minibatches have no secant.

    Args:
        hidden: units of the LSTM.
        secants: number of secant pairs.

    Example:
        >>> sum(p.numel() for p in StepRule(hidden=8).parameters())
        690
    """

    def __init__(self, hidden: int = 32, secants: int = 0) -> None:
        super().__init__()
        self.hidden, self.secants = hidden, secants
        self.detach = True
        self.observe: Callable[..., Tensor] = _observe
        self.cell = nn.LSTMCell(_TENSOR_FEATURES + PROGRESS_FEATURES, hidden)
        self.head = nn.Linear(hidden, 3 if secants else 2)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            # Hardly any trust at first: a step that secants have bent shows little of what a gauge is worth.
            self.head.bias.copy_(torch.tensor([-0.7, -3.0, -3.0])[: len(self.head.bias)])

    def initial_state(self, point: Point) -> dict[str, Any]:
        assert point.loss is not None
        own = self.head.weight
        zero = torch.zeros(*point.loss.shape, self.hidden, dtype=own.dtype, device=own.device)
        still = {name: torch.zeros_like(gradient) for name, gradient in point.gradients.items()}
        return {"cells": dict.fromkeys(point.gradients, (zero, zero)), "velocity": still, **_AT_REST}

    def step(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        gauges: Sequence[Gauge] = (),
    ) -> tuple[Tensors, dict[str, Any]]:
        changes, remembered = self._changes(point, symmetries, progress, state, gauges)
        return {**point.parameters, **_subtracted(point.parameters, changes)}, remembered

    def carry(self, state: dict[str, Any], moves: Sequence[Move], point: Point, accepted: Tensor) -> dict[str, Any]:
        velocity, secants = dict(state["velocity"]), list(state["secants"])
        if state["from"] is not None:
            now = point.detach()
            own = {name: now.parameters[name] for name in now.gradients}
            secants = [*secants, secant_between(state["from"], (own, now.gradients), accepted)][-self.secants :]
        for move in moves:
            velocity.update(move.symmetry.carry_covectors(move.element, velocity, point).tensors)
            secants = [_carried_secant(Secant(*each), move, point) for each in secants]
        return {**state, "velocity": velocity, "secants": tuple(secants)}

    def _changes(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        gauges: Sequence[Gauge],
    ) -> tuple[Tensors, dict[str, Any]]:
        """What to subtract from each tensor with a gradient, and what is remembered of the step."""
        scales, velocity, trusts, cells = self._velocities(point, symmetries, progress, state, gauges)

        def inner(direction: Tensors) -> Tensors:
            raised = precondition(gauges, direction, point)
            return {name: _fit(scales[name], value) * value for name, value in raised.items()}

        remembered = {"cells": cells, "velocity": velocity, "moving": True, "secants": (), "from": None}
        changes = inner(velocity)
        if self.secants and progress.deterministic:
            bent = with_secants([Secant(*each) for each in state["secants"]], velocity, inner)
            changes = {
                name: value + _fit(trusts[name], value) * (bent[name] - value) for name, value in changes.items()
            }
            fixed = point.detach()
            own = {name: fixed.parameters[name] for name in fixed.gradients}
            remembered |= {"secants": state["secants"], "from": (own, fixed.gradients)}
        return {name: _fit(progress.damping, value) * value for name, value in changes.items()}, remembered

    def _velocities(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        gauges: Sequence[Gauge],
    ) -> tuple[Tensors, Tensors, Tensors, dict[str, Cell]]:
        """Of each tensor the factor on its step in its gauge, `(tasks,)`, the velocity and the trust in secants."""
        assert point.loss is not None
        bounds = curvature_bounds(point, symmetries, gauges)
        polyak = _polyak(point, [name for name in point.gradients if name not in bounds], gauges)
        names = list(point.gradients)
        own = self.head.weight.dtype
        if self.detach:
            fixed = {name: value.detach() for name, value in bounds.items()}
            still = [dataclasses.replace(gauge, element=gauge.element.detach()) for gauge in gauges]
            inputs = self.observe(point.detach(), fixed, progress, still, symmetries)
        else:
            inputs = self.observe(point, bounds, progress, gauges, symmetries)
        inputs = torch.nan_to_num(inputs, 0.0, 10.0, -10.0).clamp(-10, 10).to(own)
        cells = state["cells"]
        before = tuple(torch.stack([cells[name][part] for name in names]).flatten(0, 1) for part in (0, 1))
        hidden, memory = self.cell(inputs.flatten(0, 1), before)
        size = (len(names), *point.loss.shape)
        outputs = finite_gradient(self.head(hidden)).to(point.loss.dtype).reshape(*size, -1)
        multipliers, memories = (4 * (outputs[..., 0] / 4).tanh()).exp(), outputs[..., 1].sigmoid()
        hidden, memory = hidden.reshape(*size, -1), memory.reshape(*size, -1)
        trusts = dict(zip(names, outputs[..., -1].sigmoid(), strict=True))
        scales, velocity, after = {}, {}, {}
        for index, name in enumerate(names):
            gradient = point.gradients[name]
            reach = _reciprocal(bounds[name]) if name in bounds else polyak
            scales[name] = multipliers[index] * reach
            kept = gradient
            if state["moving"]:
                kept = torch.where(
                    _fit(progress.accepted, gradient), finite_gradient(state["velocity"][name]), gradient
                )
            share = _fit(memories[index], gradient)
            velocity[name] = share * kept + (1 - share) * gradient
            after[name] = (hidden[index], memory[index])
        return scales, velocity, trusts, after


class CoordinateRule(StepRule):
    r"""A learned update for every coordinate: a two-layer LSTM shared by all, on top of the learned step.

    $$W \mapsto W - \left(2\sigma(o_2)\,\Delta + \mathrm{rms}(\Delta)\tanh(o_1)\right)$$

    with $\Delta$ the learned step and $o_1, o_2$ the LSTM's outputs at the coordinate, from scale-free
    inputs: the gradient over its root mean square, the momentum over the root of the second moment, the log of the
    second moment over its mean, and the time. At the start of meta-training this is the learned step alone.

    Args:
        hidden: units of the per-tensor LSTM.
        coordinate_hidden: units of each layer of the coordinate-wise LSTM.

    Source: Andrychowicz et al., NeurIPS 2016 (arXiv 1606.04474), section 2.1.
    """

    _FEATURES = 4

    def __init__(self, hidden: int = 32, coordinate_hidden: int = 20, secants: int = 0) -> None:
        super().__init__(hidden, secants)
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
        count = sum(gradient.numel() for gradient in point.gradients.values())
        zero = torch.zeros(count, self.coordinate_hidden, dtype=own.dtype, device=own.device)
        moments = {name: torch.zeros_like(gradient) for name, gradient in point.gradients.items()}
        return {**super().initial_state(point), "layers": (zero,) * 4, "momentum": moments, "squares": moments}

    def step(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        gauges: Sequence[Gauge] = (),
    ) -> tuple[Tensors, dict[str, Any]]:
        steps, remembered = self._changes(point, symmetries, progress, state, gauges)
        own = self.coordinate_head.weight.dtype
        momentum, squares, inputs, sizes = {}, {}, [], {}
        for name, gradient in point.gradients.items():
            fixed = gradient.detach() if self.detach else gradient
            # What a task remembers where its last step is taken back belongs to a place that it has left.
            kept = _fit(progress.accepted, gradient).to(gradient.dtype)
            momentum[name] = 0.9 * kept * state["momentum"][name] + 0.1 * fixed
            squares[name] = 0.95 * kept * state["squares"][name] + 0.05 * fixed.square()
            sizes[name] = _rms(steps[name])
            inputs.append(self.observe_coordinates(fixed, momentum[name], squares[name], progress.time).to(own))
        flat = torch.cat(inputs)
        first = self.first(flat, state["layers"][:2])
        second = self.second(first[0], state["layers"][2:])
        outputs = finite_gradient(self.coordinate_head(second[0]))
        changes, start = {}, 0
        for name, gradient in point.gradients.items():
            own_outputs = outputs[start : start + gradient.numel()].to(gradient.dtype)
            start += gradient.numel()
            shift, gain = (part.reshape(gradient.shape) for part in own_outputs.unbind(-1))
            changes[name] = 2 * gain.sigmoid() * steps[name] + _fit(sizes[name], gradient) * shift.tanh()
        moved = {**point.parameters, **_subtracted(point.parameters, changes)}
        layers = (*first, *second)
        return moved, {**remembered, "layers": layers, "momentum": momentum, "squares": squares}

    def carry(self, state: dict[str, Any], moves: Sequence[Move], point: Point, accepted: Tensor) -> dict[str, Any]:
        # The moments are features here, and features are kept out of the graph.
        return {**super().carry(state, moves, point, accepted), **_carried(state, moves, point, self.detach)}


@dataclasses.dataclass(frozen=True)
class BaseRule(UpdateRule):
    """A hand-designed optimizer on the stack: what mode `tele` puts behind the learned teleporter.

    The same steps as `torch.optim.SGD` (with momentum) and `torch.optim.Adam`, differentiable, times the damping of
    the task. A task that goes back to its last accepted point starts without momentum: what it had was carried on.

    Args:
        optimizer: `sgd`, `momentum` or `adam`.
        lr: step size.

    Raises:
        ValueError: if the optimizer is unknown or the step size not positive.
    """

    optimizer: str = "sgd"
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.optimizer not in BASES:
            raise ValueError(f"a base optimizer is one of {', '.join(BASES)}; not {self.optimizer!r}")
        if not self.lr > 0:
            raise ValueError(f"the base optimizer's step size has to be positive, not {self.lr!r}")

    def initial_state(self, point: Point) -> dict[str, Any]:
        moments = {name: torch.zeros_like(gradient) for name, gradient in point.gradients.items()}
        return {"momentum": moments, "squares": moments, "time": 0}

    def step(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        gauges: Sequence[Gauge] = (),
    ) -> tuple[Tensors, dict[str, Any]]:
        time = state["time"] + 1
        momentum, squares, moved = {}, {}, dict(point.parameters)
        for name, gradient in point.gradients.items():
            kept = torch.where(_fit(progress.accepted, gradient), state["momentum"][name], 0.0)
            if self.optimizer == "adam":
                momentum[name] = 0.9 * kept + 0.1 * gradient
                squares[name] = 0.999 * state["squares"][name] + 0.001 * gradient.square()
                # The root's derivative is infinite at zero, where a gradient of exactly zero would put a NaN.
                root = (squares[name] / (1 - 0.999**time) + 1e-30).sqrt()
                direction = momentum[name] / (1 - 0.9**time) / (root + 1e-8)
            elif self.optimizer == "momentum":
                momentum[name] = 0.9 * kept + gradient
                squares[name], direction = state["squares"][name], momentum[name]
            else:
                momentum[name], squares[name], direction = state["momentum"][name], state["squares"][name], gradient
            moved[name] = point.parameters[name] - _fit(self.lr * progress.damping, gradient) * direction
        return moved, {"momentum": momentum, "squares": squares, "time": time}

    def carry(self, state: dict[str, Any], moves: Sequence[Move], point: Point, accepted: Tensor) -> dict[str, Any]:
        return {**state, **_carried(state, moves, point, detach=False)}


def _carried(state: dict[str, Any], moves: Sequence[Move], point: Point, detach: bool) -> dict[str, Any]:
    momentum, squares = dict(state["momentum"]), dict(state["squares"])
    for move in moves:
        element = move.element.detach() if detach else move.element
        momentum.update(move.symmetry.carry_covectors(element, momentum, point).tensors)
        squares.update(move.symmetry.carry_squares(element, squares, point).tensors)
    return {"momentum": momentum, "squares": squares}


def _subtracted(parameters: Tensors, changes: Tensors) -> Tensors:
    return {name: parameters[name] - change for name, change in changes.items()}


def _carried_secant(secant: Secant, move: Move, point: Point) -> Secant:
    """A secant pair moved along; void where its teleport has no linear action to move it by."""
    moved = move.size > 0
    if not bool(moved.any()):
        return secant
    if move.symmetry.exactness != "exact":
        return secant._replace(weight=torch.where(moved, 0.0, secant.weight))
    element = move.element.detach()
    step = {**secant.step, **move.symmetry.carry_vectors(element, secant.step, point)}
    return Secant(
        step, {**secant.change, **move.symmetry.carry_covectors(element, secant.change, point).tensors}, secant.weight
    )


def _fit(scale: Tensor, tensor: Tensor) -> Tensor:
    """A `(tasks,)` factor shaped so that it multiplies a tensor of the stack."""
    return scale.reshape(*scale.shape, *(1,) * (tensor.ndim - scale.ndim))


def _reciprocal(bound: Tensor) -> Tensor:
    """One over a bound; zero where there is no curvature, as there is no gradient either."""
    flat = bound <= 1e3 * torch.finfo(bound.dtype).tiny
    return torch.where(flat, 0.0, torch.where(flat, 1.0, bound).reciprocal())


def _polyak(point: Point, names: Sequence[str], gauges: Sequence[Gauge]) -> Tensor:
    """Polyak's step over some tensors together, in their gauges, `(tasks,)`."""
    assert point.loss is not None
    own = {name: point.gradients[name] for name in names}
    raised = precondition(gauges, own, point)
    products = [(own[name] * raised[name]).flatten(point.loss.ndim).sum(-1) for name in names]
    total = sum(products, torch.zeros_like(point.loss))
    return point.loss.abs() / total.clamp_min(torch.finfo(point.loss.dtype).tiny)


def _rms(tensor: Tensor) -> Tensor:
    """Root mean square of each task's tensor, `(tasks,)`."""
    square = tensor.square().reshape(tensor.shape[0], -1).mean(-1)
    return square.clamp_min(torch.finfo(tensor.dtype).tiny).sqrt()


def _observe(
    point: Point, bounds: Tensors, progress: Progress, gauges: Sequence[Gauge], symmetries: Sequence[Symmetry]
) -> Tensor:
    """What the step network sees of every tensor with a gradient, `(tensors, tasks, features)`."""
    shared = progress.features()
    raised = precondition(gauges, point.gradients, point)
    lower = {symmetry.modules[0] for symmetry in symmetries if symmetry.modules}
    rows = []
    for name in point.gradients:
        place = _place_features(point, name, lower)
        rows.append(torch.cat((_tensor_features(point, name, bounds, raised[name]), place, shared), -1))
    return torch.stack(rows)


def _tensor_features(point: Point, name: str, bounds: Tensors, raised: Tensor) -> Tensor:
    """How uneven a tensor's inputs are, how steep it is in its gauge, and whether its curvature is known."""
    assert point.loss is not None
    layer, _, kind = name.rpartition(".")
    loss = point.loss
    tiny = torch.finfo(loss.dtype).tiny
    uneven, steep = torch.zeros_like(loss), torch.zeros_like(loss)
    if layer in point.activations and kind == "weight":
        inputs = point.activations[layer]
        mean = inputs.square().sum((-2, -1)) / min(inputs.shape[-2:])
        uneven = (smooth_largest(inputs) / mean.clamp_min(tiny)).clamp_min(tiny).log()
    if name in bounds:
        product = (point.gradients[name] * raised).reshape(*loss.shape, -1).sum(-1)
        # At most one for squared errors: the share of the loss that one step along this tensor alone could take.
        share = product / (2 * bounds[name] * loss.abs()).clamp_min(tiny)
        steep = share.clamp_min(tiny).log().clamp_min(-40) / 5
    known = torch.full_like(loss, float(name in bounds))
    return torch.stack((uneven / 2, steep, known), -1)


def _place_features(point: Point, name: str, lower: set[str]) -> Tensor:
    """Whether a tensor is a bias, whether a layer follows it, and how many samples there are for its inputs."""
    assert point.loss is not None
    layer, _, kind = name.rpartition(".")
    inputs = point.activations.get(layer)
    ratio = 0.0 if inputs is None else math.log(inputs.shape[-2] / inputs.shape[-1])
    return point.loss.new_tensor((kind == "bias", layer in lower, ratio)).expand(*point.loss.shape, 3)


def _coordinate_features(gradient: Tensor, momentum: Tensor, squares: Tensor, time: int) -> Tensor:
    tiny = torch.finfo(gradient.dtype).tiny
    normal = gradient / _fit(_rms(gradient), gradient)
    adaptive = momentum / (squares.sqrt() + tiny)
    mean = squares.reshape(squares.shape[0], -1).mean(-1).clamp_min(tiny)
    relative = (squares / _fit(mean, squares)).clamp_min(1e-12).log() / 10
    stacked = torch.stack((normal, adaptive, relative, torch.full_like(normal, time / (time + 10))), -1)
    return torch.nan_to_num(stacked, 0.0, 10.0, -10.0).clamp(-10, 10).flatten(0, -2)
