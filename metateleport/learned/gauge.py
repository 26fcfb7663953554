"""The learned gauge: for each tensor a group element that its step is taken in, undone after the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metateleport.gauges.step import Gauge, Names, Side
from metateleport.learned.curvature import output_curvatures
from metateleport.learned.progress import PROGRESS_FEATURES, Progress
from metateleport.learned.refresh import Refresh, Renewed, held_gauge
from metateleport.linalg import (
    Spectrum,
    diagonal_spectrum,
    finite_gradient,
    quick_spectrum,
    relative_shift,
    symmetric_spectrum,
)
from metateleport.point import Point, Tensors
from metateleport.symmetries import Pair, Symmetry

__all__ = ["GAUGE_BASIS", "GaugeBasis", "GaugeChoice", "GaugeNetwork", "LearnedGauge"]

GAUGE_BASIS = ("log metric", "log gradient covariance")
"""Names of the generators that a gauge is a combination of."""

_GRADIENT_SHIFT = 1e-3
_FEATURES = 8
_SIDE = 3.0
"""Scale of the feature that says which side of a symmetry it is, so that the networks learn it soon."""
_START = (2.0, 0.85, 0.0)
"""Where the logits of `GaugeChoice` start: the gradients' covariance has the larger share and the gate is half open, as
far from a minimum the metric's full inverse steps too far."""
_GRADIENT_MEMORY = 0.95
_GRADIENTS: dict[Side, str] = {"in": "outgoing_gradient_covariance", "out": "incoming_gradient_covariance"}
_WEIGHTS: dict[Side, str] = {"in": "incoming_covariance", "out": "outgoing_covariance"}

Cell = tuple[Tensor, Tensor]
Place = tuple[Symmetry, Side, Names]


class GaugeChoice(NamedTuple):
    """The network's choice of a gauge: three numbers in (0, 1), each `(tasks,)`.

    Args:
        reach: how far down the metric's spectrum it is inverted: the relative shift is the smallest that there is to
            this power, so that the metric is flat at zero and whole at one.
        share: weight of the gradients' covariance; the metric has the rest.
        gate: how far the gauge is opened.

    Example:
        >>> GaugeChoice._fields
        ('reach', 'share', 'gate')
    """

    reach: Tensor
    share: Tensor
    gate: Tensor


class GaugeBasis(NamedTuple):
    """The basis of a gauge: the metric's spectrum, `(tasks, k)`, and the log gradient covariance."""

    metric: Spectrum
    gradients: Tensor


class GaugeNetwork(nn.Module):
    """Maps invariant features to a `GaugeChoice`; one for each kind of group.

    Args:
        hidden: units of the LSTM.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(_FEATURES + PROGRESS_FEATURES, hidden)
        self.head = nn.Linear(hidden, len(_START))
        with torch.no_grad():
            self.head.weight.mul_(0.5)
            self.head.bias.copy_(torch.tensor(_START))

    def forward(self, features: Tensor, state: Cell) -> tuple[Tensor, Cell]:
        """The parts of a choice in the last dimension, `(rows, 3)`, and the new state."""
        hidden, memory = self.cell(features, state)
        return finite_gradient(self.head(hidden)).sigmoid(), (hidden, memory)


class LearnedGauge(nn.Module):
    r"""Chooses for each side of each symmetry the gauge, a group element, that its tensors are stepped in.

    $$g = \exp\left(\mp\tfrac a2 \left((1 - q) \log(C + \epsilon^u 1) + q \log N\right)\right)$$

    The metric $C$ is, on the side of a symmetry that takes in what moves, the covariance of its inputs (of V's rows
    where no inputs are known), and on the side that puts it out the curvature $S$ above it; $N$ is the covariance of
    the side's own gradients, and $\epsilon$ the smallest shift that rounding allows, both relative to the largest
    eigenvalue. The reach $u$, the share $q$ and the gate $a$, all in (0, 1), are learned. With the gate open a step in
    the gauge is preconditioned by the inverse of the chosen mean: at $q = 0$ the Levenberg-Marquardt step of a layer
    alone, for $u = 1$ Gauss-Newton's, or ScaledGD for a factorisation; half open at $q = 1$ it is Shampoo's. Full
    whitening is where the gate saturates: a gauge is made anew at every step, and cannot come nearer by being repeated,
    as a teleport that stays does. The gradients' covariance is a running mean, and on minibatches so is the metric:
    with a long memory it has less of their noise, with a short one it keeps up with weights that move, as those of an
    ill-conditioned factorisation do.

    With a `Refresh`, which optimizers in use set, gauges of wide layers are held for several steps and decomposed in
    the precision of the weights.

    Basis and features are kept out of the graph; the networks are shared by all gauges of one kind of group, with a
    state for each. Nothing moves along the orbit: the gauge is undone after the step, so it costs no drift.

    Args:
        groups: names of the groups to have a network for; symmetries of other groups have no gauge.
        hidden: units of each LSTM.
        metric_memory: share of the metric's running mean that is kept at each step on minibatches, in [0, 1).

    Example:
        >>> sorted(LearnedGauge(("GL",), hidden=4).networks)
        ['GL']
    """

    def __init__(
        self, groups: Sequence[str] = ("GL", "diagonal"), hidden: int = 32, metric_memory: float = 0.95
    ) -> None:
        super().__init__()
        self.hidden, self.metric_memory = hidden, metric_memory
        self.refresh: Refresh | None = None
        self.observe: Callable[..., tuple[GaugeBasis, Tensor]] = _observe
        self.networks = nn.ModuleDict({group: GaugeNetwork(hidden) for group in groups if group != "O"})

    def places(self, point: Point, symmetries: Sequence[Symmetry], seen: bool = True) -> list[Place]:
        """Sides that have a network and tensors with a gradient; with `seen`, of symmetries whose inputs are known."""
        found: list[Place] = []
        for symmetry in symmetries:
            if symmetry.group.name not in self.networks or (seen and not _is_seen(symmetry, point)):
                continue
            for side in ("in", "out"):
                names = tuple(n for n in symmetry.parameters if symmetry.side(n) == side and n in point.gradients)
                if names:
                    found.append((symmetry, side, names))
        return found

    def initial_state(self, point: Point, symmetries: Sequence[Symmetry]) -> dict[str, Any]:
        """Zero LSTM states, and running covariances of weight zero."""
        like = next(self.parameters())
        assert point.loss is not None
        zero = torch.zeros(*point.loss.shape, self.hidden, dtype=like.dtype, device=point.loss.device)
        places = self.places(point, symmetries, seen=False)
        # There from the start, so that a saved state fits a fresh one.
        covariances = {
            f"{_key(place)}/{what}": point.loss.new_zeros(*point.loss.shape, place[0].group.size, place[0].group.size)
            for place in places
            for what in ("metric", "gradient")
        }
        state = {"cells": {_key(place): (zero, zero) for place in places}, "covariances": covariances, "seen": 0}
        if self.refresh is not None:
            held = [place for place in places if self._holds(place)]
            state["held"] = {_key(each): self.refresh.nothing(each[0], _FEATURES, point.loss) for each in held}
        return state

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
            state: the result of `initial_state` or of the last call.
            deterministic: whether every evaluation sees the same data.
            moved: tasks that a teleport has moved since the last call; their running means are void.

        Returns:
            The gauges and the new state.
        """
        places = self.places(point, symmetries)
        fixed = point.detach()
        waiting = self._waiting(places, progress, state, moved)
        with torch.no_grad():
            own_symmetries = list(dict.fromkeys(place[0] for place in places))
            bends = cache(lambda: output_curvatures(fixed, own_symmetries))
            seen, covariances = self._covariances(fixed, places, state, deterministic, moved, waiting, bends)
        # The bound on a step goes by all layers above, also by those without a gauge.
        above = bends if own_symmetries == list(symmetries) else cache(lambda: output_curvatures(fixed, symmetries))
        features = progress.features().detach()
        after_state = {"covariances": covariances, "seen": state["seen"] + 1}
        if self.refresh is None:
            after_state["cells"], gauges = self.elements(places, seen, fixed, features, state["cells"])
            return gauges, after_state
        with torch.no_grad():
            looked = {
                _key(each): self._look(each)(each, *seen[_key(each)], fixed) for each in places if _key(each) in seen
            }
        told = {
            **{key: each["features"] for key, each in waiting.items()},
            **{key: each[1] for key, each in looked.items()},
        }
        after_state["cells"], choices = self._choices(places, told, features, state["cells"])
        made, renewed = dict[int, Gauge](), dict[str, Renewed]()
        for index, choice in choices.items():
            place, key = places[index], _key(places[index])
            if key not in waiting and self._holds(place):
                curvature = above()[place[0].modules[0]] if place[1] == "out" else None
                renewed[key] = Renewed(*_generator(place, choice, looked[key][0]), curvature, looked[key][1])
            elif key not in waiting:
                made[index] = _gauge(place, choice, looked[key][0])
        after_state["held"] = self.refresh.after(state["held"], waiting, renewed)
        for index in choices.keys() - made.keys():
            symmetry, side, names = places[index]
            curvature = above()[symmetry.modules[0]] if side == "out" else None
            made[index] = held_gauge(symmetry, side, names, after_state["held"][_key(places[index])], curvature)
        return [made[index] for index in sorted(made)], after_state

    def elements(
        self,
        places: Sequence[Place],
        seen: Mapping[str, tuple[Tensor, Tensor]],
        point: Point,
        progress: Tensor,
        cells: Mapping[str, Cell],
    ) -> tuple[dict[str, Cell], list[Gauge]]:
        """What the networks make of the metrics and the gradient covariances.

        Args:
            places: the sides that gauges are chosen for.
            seen: the metric and the gradient covariance of each place.
            point: where the model stands; of it only the number of samples is read.
            progress: the features of the progress, `(tasks, PROGRESS_FEATURES)`.
            cells: the states of the LSTMs, by place.

        Returns:
            The new states, and the gauges in the order of the places.
        """
        with torch.no_grad():
            observed = {_key(place): self.observe(place, *seen[_key(place)], point) for place in places}
        told = {key: features for key, (_, features) in observed.items()}
        after_cells, choices = self._choices(places, told, progress, cells)
        ordered = sorted(choices.items())
        return after_cells, [_gauge(places[at], choice, observed[_key(places[at])][0]) for at, choice in ordered]

    def _choices(
        self, places: Sequence[Place], told: Mapping[str, Tensor], progress: Tensor, cells: Mapping[str, Cell]
    ) -> tuple[dict[str, Cell], dict[int, GaugeChoice]]:
        """The networks' choices by the number of the place, of the features that they are told, and the new states."""
        after_cells, choices = dict(cells), dict[int, GaugeChoice]()
        for group, network in self.networks.items():
            own = [index for index, place in enumerate(places) if place[0].group.name == group]
            if not own:
                continue
            dtype = next(network.parameters()).dtype
            keys = [_key(places[index]) for index in own]
            rows = [torch.cat((told[key], progress), -1) for key in keys]
            inputs = torch.nan_to_num(torch.stack(rows), 0.0, 10.0, -10.0).clamp(-10, 10).to(dtype)
            before = tuple(torch.stack([cells[key][part] for key in keys]).to(dtype) for part in (0, 1))
            chosen, after = network(inputs.flatten(0, 1), tuple(part.flatten(0, 1) for part in before))
            chosen = chosen.reshape(*inputs.shape[:2], -1)
            hidden, memory = (part.reshape(*inputs.shape[:2], -1) for part in after)
            for row, (index, key) in enumerate(zip(own, keys, strict=True)):
                after_cells[key] = (hidden[row], memory[row])
                choices[index] = GaugeChoice(*chosen[row].unbind(-1))
        return after_cells, choices

    def _holds(self, place: Place) -> bool:
        return self.refresh is not None and self.refresh.holds(place[0])

    def _look(self, place: Place) -> Callable[..., tuple[GaugeBasis, Tensor]]:
        return partial(_observe, spectrum=quick_spectrum) if self._holds(place) else self.observe

    def _waiting(
        self, places: Sequence[Place], progress: Progress, state: dict[str, Any], moved: Tensor | None
    ) -> dict[str, dict[str, Any]]:
        """What is held of those places whose gauge is not made anew in this step."""
        if self.refresh is None or (moved is not None and bool(moved.any())):
            return {}
        if progress.known and not bool(progress.accepted.all()):
            return {}
        held = {key: state["held"][key] for key in map(_key, places) if key in state["held"]}
        return {key: each for key, each in held.items() if each["left"]}

    def _covariances(
        self,
        point: Point,
        places: Sequence[Place],
        state: dict[str, Any],
        deterministic: bool,
        moved: Tensor | None,
        waiting: Container[str],
        bends: Callable[[], Tensors],
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """The metric and the gradient covariance of each place, smoothed; and what is remembered of them.

        Of a place that waits for its next gauge only running means are kept up.
        """
        young = state["seen"] / (state["seen"] + 1)
        matrices: dict[int, Tensors] = {}
        seen, remembered = {}, dict(state["covariances"])

        def smoothed(key: str, now: Tensor, memory: float) -> Tensor:
            share = min(memory, young)
            mean = share * state["covariances"][key] + (1 - share) * now
            remembered[key] = mean if moved is None else torch.where(moved[:, None, None], now, mean)
            return remembered[key]

        for place in places:
            symmetry, side, _ = place
            key = _key(place)
            if id(symmetry) not in matrices:
                idle = deterministic and f"{symmetry.key}/in" in waiting
                needed = (*_GRADIENTS.values(), *(() if idle else ("feature_covariance",)))
                matrices[id(symmetry)] = symmetry.matrices(point, needed)
            found = matrices[id(symmetry)]
            gradient = found[_GRADIENTS[side]]
            covariance = smoothed(f"{key}/gradient", gradient, _GRADIENT_MEMORY)
            if key in waiting and deterministic:
                continue
            if side == "in":
                metric = found.get("feature_covariance")
            else:
                # Other symmetries look at a layer too whose units are not what they move.
                metric = bends().get(symmetry.first) if isinstance(symmetry, Pair) else None
            if metric is None:
                metric = symmetry.matrices(point, (_WEIGHTS[side],))[_WEIGHTS[side]]
            if not deterministic:
                metric = smoothed(f"{key}/metric", metric, self.metric_memory)
            if key not in waiting:
                seen[key] = (metric, covariance)
        return seen, remembered


def _observe(
    place: Place,
    metric: Tensor,
    gradient: Tensor,
    point: Point,
    spectrum: Callable[..., Spectrum] = symmetric_spectrum,
) -> tuple[GaugeBasis, Tensor]:
    """The basis, and the features, `(tasks, features)`."""
    symmetry, side, _ = place
    smallest = relative_shift(metric.dtype)
    if len(symmetry.group.shape) == 1:
        own, other = (diagonal_spectrum(torch.diagonal(each, dim1=-2, dim2=-1)) for each in (metric, gradient))
    else:
        own, other = spectrum(metric, rank=smallest), spectrum(gradient)
    main, slow = own.logs(smallest), other.logs(_GRADIENT_SHIFT)
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
    return GaugeBasis(own, other.log(_GRADIENT_SHIFT)), torch.stack(features, -1)


def _is_seen(symmetry: Symmetry, point: Point) -> bool:
    """Whether the inputs that the metric needs are known."""
    return all(name in point.activations for name in symmetry.modules)


def _sees_rows(symmetry: Symmetry, point: Point) -> bool:
    return bool(symmetry.modules) and symmetry.modules[-1] in point.activations


def _gauge(place: Place, choice: GaugeChoice, basis: GaugeBasis) -> Gauge:
    symmetry, side, names = place
    generator, size = _generator(place, choice, basis)
    return Gauge(symmetry, side, names, symmetry.group.exp(generator), size)


def _generator(place: Place, choice: GaugeChoice, basis: GaugeBasis) -> tuple[Tensor, Tensor]:
    """The gauge's generator, and its norm."""
    symmetry, side, _ = place
    group, dtype = symmetry.group, basis.gradients.dtype
    shift = (choice.reach.double() * math.log(relative_shift(dtype))).exp()
    share, gate = choice.share.to(dtype), choice.gate.to(dtype)
    mean = group.expand(1 - share) * basis.metric.log(shift) + group.expand(share) * basis.gradients
    generator = -group.expand(gate) / 2 * mean
    # The metric above moves by the inverse of what the features move by.
    generator = generator if side == "in" else -generator
    # The overall scale cancels against the curvature bound; keeping it would only cost digits.
    scale = generator.mean(-1, keepdim=True) if len(group.shape) == 1 else _mean_part(generator)
    generator = generator - scale.detach()
    finite = generator.detach().isfinite().flatten(1).all(-1)
    generator = torch.where(group.expand(finite), generator, torch.zeros_like(generator))
    norm = group.norm(generator)
    # A condition number of at most half of the digits, as the trust region asks of a teleport.
    bound = -math.log(torch.finfo(dtype).eps) / 2
    shortened = (bound / norm.detach().clamp_min(1e-30)).clamp_max(1.0)
    generator = generator * group.expand(shortened)
    return generator, (norm * shortened).detach()


def _mean_part(matrix: Tensor) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.diagonal(matrix, dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye


def _key(place: Place) -> str:
    return f"{place[0].key}/{place[1]}"
