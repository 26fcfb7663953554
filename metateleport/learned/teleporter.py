"""The learned teleporter: an LSTM for each symmetry, whose output is a generator in an equivariant basis.

The basis is built from matrices that move with the weights: permuting the hidden units permutes the generators,
whatever the width, so coefficients over them serve every width. Covariances and their logarithms transform by
conjugation under the orthogonal part of GL(k); the moments $U^\\top G_U$ and $G_V V^\\top$ under all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metateleport.groups import Group
from metateleport.learned.progress import PROGRESS_FEATURES, Progress
from metateleport.linalg import (
    diagonal_spectrum,
    finite_gradient,
    product,
    quick_spectrum,
    relative_shift,
    symmetric_spectrum,
)
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move, Teleporter, TrustRegion
from metateleport.teleporters.reach import check_max_stretch, within_reach

__all__ = ["BASIS", "FEATURES", "LearnedTeleporter", "Observation", "TeleportNetwork", "observe"]

_COVARIANCES = (
    "feature_covariance",
    "outgoing_covariance",
    "incoming_covariance",
    "outgoing_gradient_covariance",
    "incoming_gradient_covariance",
)
_MOMENTS = ("outgoing_moment", "incoming_moment")
_PAIR = (*(f"log {name}" for name in _COVARIANCES), *_MOMENTS, "identity")

BASIS: dict[str, tuple[str, ...]] = {
    "GL": _PAIR,
    "diagonal": _PAIR,
    "O": ("ascent", "second_ascent", "descent"),
}
"""Names of the generators by the group's name, in the order of the coefficients."""

FEATURES: dict[str, int] = {"GL": 14, "diagonal": 14, "O": 6}
"""Number of invariant features by the group's name."""


class Observation(NamedTuple):
    """A learned teleporter's basis and features for one symmetry.

    Args:
        basis: generators, `(*batch, count, *group.shape)`.
        features: invariants of order one, `(*batch, count)`.
    """

    basis: Tensor
    features: Tensor


class Spectra(NamedTuple):
    """What is read of a symmetry's covariances.

    Args:
        logarithms: of the covariances, `(*batch, covariances, *group.shape)`.
        spread: of the logarithms of their eigenvalues, `(*batch, covariances, 2)`.
    """

    logarithms: Tensor
    spread: Tensor

    @classmethod
    def none(cls, group: Group, like: Tensor) -> Spectra:
        """Those of no covariance, zero; `like` has the batch dimensions."""
        count = len(_COVARIANCES)
        return cls(like.new_zeros(*like.shape, count, *group.shape), like.new_zeros(*like.shape, count, 2))


Cell = tuple[Tensor, Tensor]


class TeleportNetwork(nn.Module):
    """Maps invariant features to coefficients over the basis, and a gate; one network for each kind of group.

    Args:
        group: the group's name, a key of `BASIS`.
        hidden: units of the LSTM.
    """

    def __init__(self, group: str, hidden: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(FEATURES[group] + PROGRESS_FEATURES, hidden)
        self.head = nn.Linear(hidden, len(BASIS[group]) + 1)
        with torch.no_grad():
            # Coefficients near zero at the start: a teleport has to be learned, not unlearned. The gate is half open
            # then; nearly closed, it takes three times as many meta-steps to open.
            self.head.weight.mul_(0.5)
            self.head.bias.zero_()

    def forward(self, features: Tensor, state: Cell) -> tuple[Tensor, Tensor, Cell]:
        """Coefficients in (-1, 1), `(tasks, basis)`, the gate in (0, 1), `(tasks,)`, and the new state."""
        hidden, memory = self.cell(features, state)
        out = finite_gradient(self.head(hidden))
        coefficients, gate = out.split((out.shape[-1] - 1, 1), -1)
        return coefficients.tanh(), gate.squeeze(-1).sigmoid(), (hidden, memory)


class LearnedTeleporter(Teleporter, nn.Module):
    r"""Chooses $T = \sigma(a) \sum_i \tanh(c_i) B_i$, with $B_i$ an equivariant basis of the Lie algebra.

    An LSTM for each symmetry reads invariants of the symmetry's small matrices and how the task is getting on, and
    answers with the coefficients $c$ and the gate $a$. The weights of the LSTM are shared by all symmetries of one
    kind of group; its state is the symmetry's own. As the basis moves with the weights, one teleporter serves every
    width, and permuting hidden units permutes the answer.

    Args:
        groups: names of the groups to have a network for; symmetries of other groups are left alone.
        hidden: units of each LSTM.
        detach: keep basis and features out of the graph; only tests of the gradient switch this off.
        trust_region: bounds on each teleport.
        max_stretch: the largest factor by which all teleports together may stretch or shrink anything, above one: a
            bound on each does not bound where on the orbit they lead. None for no bound.

    Raises:
        ValueError: if a group is unknown or `max_stretch` is not above one.

    Example:
        >>> teleporter = LearnedTeleporter(groups=("GL",), hidden=8)
        >>> teleporter.name
        'learned'

    Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 5, for the idea of a learned group element.
    """

    name = "learned"
    needs_gradient = True
    keeps_points = False

    def __init__(
        self,
        groups: Sequence[str] = ("GL", "diagonal", "O"),
        hidden: int = 32,
        detach: bool = True,
        trust_region: TrustRegion | None = None,
        max_stretch: float | None = None,
    ) -> None:
        nn.Module.__init__(self)
        Teleporter.__init__(self, trust_region)
        check_max_stretch(max_stretch)
        unknown = [group for group in groups if group not in BASIS]
        if unknown:
            raise ValueError(f"there is no basis for the group {unknown[0]!r}; there is one for {', '.join(BASIS)}")
        self.hidden, self.detach, self.max_stretch = hidden, detach, max_stretch
        self.networks = nn.ModuleDict({group: TeleportNetwork(group, hidden) for group in groups})
        self.observe: Callable[..., Observation] = observe

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that there is a network for."""
        return tuple(self.networks)

    def initial_state(self, point: Point, symmetries: Sequence[Symmetry]) -> dict[str, Any]:
        """Zero LSTM states by symmetry, the progress, and the identity as where on the orbit each symmetry stands."""
        like = next(iter(point.parameters.values()))
        batch = () if point.loss is None else point.loss.shape
        zero = like.new_zeros(*batch, self.hidden)
        loss = point.loss.detach() if point.loss is not None else like.new_ones(())
        state: dict[str, Any] = {symmetry.key: (zero, zero) for symmetry in symmetries}
        state["progress"] = Progress.begin(loss).judge(loss, deterministic=True)[0]
        if self.max_stretch is not None:
            places = {
                each.key: each.group.identity(*batch, dtype=like.dtype, device=like.device) for each in symmetries
            }
            state["departed"] = state["reached"] = places
        return state

    def told(self, state: dict[str, Any], loss: Tensor, deterministic: bool) -> dict[str, Any]:
        """The state with the progress brought up to date; see `Teleporter.told`."""
        return {**state, "progress": state["progress"].judge(loss, deterministic)[0]}

    def judged(self, state: dict[str, Any], progress: Progress, accepted: Tensor) -> dict[str, Any]:
        """The state once the last step is judged; see `Teleporter.judged`.

        Example:
            >>> progress = Progress.begin(torch.ones(2))
            >>> places = {"reached": {"0 2": torch.tensor([[2.0], [3.0]])}, "departed": {"0 2": torch.ones(2, 1)}}
            >>> teleporter = LearnedTeleporter(hidden=2, max_stretch=10.0)
            >>> teleporter.judged(places, progress, torch.tensor([True, False]))["reached"]["0 2"].tolist()
            [[2.0], [1.0]]
        """
        state = {**state, "progress": progress}
        if self.max_stretch is not None:
            places = {}
            gone_on = accepted is progress.accepted and progress.all_accepted
            for key, place in state["reached"].items():
                if gone_on:
                    places[key] = place
                    continue
                mask = accepted.reshape(*accepted.shape, *(1,) * (place.ndim - accepted.ndim))
                places[key] = torch.where(mask, place, state["departed"][key])
            state["departed"] = state["reached"] = places
        return state

    def refused(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with the model where it was on its orbit; see `Teleporter.refused`."""
        return state if self.max_stretch is None else {**state, "reached": state["departed"]}

    def travel(
        self, point: Point, symmetries: Sequence[Symmetry], state: dict[str, Any], allowed: Tensor | None
    ) -> tuple[Point, list[Move], dict[str, Any]]:
        """Moves a point and remembers where on the orbit it has got to; see `Teleporter.travel`."""
        point, moves, state = super().travel(point, symmetries, state, allowed)
        if self.max_stretch is not None:
            before = state["reached"]
            places = {
                each.symmetry.key: each.symmetry.group.compose(each.element.detach(), before[each.symmetry.key])
                for each in moves
            }
            state = {**state, "departed": before, "reached": {**before, **places}}
        return point, moves, state

    def generator(self, symmetry: Symmetry, point: Point, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The generator in the dtype of the weights; see `Teleporter.generator`."""
        group = symmetry.group
        if group.name not in self.networks:
            weight = point.parameters[symmetry.parameters[0]]
            batch = () if point.loss is None else point.loss.shape
            return weight.new_zeros(*batch, *group.shape), state
        chosen, cell = self.proposed(symmetry, point, state["progress"].features(), state[symmetry.key])
        if self.max_stretch is not None:
            chosen = within_reach(group, chosen, state["reached"][symmetry.key], math.log(self.max_stretch))
        return chosen, {**state, symmetry.key: cell}

    def proposed(
        self,
        symmetry: Symmetry,
        point: Point,
        progress: Tensor,
        cell: tuple[Tensor, Tensor],
        network: Callable[..., tuple[Tensor, Tensor, Cell]] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The generator before it is shortened to `max_stretch`, and the new state of the symmetry's LSTM.

        Args:
            symmetry: of a group that there is a network for; only its group and its small matrices are read.
            point: where the model stands.
            progress: the features of the progress, `(*batch, PROGRESS_FEATURES)`.
            cell: the state of the symmetry's LSTM.
            network: in the place of the group's own.
        """
        group = symmetry.group
        dtype = point.parameters[symmetry.parameters[0]].dtype
        batch = () if point.loss is None else point.loss.shape
        own = next(self.networks[group.name].parameters()).dtype
        network = network or self.networks[group.name]
        observation = self.observe(symmetry, point, self.detach)
        inputs = torch.cat((observation.features, progress), -1)
        inputs = torch.nan_to_num(inputs, 0.0, 10.0, -10.0).clamp(-10, 10).to(own)
        coefficients, gate, after = network(inputs, tuple(part.to(own) for part in cell))
        weights = (gate.unsqueeze(-1) * coefficients).to(dtype)
        # As one product: the generators times their coefficients are nowhere as large as the basis.
        basis = observation.basis.to(dtype).flatten(len(batch) + 1)
        chosen = product(weights.unsqueeze(-2), basis).reshape(*batch, *group.shape)
        return self._bounded(symmetry, chosen), after

    def _bounded(self, symmetry: Symmetry, generator: Tensor) -> Tensor:
        """Scaled back to the trust region, smoothly enough to learn through, rather than refused."""
        norm = symmetry.group.norm(generator)
        scale = (0.99 * self.trust_region.max_size / norm.detach().clamp_min(1e-30)).clamp_max(1.0)
        return generator * symmetry.group.expand(scale)


def observe(symmetry: Symmetry, point: Point, detach: bool = True) -> Observation:
    """The basis and the features of a symmetry at a point.

    Args:
        symmetry: the symmetry.
        point: where the model stands.
        detach: keep both out of the graph. The backward pass of `eigh` is infinite where eigenvalues coincide, as
            those of whitened features do; only for tests of the gradient itself is this switched off.

    Returns:
        The observation; what the symmetry or the point cannot tell is zero.
    """
    group = symmetry.group
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        if group.name == "diagonal":
            return _observe_diagonals(symmetry.diagonals(point))
        if group.name == "O":
            return _observe_vectors(group, symmetry.matrices(point))
        matrices = symmetry.matrices(point)
        return _observe_pair(group, _spectra(group, matrices), matrices, _diagonals(matrices))


def _observe_diagonals(found: dict[str, Tensor]) -> Observation:
    known = next(iter(found.values()))
    whole = all(name in found for name in (*_COVARIANCES, *_MOMENTS))
    tiny, zero = torch.finfo(known.dtype).tiny, known if whole else torch.zeros_like(known)
    covariances = torch.stack([found.get(name, zero) for name in _COVARIANCES], -2)
    logs = diagonal_spectrum(covariances).log(relative_shift(known.dtype))
    spread = _spread(logs)
    moments = torch.stack([found.get(name, zero) for name in _MOMENTS], -2)
    norms = torch.linalg.vector_norm(moments, dim=-1)
    # The moment over the product of its factors' norms: how far the step's direction lies along the orbit.
    if whole:
        traces = covariances.sum(-1)
        factors = (traces[..., 1:3] * traces[..., 3:]).clamp_min(tiny).sqrt()
    else:
        factors = torch.stack([_factor_norms(name, found) for name in _MOMENTS], -1)
        there = torch.tensor([name in found for name in _COVARIANCES], device=known.device).unsqueeze(-1)
        logs, spread = torch.where(there, logs, 0.0), torch.where(there, spread, 0.0)
    along = torch.stack((norms, moments.sum(-1)), -1) / factors.unsqueeze(-1)
    directions = moments / norms.clamp_min(tiny).unsqueeze(-1)
    basis = torch.cat((logs, directions, torch.ones_like(known).unsqueeze(-2)), -2)
    return Observation(basis, torch.cat((spread, along), -2).flatten(-2))


def _spread(logs: Tensor) -> Tensor:
    """How far the largest logarithm is above the mean one, and their deviation, in tens, `(*batch, 2)`."""
    above = logs - logs.mean(-1, keepdim=True)
    # The same as `std`, which takes ten times as long.
    deviation = torch.linalg.vector_norm(above, dim=-1) / logs.shape[-1] ** 0.5
    return torch.stack((above.amax(-1), deviation), -1) / 10


def _spectra(group: Group, matrices: dict[str, Tensor]) -> Spectra:
    """The logarithms of all covariances, from one decomposition; zero for those that are not known."""
    seen = [name for name in _COVARIANCES if name in matrices]
    stacked = torch.stack([matrices[name] for name in seen], -3)
    # In float32 meta-gradients through a few steps would be off by percents.
    decomposed = quick_spectrum if stacked.dtype == torch.float64 else symmetric_spectrum
    logarithms, logs = decomposed(stacked).both(relative_shift(stacked.dtype))
    spread = _spread(logs)
    logarithms = group.project(logarithms)
    if len(seen) == len(_COVARIANCES):
        return Spectra(logarithms, spread)
    places = torch.tensor([_COVARIANCES.index(name) for name in seen], device=logs.device)
    none = Spectra.none(group, logs.new_zeros(logs.shape[:-2]))
    axis = -1 - len(group.shape)
    return Spectra(
        none.logarithms.index_copy(none.logarithms.ndim + axis, places, logarithms),
        none.spread.index_copy(none.spread.ndim - 2, places, spread),
    )


def _observe_pair(
    group: Group, spectra: Spectra, matrices: dict[str, Tensor], diagonals: dict[str, Tensor]
) -> Observation:
    logarithms, spread = spectra
    tiny, axis = torch.finfo(logarithms.dtype).tiny, -1 - len(group.shape)
    like = next(iter(matrices.values()))
    moments = torch.stack([matrices[name] if name in matrices else torch.zeros_like(like) for name in _MOMENTS], -3)
    directions = group.project(moments)
    norms = group.norm(directions)
    factors = torch.stack([_factor_norms(name, diagonals) for name in _MOMENTS], -1)
    traces = torch.diagonal(moments, dim1=-2, dim2=-1).sum(-1)
    along = torch.stack((norms / factors, traces / factors), -1)
    directions = directions / group.expand(norms.clamp_min(tiny))
    one = group.project(torch.eye(group.size, dtype=moments.dtype, device=moments.device))
    one = one.expand(*moments.shape[:-3], 1, *group.shape)
    return Observation(torch.cat((logarithms, directions, one), axis), torch.cat((spread, along), -2).flatten(-2))


def _diagonals(matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.diagonal(value, dim1=-2, dim2=-1) for name, value in matrices.items()}


def _factor_norms(moment: str, diagonals: dict[str, Tensor]) -> Tensor:
    """Product of the norms of a moment's two factors, whose squares are traces; one where they are not known."""
    side = moment.removesuffix("_moment")
    names = (f"{side}_covariance", f"{side}_gradient_covariance")
    if not all(name in diagonals for name in names):
        return torch.ones_like(next(iter(diagonals.values()))[..., 0])
    weights, gradients = (diagonals[name].sum(-1) for name in names)
    return (weights * gradients).clamp_min(torch.finfo(weights.dtype).tiny).sqrt()


def _observe_vectors(group: Group, matrices: dict[str, Tensor]) -> Observation:
    generators, features = [], []
    for name in BASIS["O"]:
        outer = matrices[name]
        generator = group.project(outer)
        norm = group.norm(generator)
        generators.append(generator / group.expand(norm.clamp_min(torch.finfo(outer.dtype).tiny)))
        whole = torch.linalg.matrix_norm(outer).clamp_min(torch.finfo(outer.dtype).tiny)
        trace = torch.diagonal(outer, dim1=-2, dim2=-1).sum(-1)
        features += [norm / whole, trace / whole]
    return Observation(torch.stack(generators, outer.ndim - 2), torch.stack(features, -1))
