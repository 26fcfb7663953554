"""The learned update for minibatches: the directions of Adam, of the polar factor and of a gauge, mixed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metateleport.gauges import Gauge, precondition
from metateleport.learned.finite import finite_gradient
from metateleport.learned.polar import polar_factor
from metateleport.learned.progress import PROGRESS_FEATURES, Progress, Tolerance
from metateleport.learned.rules.base import RuleSettings, UpdateRule, carried_moments, fit, rms
from metateleport.point import Point, Tensors
from metateleport.settings import AT_LEAST_ONE, NOT_NEGATIVE, setting
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move

__all__ = ["AdaptiveRule", "AdaptiveSettings"]

_FEATURES = 7
_SQUARES_MEMORY = 0.999
"""As long as a run of some hundred steps: where the gradients vanish, the steps have to become shorter with them."""

_RECENT_MEMORY = 0.95

_START = 1.25
"""Length of the first steps, of all layers together, over the weights' size."""

_ROUNDINGS = 16.0
"""So many spacings of numbers, over the largest gradients of the model, are taken for rounding."""

_TABLE = 0.5
"""A matrix whose root mean square is above this at the start is taken for a table of embeddings."""

_SMALLEST_SCALE = 1e-2
"""Stands for the root mean square of a layer whose weights are smaller: one that starts at zero has to move."""

_CALM = 2.0
"""Where the logit of the exponent starts that says how much shorter steps become with the gradients."""

_MIXTURE = (0.0, 1.5, -1.5)
"""Where the logits of Adam's direction, the polar factor's and the gauge's start."""


@dataclasses.dataclass(frozen=True)
class AdaptiveSettings(RuleSettings):
    """A learned update for minibatches (`AdaptiveRule`).

    Args:
        hidden: units of the LSTM of each tensor.
        cooling: how fast steps get shorter with time; zero for not at all.
    """

    kind: ClassVar[str] = "adaptive"

    hidden: int = setting(32, AT_LEAST_ONE)
    cooling: float = setting(0.0, NOT_NEGATIVE)

    def rule(self) -> AdaptiveRule:
        return AdaptiveRule(self.hidden, self.cooling)


class AdaptiveRule(nn.Module, UpdateRule):
    r"""Steps of a length relative to the weights, along a mixture of three directions, tensor by tensor.

    $$v \mapsto \beta v + (1 - \beta) G, \quad q \mapsto 0.999\,q + 0.001\,G^2, \quad
      r \mapsto 0.95\,r + 0.05\,\overline{G^2}, \qquad
      W \mapsto W - m\, d\, \frac{\rho}{\ell}\, \lambda \sum_i c_i \frac{D_i}{\mathrm{rms}(D_i)},$$

    $$D_1 = \frac{\hat v}{\sqrt{\hat q}}, \quad D_2 = \mathrm{polar}(\hat v), \quad D_3 = P \hat v, \qquad
      \lambda = \mathrm{rms}(D_1)^\kappa \left(\frac{\mathrm{rms}(\hat v)}{\sqrt{\hat r}}\right)^{1 - \kappa}.$$

    Hats correct for a start at zero, $P$ is the gauge of the tensor, $d \le 1$ the task's damping, $\rho$ the geometric
    mean over the $\ell$ layers of their weights' root mean square at the start, tables of embeddings left out. A vector
    has no polar factor of its own, and some tensors no gauge: those directions then have no share. An LSTM for each
    tensor (weights shared, state its own) puts out $m$, $\beta$, $\kappa$ and the shares $c$, which sum up to one.

    `StepRule` divides by a curvature bound of the batch at hand. On a fixed set of data that is what makes it fast; on
    minibatches the bound goes with the batch's loss, which differs by factors where few samples are still wrong, and
    the steps would be longest where a batch has the least to say. Here nothing is divided by what one batch tells, and
    no bound is asked for, so that tensors of an attention are stepped like others.

    All directions have one length. With a long memory, $\kappa = 1$, it goes down with the gradients, and no schedule
    is needed to come to rest; with a short one only with their noise. The length is that of all layers, not relative to
    each layer's own weights: layers that take in few features have large ones, and are the first to become unstable.

    With a `cooling` rate $a$ all steps are shortened by $1 / \sqrt{1 + a t}$, $t$ the evaluations seen. Where the loss
    of a batch is spread by more than its own size, nothing tells that it is at rest, and steps that are too long by a
    little, on inputs larger than any trained on, come back up after the horizon that training has seen. The rate is a
    constant: what it is for lies beyond that horizon.

    Velocity and second moment move with a teleport. A task that takes its last step back takes it once more, damped.

    Args:
        hidden: units of the LSTM.
        cooling: $a$, zero for steps that are not shortened with time.

    Example:
        >>> sum(p.numel() for p in AdaptiveRule(hidden=8).parameters())
        758

    Source: Kingma and Ba, ICLR 2015 (arXiv 1412.6980) for Adam's direction; Jordan et al., "Muon: An optimizer for
    hidden layers in neural networks", 2024, for the polar factor's; Zinkevich, "Online convex programming and
    generalized infinitesimal gradient ascent", ICML 2003, for steps that fall with the root of time.
    """

    # Where few samples are still wrong, the loss of a batch is spread by more than its own size, and what is taken back
    # are good steps: only what leads back up to where the task began is a failure, and far above it always.
    tolerance: ClassVar[Tolerance] = Tolerance(spreads=5.0, share=1.0, memory=0.9, start=0.5, ceiling=2.0)

    per_tensor: ClassVar[tuple[str, ...]] = ("cells", "momentum", "squares", "weights", "recent", "seen")
    void_on_growth: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(self, hidden: int = 32, cooling: float = 0.0) -> None:
        super().__init__()
        self.hidden, self.cooling = hidden, cooling
        self.detach = True
        self.observe: Callable[..., Tensor] = _observe
        self.polar: Callable[[Tensor], Tensor] = polar_factor
        self.cell = nn.LSTMCell(_FEATURES + PROGRESS_FEATURES, hidden)
        self.head = nn.Linear(hidden, 3 + len(_MIXTURE))
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(torch.tensor([0.0, math.log(9.0), _CALM, *_MIXTURE]))

    def initial_state(self, point: Point) -> dict[str, Any]:
        assert point.loss is not None
        own = self.head.weight
        zero = torch.zeros(*point.loss.shape, self.hidden, dtype=own.dtype, device=own.device)
        moments = {name: torch.zeros_like(gradient) for name, gradient in point.gradients.items()}
        none = torch.zeros_like(point.loss)
        return {
            "cells": dict.fromkeys(point.gradients, (zero, zero)),
            "momentum": moments,
            "squares": moments,
            "weights": dict.fromkeys(point.gradients, none),
            "recent": dict.fromkeys(point.gradients, none),
            "seen": dict.fromkeys(point.gradients, none),
            "scale": _usual_scale(point),
        }

    def step(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        gauges: Sequence[Gauge] = (),
    ) -> tuple[Tensors, dict[str, Any]]:
        assert point.loss is not None
        # Of each tensor, as some are used now and then.
        seen = {
            name: torch.where(progress.accepted, state["seen"][name] + 1, state["seen"][name])
            for name in point.gradients
        }
        squares = {
            name: _mean(state["squares"][name], gradient.square(), _SQUARES_MEMORY, progress.accepted)
            for name, gradient in point.gradients.items()
        }
        normal = {
            name: value / fit(1 - _SQUARES_MEMORY ** seen[name].clamp_min(1.0), value)
            for name, value in squares.items()
        }
        recent = {
            name: _mean(state["recent"][name], gradient.square().flatten(1).mean(1), _RECENT_MEMORY, progress.accepted)
            for name, gradient in point.gradients.items()
        }
        outputs, cells = self._outputs(point, progress, state, normal)
        sizes = _START * (4 * (outputs[..., 0] / 4).tanh()).exp() * progress.damping * state["scale"]
        if self.cooling:
            sizes = sizes / math.sqrt(1 + self.cooling * progress.time)
        memories, calms = outputs[..., 1].sigmoid(), outputs[..., 2].sigmoid()
        momentum, weights, means = {}, {}, {}
        for index, (name, gradient) in enumerate(point.gradients.items()):
            momentum[name] = _mean(state["momentum"][name], gradient, memories[index], progress.accepted)
            known = state["weights"][name]
            weights[name] = _mean(known, torch.ones_like(known), memories[index], progress.accepted)
            means[name] = momentum[name] / fit(weights[name].clamp_min(1e-6), gradient)
        raised = precondition(gauges, means, point)
        loud = self._loudness(normal)
        gauged = {name for gauge in gauges for name in gauge.names}
        moved = dict(point.parameters)
        for index, (name, mean) in enumerate(means.items()):
            level = normal[name].flatten(1).mean(1) + torch.finfo(point.loss.dtype).tiny
            # Units that were never on have no second moment; they have no velocity either.
            smallest = torch.finfo(mean.dtype).tiny
            adaptive = mean / (normal[name] + fit(1e-8 * level, mean)).clamp_min(smallest).sqrt()
            size = _rms(adaptive)
            young = 1 - _RECENT_MEMORY ** seen[name].clamp_min(1.0)
            steady = _rms(mean) / (recent[name] / young + torch.finfo(point.loss.dtype).tiny).sqrt()
            length = loud[name] * size ** calms[index] * steady ** (1 - calms[index])
            directions = {0: adaptive * fit(length / size, adaptive)}
            if mean.ndim > 2:
                polar = self.polar(mean.detach() if self.detach else mean)
                directions[1] = polar * fit(length / _rms(polar), polar)
            if name in gauged:
                directions[2] = raised[name] * fit(length / _rms(raised[name]), raised[name])
            shares = outputs[index][..., [3 + each for each in directions]].softmax(-1)
            step = sum(
                fit(share, mean) * each for share, each in zip(shares.unbind(-1), directions.values(), strict=True)
            )
            moved[name] = point.parameters[name] - fit(sizes[index], mean) * step
        after = {"momentum": momentum, "squares": squares, "recent": recent, "weights": weights, "seen": seen}
        return moved, {**state, "cells": cells, **after}

    def carry(self, state: dict[str, Any], moves: Sequence[Move], point: Point, accepted: Tensor) -> dict[str, Any]:
        return {**state, **carried_moments(state, moves, point, detach=False)}

    def _loudness(self, normal: Tensors) -> Tensors:
        """Whether a tensor's gradients are more than rounding of the model's, in [0, 1], `(tasks,)`.

        A bias in front of a batch norm has no gradient but rounding, and a direction of unit length made of that would
        carry it away.
        """
        levels = {name: value.detach().flatten(1).mean(1).sqrt() for name, value in normal.items()}
        largest = torch.stack(list(levels.values())).amax(0)
        quiet = _ROUNDINGS * torch.finfo(largest.dtype).eps * largest
        return {
            name: (level / quiet.clamp_min(torch.finfo(level.dtype).tiny) - 1).clamp(0.0, 1.0)
            for name, level in levels.items()
        }

    def _outputs(
        self, point: Point, progress: Progress, state: dict[str, Any], normal: Tensors
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """What the network says of every tensor, `(tensors, tasks, outputs)`, and its new states."""
        assert point.loss is not None
        names = list(point.gradients)
        moments: list[Tensors] = [state["momentum"], normal]
        if self.detach:
            moments = [{name: value.detach() for name, value in each.items()} for each in moments]
        scale = state["scale"].detach() if self.detach else state["scale"]
        inputs = self.observe(point.detach() if self.detach else point, *moments, scale, progress)
        inputs = torch.nan_to_num(inputs, 0.0, 10.0, -10.0).clamp(-10, 10).to(self.head.weight.dtype)
        cells = state["cells"]
        before = tuple(torch.stack([cells[name][part] for name in names]).flatten(0, 1) for part in (0, 1))
        hidden, memory = self.cell(inputs.flatten(0, 1), before)
        size = (len(names), *point.loss.shape)
        outputs = finite_gradient(self.head(hidden)).to(point.loss.dtype).reshape(*size, -1)
        hidden, memory = hidden.reshape(*size, -1), memory.reshape(*size, -1)
        return outputs, {name: (hidden[index], memory[index]) for index, name in enumerate(names)}


def _mean(before: Tensor, now: Tensor, memory: float | Tensor, accepted: Tensor) -> Tensor:
    """A running mean; as it was for tasks that are back at a point whose gradient it has seen."""
    share = memory if isinstance(memory, float) else fit(memory, before)
    return torch.where(fit(accepted, before), share * before + (1 - share) * now, before)


def _rms(tensor: Tensor) -> Tensor:
    """Root mean square of each task's tensor; its derivative is finite at zero."""
    return (tensor.flatten(1).square().mean(1) + torch.finfo(tensor.dtype).tiny).sqrt()


def _usual_scale(point: Point) -> Tensor:
    """Geometric mean of the layers' sizes over their number, `(tasks,)`; tables of embeddings do not count in the mean.

    Their entries are of order one whatever the model is like, and with them in the mean steps would be longer than the
    other layers' weights.
    """
    layers = _layer_scales(point)
    counted = dict.fromkeys(layers, torch.ones_like(next(iter(layers.values())), dtype=torch.bool))
    for name in point.gradients:
        value = point.parameters[name].detach()
        if value.ndim > 2:
            counted[_layer(name)] = counted[_layer(name)] & (_rms(value) <= _TABLE)
    mask = torch.stack(list(counted.values()))
    mask = torch.where(mask.any(0), mask, True)
    logs = torch.stack(list(layers.values())).log()
    return (torch.where(mask, logs, 0.0).sum(0) / mask.sum(0)).exp() / len(layers)


def _layer_scales(point: Point) -> Tensors:
    """Root mean square of all parameters of each layer together, `(tasks,)`, by its name."""
    layers: dict[str, list[Tensor]] = {}
    for name in point.gradients:
        layers.setdefault(_layer(name), []).append(point.parameters[name].flatten(1))
    return {layer: _rms(torch.cat(parts, 1)).clamp_min(_SMALLEST_SCALE) for layer, parts in layers.items()}


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name


def _observe(point: Point, momentum: Tensors, normal: Tensors, scale: Tensor, progress: Progress) -> Tensor:
    """What the network sees of every tensor, `(tensors, tasks, features)`."""
    assert point.loss is not None
    loss = point.loss
    tiny = torch.finfo(loss.dtype).tiny
    shared = progress.features()
    late = torch.full_like(loss, math.log(progress.time + 1) / 5)
    layers = _layer_scales(point)
    rows = []
    for name, gradient in point.gradients.items():
        level = normal[name].flatten(1).mean(1).clamp_min(tiny).sqrt()
        velocity = rms(momentum[name])
        agreement = (gradient * momentum[name]).flatten(1).mean(1) / (rms(gradient) * velocity)
        # How much of the loss one step of the first length would take, were the loss linear.
        steep = (level * scale * gradient.flatten(1).shape[1] / loss.abs().clamp_min(tiny)).clamp_min(tiny).log()
        steep = steep if progress.known else torch.zeros_like(steep)
        steady = (velocity / level).clamp_min(1e-4).log()
        surprise = (rms(gradient) / level).clamp_min(1e-4).log()
        bias = torch.full_like(loss, float(name.rpartition(".")[2] == "bias"))
        heavy = (layers[_layer(name)] / scale).log()
        own = torch.stack((steady / 3, agreement, surprise, steep / 5, bias, late, heavy / 3), -1)
        rows.append(torch.cat((own, shared), -1))
    return torch.stack(rows)
