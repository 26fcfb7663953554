"""The learned update for minibatches: Adam's direction and a gauge's, with size, memory and mixture learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metateleport.gauges import Gauge, precondition
from metateleport.learned.finite import finite_gradient
from metateleport.learned.progress import PROGRESS_FEATURES, Progress, Tolerance
from metateleport.learned.rules import UpdateRule, carried_moments, fit, rms
from metateleport.point import Point, Tensors
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move

__all__ = ["AdaptiveRule"]

_FEATURES = 6
_SQUARES_MEMORY = 0.99
_START = 0.1
"""Length of the first step over the root mean square of the layer's weights."""

_SMALLEST_SCALE = 1e-2
"""Stands for the root mean square of a layer whose weights are smaller: one that starts at zero has to move."""


class AdaptiveRule(nn.Module, UpdateRule):
    r"""Steps relative to the weights, along Adam's direction and along that of a gauge, mixed tensor by tensor.

    $$v \mapsto \beta v + (1 - \beta) G, \quad q \mapsto 0.99\,q + 0.01\,G^2, \qquad
      W \mapsto W - \tfrac{m}{10}\, d\, \mathrm{rms}(W_{\text{layer}})
      \left(c\, \frac{\hat v}{\sqrt{\hat q}} + (1 - c)\, \frac{\mathrm{rms}(\hat v)}{\sqrt{\overline{\hat q}}}
      \frac{P \hat v}{\mathrm{rms}(P \hat v)}\right)$$

    $\hat v, \hat q$ are corrected for their start at zero, $P$ is the gauge of the tensor (one where there is none),
    $d \le 1$ the task's damping. An LSTM for each tensor (weights shared, state its own) puts out
    $m \in (e^{-4}, e^4)$, $\beta$ and $c$ in (0, 1), which at the start are 1, 0.9 and 0.73: close to Adam.

    `StepRule` divides by a curvature bound of the batch at hand. On a fixed set of data that is what makes it fast; on
    minibatches the bound goes with the batch's loss, which differs by factors where few samples are still wrong, and
    the steps would be longest where a batch has the least to say. Here nothing is divided by what one batch tells, and
    no bound is asked for, so that tensors of an attention are stepped like others.

    Velocity and second moment move with a teleport. A task that takes its last step back takes it once more, damped.

    Args:
        hidden: units of the LSTM.

    Example:
        >>> sum(p.numel() for p in AdaptiveRule(hidden=8).parameters())
        699

    Source: Kingma and Ba, ICLR 2015 (arXiv 1412.6980) for the direction; You et al., ICLR 2020 (arXiv 1904.00962) for
    steps relative to the weights.
    """

    # Where few samples are still wrong, the loss of a batch is spread by its own size: a narrower test takes back one
    # good step in ten.
    tolerance: ClassVar[Tolerance] = Tolerance(spreads=5.0, share=1.0, memory=0.9)

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.hidden = hidden
        self.detach = True
        self.observe: Callable[..., Tensor] = _observe
        self.cell = nn.LSTMCell(_FEATURES + PROGRESS_FEATURES, hidden)
        self.head = nn.Linear(hidden, 3)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(torch.tensor([0.0, math.log(9.0), 1.0]))

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
            "seen": none,
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
        names = list(point.gradients)
        scales = _scales(point)
        seen = torch.where(progress.accepted, state["seen"] + 1, state["seen"])
        squares = {
            name: _mean(state["squares"][name], gradient.square(), _SQUARES_MEMORY, progress.accepted)
            for name, gradient in point.gradients.items()
        }
        whole = 1 - _SQUARES_MEMORY ** seen.clamp_min(1.0)
        normal = {name: value / fit(whole, value) for name, value in squares.items()}
        outputs, cells = self._outputs(point, progress, state, scales, normal)
        sizes = _START * (4 * (outputs[..., 0] / 4).tanh()).exp() * progress.damping
        memories, shares = outputs[..., 1].sigmoid(), outputs[..., 2].sigmoid()
        momentum, weights, means = {}, {}, {}
        for index, (name, gradient) in enumerate(point.gradients.items()):
            momentum[name] = _mean(state["momentum"][name], gradient, memories[index], progress.accepted)
            known = state["weights"][name]
            weights[name] = _mean(known, torch.ones_like(known), memories[index], progress.accepted)
            means[name] = momentum[name] / fit(weights[name].clamp_min(1e-6), gradient)
        raised = precondition(gauges, means, point)
        moved = dict(point.parameters)
        for index, name in enumerate(names):
            level = normal[name].flatten(1).mean(1) + torch.finfo(point.loss.dtype).tiny
            # Units that were never on have no second moment; they have no velocity either.
            adaptive = means[name] / (normal[name] + fit(1e-8 * level, means[name])).sqrt()
            shared = raised[name] * fit(_rms(means[name]) / (_rms(raised[name]) * level.sqrt()), raised[name])
            share = fit(shares[index], adaptive)
            step = share * adaptive + (1 - share) * shared
            moved[name] = point.parameters[name] - fit(sizes[index] * scales[name], step) * step
        after = {"momentum": momentum, "squares": squares, "weights": weights, "seen": seen}
        return moved, {"cells": cells, **after}

    def carry(self, state: dict[str, Any], moves: Sequence[Move], point: Point, accepted: Tensor) -> dict[str, Any]:
        return {**state, **carried_moments(state, moves, point, detach=False)}

    def _outputs(
        self, point: Point, progress: Progress, state: dict[str, Any], scales: Tensors, normal: Tensors
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """What the network says of every tensor, `(tensors, tasks, 3)`, and its new states."""
        assert point.loss is not None
        names = list(point.gradients)
        moments: list[Tensors] = [state["momentum"], scales, normal]
        if self.detach:
            moments = [{name: value.detach() for name, value in each.items()} for each in moments]
        inputs = self.observe(point.detach() if self.detach else point, *moments, progress)
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


def _scales(point: Point) -> Tensors:
    """Root mean square of all parameters of a tensor's layer together, `(tasks,)`."""
    layers: dict[str, list[Tensor]] = {}
    for name in point.gradients:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(point.parameters[name].flatten(1))
    found = {layer: _rms(torch.cat(parts, 1)).clamp_min(_SMALLEST_SCALE) for layer, parts in layers.items()}
    return {name: found[name.rpartition(".")[0] or name] for name in point.gradients}


def _observe(point: Point, momentum: Tensors, scales: Tensors, normal: Tensors, progress: Progress) -> Tensor:
    """What the network sees of every tensor, `(tensors, tasks, features)`."""
    assert point.loss is not None
    loss = point.loss
    tiny = torch.finfo(loss.dtype).tiny
    shared = progress.features()
    late = torch.full_like(loss, math.log(progress.time + 1) / 5)
    rows = []
    for name, gradient in point.gradients.items():
        level = normal[name].flatten(1).mean(1).clamp_min(tiny).sqrt()
        velocity = rms(momentum[name])
        agreement = (gradient * momentum[name]).flatten(1).mean(1) / (rms(gradient) * velocity)
        # How much of the loss one step of the first length would take, were the loss linear.
        steep = (level * scales[name] * gradient.flatten(1).shape[1] / loss.abs().clamp_min(tiny)).clamp_min(tiny).log()
        steady = (velocity / level).clamp_min(1e-4).log()
        surprise = (rms(gradient) / level).clamp_min(1e-4).log()
        bias = torch.full_like(loss, float(name.rpartition(".")[2] == "bias"))
        own = torch.stack((steady / 3, agreement, surprise, steep / 5, bias, late), -1)
        rows.append(torch.cat((own, shared), -1))
    return torch.stack(rows)
