"""The learned step: descent with a step and a momentum for each tensor, bounded by the curvature."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metateleport.gauges import Gauge, precondition
from metateleport.groups import still
from metateleport.learned.curvature import curvature_bounds, smooth_largest
from metateleport.learned.parts import UNITS
from metateleport.learned.progress import PROGRESS_FEATURES, Progress
from metateleport.learned.rules.base import Learns, RuleSettings, UpdateRule, subtracted
from metateleport.learned.secants import Secant, secant_between, with_secants
from metateleport.linalg import finite_gradient, fit, possible
from metateleport.point import Point, Tensors, made_of
from metateleport.settings import ABOVE_ONE, AT_LEAST_ONE, NOT_NEGATIVE, setting
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move

__all__ = ["StepRule", "StepSettings"]

Cell = tuple[Tensor, Tensor]
_TENSOR_FEATURES = 7
_PLACE = 3.0
"""Scale of the features of a tensor's place: at one, some meta-seeds never learn different steps for two layers."""

_PATIENCE = 10.0
"""Rest at which steps begin to get shorter: even without noise a loss may stay level for a while."""

_AT_REST: dict[str, Any] = {"moving": False, "secants": (), "from": None}


@dataclasses.dataclass(frozen=True)
class StepSettings(RuleSettings):
    """A learned step for each tensor, within the curvature bound (`StepRule`).

    Args:
        hidden: units of the LSTM.
        secants: number of secant pairs that are built around the learned step if every evaluation sees all data.
        longest: the longest step in units of the joint curvature bound, above one. Keep it short where a gauge makes
            the bound tight: with longer steps training makes up for an uneven gauge instead of improving it.
        cooling: how fast steps on minibatches get shorter once the loss is down to its noise; the value at the start of
            meta-training, which is learned further. Zero for steps that do not get shorter.
    """

    kind: ClassVar[str] = "lr"

    hidden: int = setting(32, AT_LEAST_ONE, UNITS)
    secants: int = setting(0, NOT_NEGATIVE, 1000)
    longest: float = setting(1.5, ABOVE_ONE, 1e6)
    cooling: float = setting(0.0, NOT_NEGATIVE, 1e6)

    @property
    def learns(self) -> Learns:
        return "lr"

    def rule(self) -> StepRule:
        return StepRule(self.hidden, self.secants, self.longest, self.cooling)


class StepRule(nn.Module, UpdateRule):
    r"""Gradient descent with a learned step and a learned momentum for each tensor.

    $$v \mapsto \beta v + (1 - \beta) G, \qquad W \mapsto W - m\,s\,d\,P v / \kappa, \qquad \sum s = 1$$

    $P$ is the preconditioner of the tensor's gauge (`metateleport.gauges.precondition`; the identity without a gauge),
    $\kappa$ the smooth curvature bound of the layer in that gauge, $d \le 1$ the task's damping. An LSTM for each
    tensor (with shared weights and a state of its own) puts out the tensor's share $s$ of the step, at the start the
    same for all; $m \in (0, m_{\max})$, at the start one; and $\beta \in (0, 1)$, at the start a twentieth. Each bound
    is of one layer alone; if every layer took the longest step that it could take alone, they would overshoot together.
    Shares prevent that. For residuals with the Jacobian $(J_1, \dots, J_n)$, by Cauchy and Schwarz,

    $$\Big|\sum_i J_i \delta_i\Big|^2 \le \sum_i |J_i \delta_i|^2 / s_i,$$

    so that, where the bounds hold, $\kappa_i / s_i$ bound the curvature jointly, and a step with $m = 1$ lowers the
    Gauss-Newton model. Steps with a much larger $m$ gain only where a gauge has left the curvature uneven, and then the
    gauge does not learn to make it even.

    The velocity is a covector and moves with a teleport; a task that goes back to its last accepted point starts with
    $v = G$. For tensors without a bound Polyak's step $L / \langle G, P G \rangle$, with the sum over all such tensors,
    replaces $s / \kappa$.

    The LSTM's inputs are kept out of the graph, as those of the teleporter are; only tests of the gradient itself set
    `detach` to False, or replace `observe`.

    With `secants` the last steps and changes of the gradient are built around $m P / \kappa$, as limited-memory BFGS
    builds them around its scaled identity. The pairs are kept out of the graph, and a learned trust in (0, 1) mixes
    that step with the one above, tensor by tensor. This needs the same data at every evaluation: gradients of two
    different minibatches give no secant.

    With a `cooling` rate $a$ steps on minibatches get shorter once the loss is down to its noise, by the factor
    $1 / (1 + a\,e^{o} (r - 10)_+)$, with $r$ the rest (`Progress`) and $o \in (-2, 2)$ an output for each tensor. This
    is Robbins and Monro's sequence, which averages noise away, begun once the loss has nearly stopped falling. Without
    it, steps long enough for data without noise keep up the error that they make from noise.

    Args:
        hidden: units of the LSTM.
        secants: number of secant pairs.
        longest: $m_{\max}$, above one. From two on a step overshoots where the bound is met.
        cooling: $a$, the rate at the start of training; zero for steps that do not get shorter.

    Example:
        >>> sum(p.numel() for p in StepRule(hidden=8).parameters())
        731

    Source: Robbins and Monro, "A stochastic approximation method", Ann. Math. Stat. 1951, for the cooling.
    """

    divides_by_loss: ClassVar[bool] = True
    per_tensor: ClassVar[tuple[str, ...]] = ("cells", "velocity")
    rows_by_task: ClassVar[bool] = True
    void_on_change: ClassVar[tuple[str, ...]] = ("secants", "from")

    def __init__(self, hidden: int = 32, secants: int = 0, longest: float = 1.5, cooling: float = 0.0) -> None:
        super().__init__()
        self.hidden, self.secants, self.longest, self.cooling = hidden, secants, longest, cooling
        self.detach = True
        self.observe: Callable[..., Tensor] = _observe
        self.secant: Callable[..., Secant] = secant_between
        self.cell = nn.LSTMCell(_TENSOR_FEATURES + PROGRESS_FEATURES, hidden)
        # Hardly any trust at first: in a step that secants have changed, the effect of a gauge hardly shows.
        start = [-math.log(longest - 1), -3.0, 0.0, *([0.0] if cooling else []), *([-3.0] if secants else [])]
        self.head = nn.Linear(hidden, len(start))
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(torch.tensor(start))

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
        spend: bool = False,
    ) -> tuple[Tensors, dict[str, Any]]:
        changes, remembered = self._changes(point, symmetries, progress, state, gauges)
        return {**point.parameters, **subtracted(point.parameters, changes)}, remembered

    def carry(
        self, state: dict[str, Any], moves: Sequence[Move], point: Point, accepted: Tensor, spend: bool = False
    ) -> dict[str, Any]:
        velocity, secants = dict(state["velocity"]), list(state["secants"])
        if state["from"] is not None:
            now = point.detach()
            own = {name: now.parameters[name] for name in now.gradients}
            secants = [*secants, self.secant(state["from"], (own, now.gradients), accepted)][-self.secants :]
        for move in moves:
            velocity.update(move.symmetry.carry_covectors(move.element, velocity, point).tensors)
            secants = [_carried_secant(Secant(*each), move, point) for each in secants]
        return {**state, "velocity": velocity, "secants": tuple(secants)}

    def network(self, inputs: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The outputs of the LSTM and its head for every tensor and task, in rows, and the new state."""
        hidden, memory = self.cell(inputs, state)
        return self.head(hidden), (hidden, memory)

    def _changes(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        gauges: Sequence[Gauge],
    ) -> tuple[Tensors, dict[str, Any]]:
        """The change to subtract from each tensor with a gradient, and the new state."""
        scales, velocity, trusts, cells = self._velocities(point, symmetries, progress, state, gauges)

        def inner(direction: Tensors) -> Tensors:
            raised = precondition(gauges, direction, point)
            return {name: fit(scales[name], value) * value for name, value in raised.items()}

        remembered = {"cells": cells, "velocity": velocity, "moving": True, "secants": (), "from": None}
        changes = inner(velocity)
        if self.secants and progress.deterministic:
            bent = with_secants([Secant(*each) for each in state["secants"]], velocity, inner)
            changes = {name: value + fit(trusts[name], value) * (bent[name] - value) for name, value in changes.items()}
            fixed = point.detach()
            own = {name: fixed.parameters[name] for name in fixed.gradients}
            remembered |= {"secants": state["secants"], "from": (own, fixed.gradients)}
        return {name: fit(progress.damping, value) * value for name, value in changes.items()}, remembered

    def _velocities(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        gauges: Sequence[Gauge],
    ) -> tuple[Tensors, Tensors, Tensors, dict[str, Cell]]:
        """For each tensor the factor on its step in its gauge, `(tasks,)`, the velocity and the trust in secants."""
        assert point.loss is not None
        largest: Tensors = {}
        bounds = curvature_bounds(point, symmetries, gauges, largest)
        unbounded = [name for name in point.gradients if name not in bounds]
        names = list(point.gradients)
        own = self.head.weight.dtype
        if self.detach:
            fixed, sizes = ({name: value.detach() for name, value in each.items()} for each in (bounds, largest))
            still = [gauge.detached() for gauge in gauges]
            inputs = self.observe(point.detach(), fixed, progress, still, symmetries, sizes)
        else:
            inputs = self.observe(point, bounds, progress, gauges, symmetries, largest)
        inputs = torch.nan_to_num(inputs, 0.0, 10.0, -10.0).clamp(-10, 10).to(own)
        cells = state["cells"]
        before = tuple(torch.stack([cells[name][part] for name in names]).flatten(0, 1).to(own) for part in (0, 1))
        answers, (hidden, memory) = self.network(inputs.flatten(0, 1), before)
        size = (len(names), *point.loss.shape)
        outputs = finite_gradient(answers).to(point.loss.dtype).reshape(*size, -1).unbind(-1)
        shares = _shares(outputs[2], [name in bounds for name in names])
        multipliers = self.longest * outputs[0].sigmoid() * shares
        if unbounded:
            # Polyak's step is the longest that a step may be; `longest`, in units of a bound, does not apply to it.
            whole = torch.tensor([[name in bounds] for name in names], device=shares.device)
            multipliers = torch.where(whole, multipliers, multipliers.clamp_max(1.0))
        if self.cooling:
            rest = (progress.rest - _PATIENCE).clamp_min(0)
            multipliers = multipliers / (1 + self.cooling * (2 * outputs[3].tanh()).exp() * rest)
        reaches = {}
        if bounds:
            known = [name for name in names if name in bounds]
            reciprocals = _reciprocal(torch.stack([bounds[name] for name in known])).unbind(0)
            reaches = dict(zip(known, reciprocals, strict=True))
        if unbounded:
            reaches |= dict.fromkeys(unbounded, _polyak(point, unbounded, gauges))
        scaled = multipliers * torch.stack([reaches[name] for name in names])
        scales = dict(zip(names, scaled.unbind(0), strict=True))
        trusts = dict(zip(names, outputs[-1].sigmoid().unbind(0), strict=True)) if self.secants else {}
        velocity = {}
        for name, memories in zip(names, outputs[1].sigmoid().unbind(0), strict=True):
            gradient = kept = point.gradients[name]
            if state["moving"]:
                kept = finite_gradient(state["velocity"][name])
                if not progress.all_accepted:
                    kept = torch.where(fit(progress.accepted, gradient), kept, gradient)
            velocity[name] = torch.lerp(gradient, kept, fit(memories, gradient))
        hiddens, after = (part.reshape(*size, -1).unbind(0) for part in (hidden, memory))
        return scales, velocity, trusts, dict(zip(names, zip(hiddens, after, strict=True), strict=True))


def _shares(logits: Tensor, bounded: Sequence[bool]) -> Tensor:
    """The shares of the step of tensors with a bound, which sum to one, `(tensors, tasks)`; one for the others."""
    if not any(bounded):
        return torch.ones_like(logits)
    if all(bounded):
        return logits.softmax(0)
    inside = torch.tensor(bounded, device=logits.device).unsqueeze(-1)
    return torch.where(inside, logits.masked_fill(~inside, -torch.inf).softmax(0), 1.0)


def _carried_secant(secant: Secant, move: Move, point: Point) -> Secant:
    """A secant pair carried along a teleport; void if the teleport has no linear action to carry it by."""
    moved = move.size > 0
    if not possible(moved):
        return secant
    if move.symmetry.exactness != "exact":
        return secant._replace(weight=torch.where(moved, 0.0, secant.weight))
    element = still(move.element)
    step = {**secant.step, **move.symmetry.carry_vectors(element, secant.step, point)}
    return Secant(
        step, {**secant.change, **move.symmetry.carry_covectors(element, secant.change, point).tensors}, secant.weight
    )


def _reciprocal(bound: Tensor) -> Tensor:
    """One over a bound; zero where the curvature is zero, as the gradient is zero there too."""
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


def _observe(
    point: Point,
    bounds: Tensors,
    progress: Progress,
    gauges: Sequence[Gauge],
    symmetries: Sequence[Symmetry],
    largest: Tensors | None = None,
) -> Tensor:
    """Features of every tensor with a gradient for the step network, `(tensors, tasks, features)`.

    `largest` has the smooth bounds on the layers' inputs that are known already, by the layer's name.
    """
    assert point.loss is not None
    loss, names, count = point.loss, list(point.gradients), len(point.gradients)
    tiny = torch.finfo(loss.dtype).tiny
    lower = {symmetry.modules[0] for symmetry in symmetries if symmetry.modules}
    none = torch.zeros_like(loss)
    promised, steep = torch.full_like(loss, 1e-17), {}
    known = [name for name in names if name in bounds]
    if known:
        raised = precondition(gauges, {name: point.gradients[name] for name in known}, point)
        products = [(point.gradients[name] * raised[name]).flatten(loss.ndim).sum(-1) for name in known]
        limits = (2 * torch.stack([bounds[name] for name in known]) * loss.abs()).clamp_min(tiny)
        # The share of the loss that one step along a tensor alone could take; at most one for squared errors.
        shares = torch.stack(products) / limits
        # Layers that each could remove the same error overshoot together; with this sum a tensor sees the others' part.
        promised = promised + shares.sum(0)
        steep = dict(zip(known, (shares.clamp_min(tiny).log().clamp_min(-40) / 5).unbind(0), strict=True))
    uneven = _unevenness(point, {} if largest is None else largest)
    own = (
        (promised.log() / 5).expand(count, *loss.shape),
        torch.stack([uneven.get(name, none) for name in names]),
        torch.stack([steep.get(name, none) for name in names]),
    )
    placed = [_place(point, name, lower, name in bounds) for name in names]
    places = torch.tensor(placed, dtype=loss.dtype, device=loss.device)
    places = places.reshape(count, *(1,) * loss.ndim, -1).expand(count, *loss.shape, -1)
    return torch.cat((torch.stack(own, -1), places, progress.features().expand(count, *loss.shape, -1)), -1)


def _unevenness(point: Point, largest: Tensors) -> Tensors:
    """Half the log of the largest eigenvalue of each weight's inputs over the mean one, by the weight's name."""
    names = [name for name in point.gradients if name.endswith(".weight") or name == "weight"]
    layers = {name: name.rpartition(".")[0] for name in names}
    layers = {name: layer for name, layer in layers.items() if layer in point.activations}
    if not layers:
        return {}
    sizes, means = [], []
    for layer in layers.values():
        inputs = point.activations[layer]
        sizes.append(largest[layer] if layer in largest else smooth_largest(inputs))
        means.append(made_of(inputs, "mean eigenvalue", lambda: _mean_eigenvalue(inputs)))  # noqa: B023
    tiny = torch.finfo(sizes[0].dtype).tiny
    logs = (torch.stack(sizes) / torch.stack(means).clamp_min(tiny)).clamp_min(tiny).log() / 2
    return dict(zip(layers, logs.unbind(0), strict=True))


def _mean_eigenvalue(inputs: Tensor) -> Tensor:
    return inputs.square().sum((-2, -1)) / min(inputs.shape[-2:])


def _place(point: Point, name: str, lower: set[str], known: bool) -> tuple[float, float, float, float]:
    """Whether a tensor's bound is known, whether it is a bias, whether another layer follows, and the number of samples
    over that of inputs."""
    layer, _, kind = name.rpartition(".")
    inputs = point.activations.get(layer)
    ratio = 0.0 if inputs is None else math.log(inputs.shape[-2] / inputs.shape[-1])
    return float(known), _PLACE * (kind == "bias"), _PLACE * (layer in lower), ratio
