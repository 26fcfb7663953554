"""The learned update for factors of products: steps in gauges, mixed and measured out for each factor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metateleport.gauges import Gauge
from metateleport.gauges.factors import FactorPair, FactorSide, factor_pairs
from metateleport.gauges.outer import length_ratio
from metateleport.gauges.polar import definite, polar_of_gram
from metateleport.gauges.spectrum import GaugeKind, ProductGauges, product_gauges
from metateleport.gauges.whitened import SIDES, stacks_of
from metateleport.learned.factors import (
    FACTOR_FEATURES,
    combined,
    factor_features,
    gram_of,
    has_gauges,
    spread_steps,
    trio_of,
    unit_of,
)
from metateleport.learned.outside import Outside, exchanged, seen_outside
from metateleport.learned.parts import GaugeSettings, TeleportSettings
from metateleport.learned.progress import PROGRESS_FEATURES, Progress, Tolerance
from metateleport.learned.rules.adaptive import AdaptiveRule
from metateleport.learned.rules.base import RuleSettings, UpdateRule
from metateleport.linalg import finite_gradient, fit, symmetric_spectrum
from metateleport.point import Point, Tensors
from metateleport.settings import AT_LEAST_ONE, NOT_NEGATIVE, SettingsError, setting
from metateleport.symmetries import Symmetry

__all__ = ["GaugedRule", "GaugedSettings"]

_FLOOR = 2.0
"""Floor on the singular values of a product, in steps of the length that they start with.

Where a singular value is small, a step of one factor is long in the other's gauge, and the split drifts apart step by
step. Ten times lower, runs of 300 steps were seen to lose all digits of single precision that way.
"""

_SLOW = 0.97
"""Memory of the second momentum."""

_SQUARES = 0.98
"""Memory of the second moments of columns."""

_SQUARES_FLOOR = 1e-6

_RECENT = 0.95

_STARTS: dict[FactorSide, tuple[float, ...]] = {
    side: (0.0, math.log(1.5), -6.0, 3.0, -1.0, 3.0, 2.0, 1.0, -1.0) for side in SIDES
}
"""Where the outputs start: the logarithm of the length, the logits of the memory, of how much shorter steps become with
the share of the momentum in the gradients, of the reach, of the exponent of the cooling and of the outer reach, and
those of the shares.

They are the best of about forty on six training tasks of `lora_digits`, 300 steps each: a short memory with the long
one beside it, longer steps, and a cooling slower than linear.
"""

_COOLING = 3.0
"""The largest exponent of the cooling."""


@dataclasses.dataclass(frozen=True)
class GaugedSettings(RuleSettings):
    """A learned update of factors in gauges (`GaugedRule`).

    Args:
        hidden: units of the LSTM of each factor.
        plain_hidden: units of the LSTM of each other tensor, as `hidden` of the rule `adaptive`.
        cooling: of the other tensors, as in the rule `adaptive`.
    """

    kind: ClassVar[str] = "gauged"

    hidden: int = setting(16, AT_LEAST_ONE)
    plain_hidden: int = setting(32, AT_LEAST_ONE)
    cooling: float = setting(0.01, NOT_NEGATIVE)

    @property
    def reads_total(self) -> bool:
        return True

    def rule(self) -> GaugedRule:
        return GaugedRule(self.hidden, self.plain_hidden, self.cooling)

    def check(self, teleport: TeleportSettings | None, gauge: GaugeSettings | None) -> None:
        for part in (teleport, gauge):
            if part is not None:
                raise SettingsError(
                    f"rule.kind = 'gauged' has gauges of its own, in which no {part.part} makes a difference to the "
                    f"factors: leave the {part.part} out"
                )


class _SideNetwork(nn.Module):
    """Maps features of one factor to what its step is made of; one for each of the two sides.

    Args:
        hidden: units of the LSTM.
        start: where the outputs start.
    """

    def __init__(self, hidden: int, start: Sequence[float]) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(FACTOR_FEATURES + PROGRESS_FEATURES, hidden)
        self.head = nn.Linear(hidden, len(start))
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(torch.tensor(start))

    def forward(self, features: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs, `(rows, outputs)`, and the new state."""
        hidden, memory = self.cell(features, state)
        return finite_gradient(self.head(hidden)), (hidden, memory)


class GaugedRule(nn.Module, UpdateRule):
    r"""Steps of the factors of products in gauges; other tensors step by the rule `adaptive`.

    For a side $X$ of a pair (`metateleport.gauges.FactorPair`) with the gauge $F$ that whitens the other side,

    $$X \mapsto X - \ell\, \eta\, d\, \lambda^\kappa\, r^a\, P_u \sum_i c_i D_i\, F_t^\top, \qquad
      \eta = 0.2 \sqrt{4 \max(m, n) / k},$$

    $$D_1 = \mathrm{polar}(P_u M F_t), \quad D_2 = \mathrm{polar}(P_u M' F_t), \quad
      D_3 \propto P_u M F_t (F_t^\top W F_t)^{-1/2},$$

    $M$ and $M'$ momenta of a learned memory and of a long one, $W$ the running mean of the Gram matrix of the
    gradients (Adam's second moments of columns with one another), all of the length of a polar factor; $P_u$ an outer
    gauge (`metateleport.gauges.outer`) to the power of a reach $u \in [0, 1]$; $d \le 1$ the task's damping, $\lambda$
    the momentum's share of the gradients, $r$ what is left of the run, where its length is told, else one. An LSTM for
    each side of each pair (weights shared by all pairs, one network for each side) puts out the length $\ell$, the
    memory, $\kappa$, the reaches $t$ and $u$, the cooling $a$ and the shares $c$, which sum up to one.

    With $\sigma$ the singular values of the product and $V$ their directions, the reach $t \in [0, 1]$ leads from the
    gauge in which the side itself is white to that in which the other one is (`metateleport.gauges.spectrum`).

    Nothing here depends on how the product is split: features, moments and gauges move along with an element of
    $GL(k)$. So one checkpoint serves every scale and split, and needs none of them in training.

    Args:
        hidden: units of the LSTM of each factor.
        plain_hidden: of the rule of the other tensors.
        cooling: of the rule of the other tensors.
        kind: of gauge, for attribution: `whitening`, `random`, or `identity`.

    Example:
        >>> rule = GaugedRule(hidden=4)
        >>> sorted(rule.networks)
        ['in', 'out']

    Source: as `metateleport.GaugedOptimizer`; Pagliardini et al., "The AdEMAMix optimizer", ICLR 2025 (arXiv
    2409.03137), for two momenta.
    """

    tolerance: ClassVar[Tolerance] = AdaptiveRule.tolerance
    per_tensor: ClassVar[tuple[str, ...]] = (
        "cells", "momentum", "squares", "weights", "recent", "seen", "side_cells", "slow", "columns", "loud",
        "sketch",
    )  # fmt: skip
    void_on_growth: ClassVar[tuple[str, ...]] = ("scale",)
    reads_factors: ClassVar[bool] = True
    rows_by_task: ClassVar[bool] = True

    def __init__(
        self, hidden: int = 16, plain_hidden: int = 32, cooling: float = 0.01, kind: GaugeKind = "whitening"
    ) -> None:
        super().__init__()
        self.hidden, self.kind = hidden, kind
        self.plain = AdaptiveRule(plain_hidden, cooling)
        self.networks = nn.ModuleDict({side: _SideNetwork(hidden, _STARTS[side]) for side in SIDES})

    def initial_state(self, point: Point) -> dict[str, Any]:
        assert point.loss is not None
        like = next(self.networks.parameters())
        none = torch.zeros_like(point.loss)
        # Which tensors are factors is known with the symmetries, at the first step.
        own = torch.zeros(*point.loss.shape, self.hidden, dtype=like.dtype, device=like.device)
        plain = torch.zeros(*point.loss.shape, self.plain.hidden, dtype=like.dtype, device=like.device)
        names = list(point.gradients)
        zeros = {name: torch.zeros_like(gradient) for name, gradient in point.gradients.items()}
        empty = {key: dict.fromkeys(names, none) for key in ("squares", "weights", "recent", "seen", "slow", "columns")}
        return {
            **empty,
            "loud": dict.fromkeys(names, none),
            "sketch": dict.fromkeys(names, none),
            "cells": dict.fromkeys(names, (plain, plain)),
            "side_cells": dict.fromkeys(names, (own, own)),
            "momentum": zeros,
            "scale": none,
        }

    def step(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        gauges: Sequence[Gauge] = (),
        spend: bool = False,
    ) -> tuple[Tensors, dict[str, Any]]:
        pairs = tuple(pair for pair in factor_pairs(symmetries) if _is_there(pair, point))
        sides = [pair.names(side) for pair in pairs for side in SIDES]
        factors = {name for names in sides if all(each in point.gradients for each in names) for name in names}
        after = {key: dict(value) if isinstance(value, dict) else value for key, value in state.items()}
        moved = dict(point.parameters)
        rest = {name: value for name, value in point.gradients.items() if name not in factors}
        if rest:
            moved.update(self._plain_step(point.replace(gradients=rest), progress, after, spend))
        if factors:
            self._factor_step(point, pairs, progress, after, moved)
        return moved, after

    def _plain_step(self, point: Point, progress: Progress, after: dict[str, Any], spend: bool) -> Tensors:
        """Steps the tensors that are no factors; their entries of the state are changed in place."""
        names = list(point.gradients)
        own = {key: {name: after[key][name] for name in names} for key in self.plain.per_tensor}
        for name, gradient in point.gradients.items():
            if own["squares"][name].shape != gradient.shape:
                own["squares"][name] = torch.zeros_like(gradient)
        scale = after["scale"]
        if not bool(scale.any()):
            scale = self.plain.initial_state(point)["scale"]
        moved, own = self.plain.step(point, (), progress, {**own, "scale": scale}, (), spend)
        for key in self.plain.per_tensor:
            after[key].update(own[key])
        after["scale"] = scale
        return {name: moved[name] for name in names}

    def _factor_step(
        self, point: Point, pairs: Sequence[FactorPair], progress: Progress, after: dict[str, Any], moved: Tensors
    ) -> None:
        """Steps the factors; their entries of the state are changed in place."""
        fixed = {name: value.detach() for name, value in point.parameters.items()}
        slow = {
            name: after["slow"][name] if after["slow"][name].shape == value.shape else torch.zeros_like(value)
            for name, value in point.gradients.items()
        }
        by_size: dict[int, list[list[int]]] = {}
        for numbers in stacks_of(pairs, fixed):
            by_size.setdefault(pairs[numbers[0]].size, []).append(numbers)
        for stacks in by_size.values():
            own = [each for numbers in stacks for each in numbers]
            grams = {side: torch.cat([gram_of(pairs, numbers, side, fixed) for numbers in stacks]) for side in SIDES}
            units = [unit_of(pairs[each], fixed) for each in own]
            tasks = grams["in"].shape[0] // len(own)
            like = next(iter(point.gradients.values()))
            length = like.new_tensor(units).repeat_interleave(tasks)
            with torch.no_grad():
                gauges = product_gauges(grams["out"], grams["in"], _FLOOR * length, self.kind, like.dtype)
            for side in SIDES:
                trios = [trio_of(pairs, numbers, side, point.gradients, after["momentum"], slow) for numbers in stacks]
                some = [each is not None for each in trios]
                if not any(some):
                    continue
                # Where one factor is frozen the other has its gauge all the same.
                rows = [
                    number * tasks + task
                    for number, each in enumerate(own)
                    if some[next(place for place, numbers in enumerate(stacks) if each in numbers)]
                    for task in range(tasks)
                ]
                whole = len(rows) == len(length)
                here = gauges if whole else gauges.chosen(rows)
                numbers = [own[row // tasks] for row in rows[::tasks]]
                present = [each for each in trios if each is not None]
                there = [numbers for numbers, trio in zip(stacks, trios, strict=True) if trio is not None]
                taken = progress.accepted if progress.known else torch.ones(tasks, device=like.device)
                seen = seen_outside(pairs, there, side, present, here, taken, after["sketch"])
                products = torch.cat([each.mT @ each for each in present])
                made, beyond, shares = self._steps(
                    side,
                    pairs,
                    numbers,
                    point,
                    here,
                    products,
                    seen,
                    length if whole else length[rows],
                    progress,
                    after,
                )
                start = 0
                for trio, stack, sketch in zip(present, there, seen.sketches, strict=True):
                    part = slice(start, start + len(trio))
                    start += len(trio)
                    step = trio @ made[part] + sketch @ beyond[part, : sketch.shape[-1]]
                    spread_steps(pairs, stack, side, trio, step, shares[part], point, slow, after, moved)

    def _steps(
        self,
        side: FactorSide,
        pairs: Sequence[FactorPair],
        numbers: Sequence[int],
        point: Point,
        gauges: ProductGauges,
        products: Tensor,
        seen: Outside,
        unit: Tensor,
        progress: Progress,
        after: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""The steps of one side of pairs of one rank, and what gradients are in their momenta.

        Args:
            side: which.
            pairs: of the model.
            numbers: of the pairs to step.
            point: where the model stands.
            gauges: of these pairs.
            products: Gram matrices of gradient, momentum and slow momentum, side by side, `(pairs * tasks, 3 k, 3 k)`.
            seen: what is seen of the rows.
            unit: the length that steps start with, `(pairs * tasks,)`.
            progress: how each task is getting on.
            after: the state; what belongs to these pairs is brought up to date.

        Returns:
            What gradient and momenta are multiplied by, `(pairs * tasks, 3 k, k)`; what sketches are multiplied by,
            `(pairs * tasks, q, k)`; and the shares that gradients have in the new momenta, `(pairs * tasks, 2)`.
        """
        assert point.loss is not None
        width = products.shape[-1] // 3
        blocks = products.unflatten(-1, (3, width)).unflatten(-3, (3, width)).transpose(-3, -2)
        taken = progress.accepted.to(products.dtype) if progress.known else torch.ones_like(point.loss)
        with torch.no_grad():
            columns, level = self._moments(pairs, numbers, side, blocks[:, 0, 0].detach(), gauges, taken, after)
            fixed, loss = blocks.detach(), point.loss.detach()
            features, steady = factor_features(side, fixed, gauges, seen.gauge, level, unit, loss, progress)
        choice = self._outputs(side, pairs, numbers, features, progress, after)
        memory, often = choice[:, 1].sigmoid(), taken.repeat(len(numbers))
        fast, late = (1 - memory) * often, (1 - _SLOW) * often
        none = torch.zeros_like(memory)
        # Nesterov's: what a momentum is going to be if the next gradient is like this one.
        ahead = torch.stack((memory * fast + 1 - memory, memory * (1 - fast), none), -1)
        behind = torch.stack((_SLOW * late + 1 - _SLOW, none, _SLOW * (1 - late)), -1)
        gauge = gauges.reaching(side, choice[:, 3].sigmoid())
        outer = choice[:, 5].sigmoid().unsqueeze(-1)
        square, fourth = seen.gauge.weights(outer / 2).unsqueeze(-1), seen.gauge.weights(outer).unsqueeze(-1)
        bare, once, twice = [], [], []
        for factors in (ahead, behind):
            at_home, inside = combined(factors, blocks), seen.combined(factors)
            bare.append(gauge.mT @ at_home @ gauge)
            once.append(gauge.mT @ (at_home + inside.mT @ (square * inside)) @ gauge)
            twice.append(gauge.mT @ (at_home + inside.mT @ (fourth * inside)) @ gauge)
        polars = polar_of_gram(definite(torch.cat(once)))
        polar, slow = (
            fit(length_ratio(*grams)[:, None, None], grams[-1]) * grams[-1]
            for grams in zip(once, twice, polars.split(len(memory)), strict=True)
        )
        with torch.no_grad():
            spectrum = symmetric_spectrum(gauge.mT @ columns @ gauge)
            assert spectrum.vectors is not None
            roots = (spectrum.vectors * (spectrum.values + _SQUARES_FLOOR).rsqrt().unsqueeze(-2)) @ spectrum.vectors.mT
            roots = roots.to(products.dtype)
            # In directions that momenta lack all that there is is rounding, of a difference of terms as large as these.
            rounding = 8 * width * torch.finfo(roots.dtype).eps * torch.diagonal(bare[0], dim1=-2, dim2=-1).sum(-1)
            least = rounding * roots.square().sum((1, 2)) + torch.finfo(roots.dtype).tiny
        size = (roots @ twice[0]).mul(roots.mT).sum((1, 2)).maximum(least).sqrt()
        adaptive = roots * fit(math.sqrt(width) / size, roots)
        shares = choice[:, 6:].softmax(-1)
        length = unit * (4 * (choice[:, 0] / 4).tanh()).exp() * progress.damping.repeat(len(numbers))
        length = length * steady.flatten() ** choice[:, 2].sigmoid()
        if progress.total is not None:
            length = length * progress.left ** (_COOLING * choice[:, 4].sigmoid())
        first = fit(length * shares[:, 0], polar) * polar + fit(length * shares[:, 2], adaptive) * adaptive
        second = fit(length * shares[:, 1], slow) * slow
        first, second = gauge @ first @ gauge.mT, gauge @ second @ gauge.mT
        made = torch.cat(
            [fit(ahead[:, place], first) * first + fit(behind[:, place], second) * second for place in range(3)], 1
        )
        return made, square * (seen.inside @ made), torch.stack((fast, late), -1)

    def _moments(
        self,
        pairs: Sequence[FactorPair],
        numbers: Sequence[int],
        side: FactorSide,
        squares: Tensor,
        gauges: ProductGauges,
        taken: Tensor,
        after: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Running means of the gradients' Gram matrices, at home, and of their squares in the gauge, brought up."""
        gram = squares.reshape(len(numbers), len(taken), *squares.shape[1:])
        gauge = gauges.whole(side)
        power = torch.diagonal(gauge.mT @ squares @ gauge, dim1=-2, dim2=-1).sum(-1).reshape(gram.shape[:2])
        columns, levels = [], []
        for row, each in enumerate(numbers):
            name = pairs[each].names(side)[0]
            heads = [place for place, pair in enumerate(pairs) if pair.names(side)[0] == name]
            own, old, loud = heads.index(each), after["columns"][name], after["loud"][name]
            if old.ndim < 4:
                old = gram.new_zeros(len(taken), len(heads), *gram.shape[2:])
                loud = gram.new_zeros(len(taken), len(heads), 2)
            now = torch.lerp(old[:, own].to(gram), gram[row], fit((1 - _SQUARES) * taken, gram[row]))
            seen = torch.stack((power[row], torch.ones_like(power[row])), -1)
            louder = torch.lerp(loud[:, own].to(gram), seen, fit((1 - _RECENT) * taken, seen))
            after["columns"][name], after["loud"][name] = exchanged(old, own, now), exchanged(loud, own, louder)
            columns.append(now)
            levels.append(louder[:, 0] / louder[:, 1].clamp_min(1e-6))
        return torch.cat(columns), torch.cat(levels)

    def _outputs(
        self,
        side: FactorSide,
        pairs: Sequence[FactorPair],
        numbers: Sequence[int],
        features: Tensor,
        progress: Progress,
        after: dict[str, Any],
    ) -> Tensor:
        """The network's outputs for one side of pairs, `(pairs * tasks, outputs)`; the states are changed in place.

        Heads of one tensor have a state in common, and what is put out for them is that of their mean features.
        """
        network = self.networks[side]
        firsts = [pairs[each].names(side)[0] for each in numbers]
        names = list(dict.fromkeys(firsts))
        features = features.reshape(len(numbers), -1, features.shape[-1])
        rows = [names.index(name) for name in firsts]
        if len(names) < len(firsts):
            places = torch.tensor(rows, device=features.device)
            counts = torch.bincount(places).to(features)[:, None, None]
            features = features.new_zeros(len(names), *features.shape[1:]).index_add(0, places, features) / counts
        shared = progress.features().detach().expand(*features.shape[:-1], -1)
        inputs = torch.cat((features, shared.to(features)), -1)
        like = next(network.parameters())
        inputs = torch.nan_to_num(inputs, 0.0, 10.0, -10.0).clamp(-10, 10).to(like.dtype)
        before = tuple(
            torch.stack([after["side_cells"][name][part] for name in names]).flatten(0, 1).to(inputs) for part in (0, 1)
        )
        outputs, states = network(inputs.flatten(0, 1), before)
        outputs = outputs.to(features.dtype).reshape(*inputs.shape[:2], -1)
        hidden, memory = (each.reshape(*inputs.shape[:2], -1) for each in states)
        for row, name in enumerate(names):
            after["side_cells"][name] = (hidden[row], memory[row])
        return (outputs if len(names) == len(firsts) else outputs[rows]).flatten(0, 1)


def _is_there(pair: FactorPair, point: Point) -> bool:
    """Whether the tensors of a pair are all there, and it has gauges."""
    there = all(name in point.parameters for side in SIDES for name in pair.names(side))
    return there and has_gauges(pair, point.parameters)
