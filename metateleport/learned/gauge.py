"""The learned gauge: for each tensor a group element that its step is taken in, undone after the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.gauges import Gauge, Names, Side
from metateleport.learned.curvature import output_curvatures
from metateleport.learned.finite import finite_gradient
from metateleport.learned.progress import PROGRESS_FEATURES, Progress
from metateleport.point import Point, Tensors
from metateleport.spectral import diagonal_logs, relative_shift, symmetric_logs
from metateleport.symmetries import Symmetry

__all__ = ["GAUGE_BASIS", "GaugeNetwork", "LearnedGauge"]

GAUGE_BASIS = ("log metric", "log metric, damped", "log metric, much damped", "log gradient covariance")
"""Names of the generators that a gauge is a combination of, in the order of the coefficients."""

_SHIFTS = (1e-3, 3e-2)
_GRADIENT_SHIFT = 1e-3
_FEATURES = 8
_SIDE = 3.0
"""How loud the side of a symmetry is among the features, so that the networks soon tell them apart."""
_START = (0.0, -0.75, -0.75, 1.5)
"""Where the logits of the basis start. Far from a minimum the metric's full inverse steps too far in every layer at
once, and is refused: the gradients' covariance comes first. The damped metrics start low: they pay early, and where the
softmax has closed around one of them, together with a large step, training does not find the way to the metric itself.
"""
_MEMORY = 0.95

Cell = tuple[Tensor, Tensor]
Place = tuple[Symmetry, Side, Names]


class GaugeNetwork(nn.Module):
    """Maps invariant features to weights over `GAUGE_BASIS` and a gate; one for each kind of group.

    Args:
        hidden: units of the LSTM.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(_FEATURES + PROGRESS_FEATURES, hidden)
        self.head = nn.Linear(hidden, len(GAUGE_BASIS) + 1)
        with torch.no_grad():
            self.head.weight.mul_(0.5)
            # The gate half open.
            self.head.bias.copy_(torch.tensor([*_START, 0.0]))

    def forward(self, features: Tensor, state: Cell) -> tuple[Tensor, Cell]:
        """Coefficients that sum up to a number in (-1/2, 0), `(rows, basis)`, and the new state."""
        hidden, memory = self.cell(features, state)
        out = finite_gradient(self.head(hidden))
        return -out[..., :-1].softmax(-1) * out[..., -1:].sigmoid() / 2, (hidden, memory)


class LearnedGauge(nn.Module):
    r"""Chooses $g = \exp\left(\mp\tfrac12\,\sigma(a) \sum_i \mathrm{softmax}(c)_i \log C_i\right)$ for each side.

    The side of a symmetry that takes in what moves is shown the covariance of its inputs (of V's rows where no inputs
    are known), the side that puts it out the curvature $S$ above it, both with several dampings; and each the
    covariance of its own gradients. With the gate $\sigma(a)$ open, a step in the gauge is preconditioned by the
    inverse of the chosen mean: the Gauss-Newton step of a layer alone, or ScaledGD for a factorisation; half open and
    on the gradients it is that of Shampoo. Full whitening is where the gate saturates: a gauge is made anew at every
    step, and cannot come nearer by being repeated, as a teleport that stays does. On minibatches the covariances are
    running means.

    Basis and features are kept out of the graph; the networks are shared by all gauges of one kind of group, with a
    state for each. Nothing moves along the orbit: the gauge is undone after the step, so it costs no drift.

    Args:
        groups: names of the groups to have a network for; symmetries of other groups have no gauge.
        hidden: units of each LSTM.

    Example:
        >>> sorted(LearnedGauge(("GL",), hidden=4).networks)
        ['GL']
    """

    def __init__(self, groups: Sequence[str] = ("GL", "diagonal"), hidden: int = 32) -> None:
        super().__init__()
        self.hidden = hidden
        self.observe: Callable[..., tuple[Tensor, Tensor]] = _observe
        self.networks = nn.ModuleDict({group: GaugeNetwork(hidden) for group in groups if group != "O"})

    def places(self, point: Point, symmetries: Sequence[Symmetry]) -> list[Place]:
        """The sides of the symmetries that have a network and tensors with a gradient."""
        found: list[Place] = []
        for symmetry in symmetries:
            if symmetry.group.name not in self.networks:
                continue
            for side in ("in", "out"):
                names = tuple(n for n in symmetry.parameters if symmetry.side(n) == side and n in point.gradients)
                if names:
                    found.append((symmetry, side, names))
        return found

    def initial_state(self, point: Point, symmetries: Sequence[Symmetry]) -> dict[str, Any]:
        """Zero LSTM states, and no covariance seen yet."""
        like = next(self.parameters())
        assert point.loss is not None
        zero = torch.zeros(*point.loss.shape, self.hidden, dtype=like.dtype, device=point.loss.device)
        cells = {_key(place): (zero, zero) for place in self.places(point, symmetries)}
        return {"cells": cells, "covariances": {}, "seen": 0}

    def choose(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        deterministic: bool,
        moved: Tensor | None = None,
    ) -> tuple[list[Gauge], dict[str, Any]]:
        """Chooses the gauges.

        Args:
            point: where the model stands, one task dimension in front.
            symmetries: linear actions, as `metateleport.gauges.gauge_symmetries` gives them.
            progress: how each task is getting on.
            state: what `initial_state` or the last call gave.
            deterministic: whether every evaluation sees the same data.
            moved: where a teleport has moved the model since the last call, so that running means are void.

        Returns:
            The gauges and the new state.
        """
        places = self.places(point, symmetries)
        fixed = point.detach()
        with torch.no_grad():
            seen, covariances = self._covariances(fixed, places, state, deterministic, moved)
            observed = [self.observe(place, *seen[_key(place)], fixed) for place in places]
        cells, gauges = dict(state["cells"]), {}
        for group, network in self.networks.items():
            own = [index for index, place in enumerate(places) if place[0].group.name == group]
            if not own:
                continue
            dtype = next(network.parameters()).dtype
            shared = progress.features().detach()
            rows = [torch.cat((observed[index][1], shared), -1) for index in own]
            inputs = torch.nan_to_num(torch.stack(rows), 0.0, 10.0, -10.0).clamp(-10, 10).to(dtype)
            before = tuple(torch.stack([cells[_key(places[index])][part] for index in own]) for part in (0, 1))
            weights, after = network(inputs.flatten(0, 1), tuple(part.flatten(0, 1) for part in before))
            weights = weights.reshape(*inputs.shape[:2], -1)
            hidden, memory = (part.reshape(*inputs.shape[:2], -1) for part in after)
            for row, index in enumerate(own):
                cells[_key(places[index])] = (hidden[row], memory[row])
                gauges[index] = _gauge(places[index], weights[row], observed[index][0])
        after_state = {"cells": cells, "covariances": covariances, "seen": state["seen"] + 1}
        return [gauges[index] for index in sorted(gauges)], after_state

    def _covariances(
        self, point: Point, places: Sequence[Place], state: dict[str, Any], deterministic: bool, moved: Tensor | None
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """The metric and the gradient covariance of each place, smoothed; and what is remembered of them."""
        bends = output_curvatures(point, [place[0] for place in places])
        share = min(_MEMORY, state["seen"] / (state["seen"] + 1))
        matrices: dict[int, Tensors] = {}
        seen, remembered = {}, {}

        def smoothed(key: str, now: Tensor) -> Tensor:
            before = state["covariances"].get(key)
            if before is not None:
                mean = share * before + (1 - share) * now
                now = mean if moved is None else torch.where(moved[:, None, None], now, mean)
            remembered[key] = now
            return now

        for place in places:
            symmetry, side, _ = place
            if id(symmetry) not in matrices:
                matrices[id(symmetry)] = symmetry.matrices(point)
            found = matrices[id(symmetry)]
            if side == "in":
                metric = found.get("feature_covariance", found.get("incoming_covariance"))
                gradient = found.get("outgoing_gradient_covariance")
            else:
                metric = bends.get(symmetry.modules[0]) if symmetry.modules else None
                metric = found.get("outgoing_covariance") if metric is None else metric
                gradient = found.get("incoming_gradient_covariance")
            assert metric is not None
            assert gradient is not None
            key = _key(place)
            if not deterministic:
                metric = smoothed(f"{key}/metric", metric)
            seen[key] = (metric, smoothed(f"{key}/gradient", gradient))
        return seen, remembered


def _observe(place: Place, metric: Tensor, gradient: Tensor, point: Point) -> tuple[Tensor, Tensor]:
    """The basis, `(tasks, basis, *group.shape)`, and the features, `(tasks, features)`."""
    symmetry, side, _ = place
    group = symmetry.group
    smallest = relative_shift(metric.dtype)
    if len(group.shape) == 1:
        diagonals = [torch.diagonal(each, dim1=-2, dim2=-1) for each in (metric, gradient)]
        logs = diagonal_logs(diagonals[0], (smallest, *_SHIFTS))
        gradient_logs = diagonal_logs(diagonals[1], (_GRADIENT_SHIFT,))
        basis = torch.cat((logs, gradient_logs), -2)
    else:
        matrices, logs = symmetric_logs(metric, (smallest, *_SHIFTS), rank=smallest)
        gradients, gradient_logs = symmetric_logs(gradient, (_GRADIENT_SHIFT,))
        basis = torch.cat((matrices, gradients), -3)
    main, slow = logs[..., 0, :], gradient_logs[..., 0, :]
    width = main.shape[-1]
    rows = point.activations[symmetry.modules[-1]].shape[-2] if _sees_rows(symmetry, point) else width
    flat = torch.ones_like(main[..., 0])
    features = (
        (main.amax(-1) - main.mean(-1)) / 10,
        main.std(-1, correction=0) / 10,
        (slow.amax(-1) - slow.mean(-1)) / 10,
        slow.std(-1, correction=0) / 10,
        (main > main.amax(-1, keepdim=True) - 7).to(main.dtype).mean(-1),
        flat * math.log(rows / width),
        flat * (_SIDE if side == "in" else -_SIDE),
        flat * float(_sees_rows(symmetry, point)),
    )
    return basis, torch.stack(features, -1)


def _sees_rows(symmetry: Symmetry, point: Point) -> bool:
    return bool(symmetry.modules) and symmetry.modules[-1] in point.activations


def _gauge(place: Place, weights: Tensor, basis: Tensor) -> Gauge:
    symmetry, side, names = place
    group = symmetry.group
    weights = weights.to(basis.dtype)
    generator = (weights.reshape(*weights.shape, *(1 for _ in group.shape)) * basis).sum(1)
    # The metric above moves by the inverse of what the features move by.
    generator = generator if side == "in" else -generator
    # The overall scale cancels against the curvature bound; left in, it only costs digits.
    mean = generator.mean(-1, keepdim=True) if len(group.shape) == 1 else _mean_part(generator)
    generator = generator - mean.detach()
    finite = generator.detach().isfinite().flatten(1).all(-1)
    generator = torch.where(group.expand(finite), generator, torch.zeros_like(generator))
    norm = group.norm(generator)
    # A condition number of at most half of the digits, as the trust region asks of a teleport.
    bound = -math.log(torch.finfo(basis.dtype).eps) / 2
    scale = (bound / norm.detach().clamp_min(1e-30)).clamp_max(1.0)
    generator = generator * group.expand(scale)
    return Gauge(symmetry, side, names, group.exp(generator), (norm * scale).detach())


def _mean_part(matrix: Tensor) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.diagonal(matrix, dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye


def _key(place: Place) -> str:
    return f"{place[0].key}/{place[1]}"
