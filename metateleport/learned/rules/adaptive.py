"""The learned update for minibatches: the directions of Adam, of the polar factor and of a gauge, mixed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metateleport.gauges import Gauge, precondition
from metateleport.learned.parts import UNITS
from metateleport.learned.progress import PROGRESS_FEATURES, Progress, Tolerance
from metateleport.learned.rules.base import RuleSettings, UpdateRule, carried_moments
from metateleport.learned.rules.guard import (
    GUARD_SAMPLES,
    PLAIN_RATE,
    Sample,
    giving_way,
    guard_state,
    judged,
    noted,
)
from metateleport.learned.rules.mixture import (
    NUMBERS,
    RECENT_MEMORY,
    SQUARES_MEMORY,
    Ledger,
    Mixture,
    age,
    has_polar,
    layer_of,
    loudness,
    owners,
    run_length,
    scaled,
)
from metateleport.linalg import Blocks, alike, finite_gradient, fit, polar_factors
from metateleport.point import Point, Tensors
from metateleport.settings import AT_LEAST_ONE, NOT_NEGATIVE, setting
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move

__all__ = ["TOLD_START", "AdaptiveRule", "AdaptiveSettings", "layer_of", "layer_scales"]

_FEATURES = 7
_TOLD_FEATURES = 2
_LEDGERS = 4
"""Largest number of optimizers of one rule whose tensors are known at a time."""

_TABLE = 0.5
"""A matrix whose root mean square is above this at the start counts as a table of embeddings."""

_SMALLEST_SCALE = 1e-2
"""Smallest root mean square of a layer that is reckoned with, so that a layer that starts at zero moves."""

_CALM = 2.0
"""Where the logit of the exponent starts that says how much shorter steps become with the gradients."""

_MIXTURE = (0.0, 1.5, -1.5)
"""Where the logits of Adam's direction, the polar factor's and the gauge's start."""

TOLD_START = (-0.42, math.log(4.0), 0.0, 0.0, 4.0, -1.5, -1.5)
"""Where the outputs of a rule start that is told the length of the run: shorter memories and larger shares of the polar
factor than of one that has to come to rest by itself, and annealing along about the root of what is left.

They were chosen by hand by the training and the held-out loss of the tasks of `benchmarks/_development_tasks.py`, none
of which is in `benchmarks/_any_models.py`. They are a good optimizer by themselves, so training starts from exactly
them.
"""


@dataclasses.dataclass(frozen=True)
class AdaptiveSettings(RuleSettings):
    """A learned update for minibatches (`AdaptiveRule`).

    Args:
        hidden: units of the LSTM of each tensor.
        cooling: how fast steps get shorter with time; zero for not at all.
        told: whether steps are annealed to the end of a run whose length is told, with a learned exponent.
        guarded: whether steps give way to AdamW's where they do worse (`metateleport.learned.rules.guard`).
    """

    kind: ClassVar[str] = "adaptive"

    hidden: int = setting(32, AT_LEAST_ONE, UNITS)
    cooling: float = setting(0.0, NOT_NEGATIVE, 1e6)
    told: bool = setting(False)
    guarded: bool = setting(False)

    @property
    def reads_total(self) -> bool:
        return self.told

    @property
    def starts_well(self) -> bool:
        return self.told

    def rule(self) -> AdaptiveRule:
        return AdaptiveRule(self.hidden, self.cooling, self.told, self.guarded)


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

    A rule that is `told` how long the run is anneals to its end: steps are also multiplied by
    $(300 / T)^{1/3}\, r^{a_t}$, $T$ the number of steps, $r$ the share of the run that is left and $a_t$ one more
    output of the LSTM. Where no length is told, both factors are one.

    Velocity and second moment move with a teleport. A task that takes its last step back takes it once more, damped.

    Args:
        hidden: units of the LSTM.
        cooling: $a$, zero for steps that are not shortened with time.
        told: whether there is an output for the annealing.
        guarded: whether steps give way to AdamW's (`metateleport.learned.rules.guard.judged`).

    Example:
        >>> [sum(p.numel() for p in AdaptiveRule(hidden=8, told=told).parameters()) for told in (False, True)]
        [758, 831]

    Source: Kingma and Ba, ICLR 2015 (arXiv 1412.6980) for Adam's direction; Jordan et al., "Muon: An optimizer for
    hidden layers in neural networks", 2024, for the polar factor's; Zinkevich, "Online convex programming and
    generalized infinitesimal gradient ascent", ICML 2003, for steps that fall with the root of time.
    """

    # Where few samples are still wrong, the loss of a batch is spread by more than its own size, and what is taken back
    # are good steps: only what leads back up to where the task began is a failure, and far above it always.
    tolerance: ClassVar[Tolerance] = Tolerance(spreads=5.0, share=1.0, memory=0.9, start=0.5, ceiling=2.0)

    per_tensor: ClassVar[tuple[str, ...]] = ("cells", "momentum", "squares", "weights", "recent", "seen")
    void_on_growth: ClassVar[tuple[str, ...]] = ("scale",)
    reads_pass: ClassVar[bool] = False
    constants: ClassVar[tuple[str, ...]] = ()
    """Entries of the state, by tensor, that no step changes."""

    rows_by_task: ClassVar[bool] = True

    def __init__(self, hidden: int = 32, cooling: float = 0.0, told: bool = False, guarded: bool = False) -> None:
        super().__init__()
        self.hidden, self.cooling, self.told, self.guarded = hidden, cooling, told, guarded
        if guarded:
            self.per_tensor = (*type(self).per_tensor, *GUARD_SAMPLES)  # type: ignore[misc]
        self.detach = True
        self._ledgers: dict[int, Ledger] = {}
        self.observe: Callable[..., Tensor] = functools.partial(_observe, told=told)
        self.polar: Callable[[Sequence[Tensor]], list[Tensor]] = polar_factors
        self.cell = nn.LSTMCell(_FEATURES + PROGRESS_FEATURES + _TOLD_FEATURES * told, hidden)
        start = TOLD_START if told else (0.0, math.log(9.0), _CALM, *_MIXTURE)
        self.head = nn.Linear(hidden, len(start))
        with torch.no_grad():
            self.head.weight.mul_(0.0 if told else 0.1)
            self.head.bias.copy_(torch.tensor(start))

    def initial_state(self, point: Point) -> dict[str, Any]:
        assert point.loss is not None
        own = self.head.weight
        zero = torch.zeros(*point.loss.shape, self.hidden, dtype=own.dtype, device=own.device)
        none = torch.zeros_like(point.loss)
        return {
            "cells": dict.fromkeys(point.gradients, (zero, zero)),
            "momentum": {name: torch.zeros_like(gradient) for name, gradient in point.gradients.items()},
            "squares": {name: torch.zeros_like(gradient) for name, gradient in point.gradients.items()},
            "weights": dict.fromkeys(point.gradients, none),
            "recent": dict.fromkeys(point.gradients, none),
            "seen": dict.fromkeys(point.gradients, none),
            "scale": _usual_scale(point),
            **(guard_state(point.gradients, none) if self.guarded else {}),
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
        assert point.loss is not None
        if spend and not gauges and self.polar is polar_factors and Ledger.serves(point.gradients):
            return self._step_of_one(point, progress, state)
        names, gradients = list(point.gradients), list(point.gradients.values())
        dtype, tiny = gradients[0].dtype, torch.finfo(gradients[0].dtype).tiny
        taken = progress.accepted.to(dtype) if progress.known else None
        blocks = Blocks.of(gradients, free=True)
        now, own = blocks.gather(gradients), blocks.gather([point.parameters[name] for name in names])
        before, squares = (
            blocks.gather([state[key][name].to(dtype) for name in names]) for key in ("momentum", "squares")
        )
        sample = Sample.of_gradients(names, blocks, now) if self.guarded else None
        if sample is not None:
            state = {**state, **judged(state, sample, progress.accepted)}
        # Of each tensor, as some are used now and then.
        seen, recent, weights = (torch.stack([state[key][name] for name in names]).to(dtype) for key in NUMBERS)
        seen = seen + (1 if taken is None else taken)
        powers = blocks.mean_squares(now)
        recent = torch.lerp(recent, powers, _share(RECENT_MEMORY, taken))
        squares = [
            _mean_of_squares(*each, _share(SQUARES_MEMORY, taken), spend) for each in zip(squares, now, strict=True)
        ]
        young = age(seen, SQUARES_MEMORY, torch)
        levels = blocks.means(squares)
        outputs, heard = self._outputs(point, progress, state, blocks, (now, before, own), powers, levels / young)
        mixture = Mixture.of(outputs, self._lacks(point, gauges), self.told)
        new = mixture.news if taken is None else mixture.news * taken
        weights = torch.lerp(weights, torch.ones_like(powers), new)
        momentum = [_mean(*each, spend) for each in zip(before, now, blocks.spread(new), strict=True)]
        if spend and not (self.guarded or gauges):
            # Large models have no memory to lose: nothing below reads a gradient.
            del gradients, now
            point.gradients.clear()
        floors = blocks.spread(1e-8 * (levels + tiny * young) + tiny)
        adaptive = [_over_root(*each) for each in zip(momentum, squares, floors, strict=True)]
        sizes, speeds = _root(blocks.mean_squares(adaptive)), _root(blocks.mean_squares(momentum))
        loud = _loudness(levels / young, tuple(names))
        lengths = scaled(mixture, (seen, recent, weights), speeds, sizes, tiny, torch)
        lengths = lengths * loud * self._scale(mixture.annealing, progress, progress.damping * state["scale"])
        factors, lengths = -lengths * mixture.shares[..., 0] / sizes, -lengths.unsqueeze(-1) * mixture.shares
        plain = factors
        if sample is not None:
            own_lengths = PLAIN_RATE * progress.left * loud * young.sqrt() / weights.clamp_min(1e-6)
            plain = sample.stepped(adaptive, own_lengths)
            factors, lengths = giving_way(state["trust"], factors, lengths, own_lengths)
        stepped = [_sum(*each, spend) for each in zip(own, adaptive, blocks.spread(factors), strict=True)]
        moved = {**point.parameters, **dict(zip(names, blocks.parts(stepped), strict=True))}
        velocity = dict(zip(names, blocks.parts(momentum), strict=True))
        self._add_polar(moved, velocity, lengths[..., 1], spend)
        _add_gauged(moved, velocity, lengths[..., 2], (gauges, point), spend)
        lists: dict[str, Iterable[Tensor]] = {"squares": blocks.parts(squares)}
        lists |= zip(NUMBERS, (seen, recent, weights), strict=True)
        own_state = {key: dict(zip(names, each, strict=True)) for key, each in lists.items()}
        after = {**state, **heard, "momentum": velocity, **own_state}
        if sample is not None:
            after |= noted(sample, own, blocks.gather([moved[name] for name in names]), plain)
        return moved, after

    def _step_of_one(self, point: Point, progress: Progress, state: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
        """The step of one small task on a CPU: the same, in fewer and shorter calls."""
        gradients = point.gradients
        ledger = self._ledger_of(state, gradients)
        scale = float(progress.damping * state["scale"])
        moved, new = ledger.step(
            gradients,
            point.parameters,
            state,
            float(progress.all_accepted or not progress.known),
            functools.partial(self._heard, point, progress, state, ledger),
            lambda annealing: self._scale(annealing, progress, scale),
            progress.left,
        )
        return {**point.parameters, **moved}, {**state, **new}

    def _ledger_of(self, state: dict[str, Any], gradients: Tensors) -> Ledger:
        """The ledger that a state lies in, which is made where there is none; several optimizers may share a rule."""
        first = next(iter(state["momentum"].values())).data_ptr()
        ledger = self._ledgers.get(first)
        if ledger is None or not ledger.holds(state, gradients):
            self._ledgers.pop(first, None)
            while len(self._ledgers) >= _LEDGERS:
                self._ledgers.pop(next(iter(self._ledgers)))
            ledger = Ledger(state, gradients, self.constants)
            self._ledgers[ledger.place] = ledger
        return ledger

    def _heard(
        self,
        point: Point,
        progress: Progress,
        state: dict[str, Any],
        ledger: Ledger,
        now: Tensor,
        here: Tensor,
        powers: Any,
        levels: Any,
    ) -> tuple[Mixture, dict[str, Any]]:
        """What the network says of the tensors of one task, and what it remembers."""
        stacked = [torch.from_numpy(each.astype(now.numpy().dtype)).unsqueeze(1) for each in (powers, levels)]
        seen = ([now], [ledger.whole("momentum")], [here])
        outputs, heard = self._outputs(point, progress, state, ledger.blocks, seen, *stacked)
        return Mixture.of(outputs, self._lacks(point, ()), self.told).of_one_task(), heard

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but the ledgers, each of which is of the tensors of one optimizer."""
        return {**self.__dict__, "_ledgers": {}}

    def carry(
        self, state: dict[str, Any], moves: Sequence[Move], point: Point, accepted: Tensor, spend: bool = False
    ) -> dict[str, Any]:
        return {**state, **carried_moments(state, moves, point, False, spend)} if moves else state

    def network(self, inputs: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The outputs of the LSTM and its head for every tensor and task, in rows, and the new state."""
        hidden, memory = self.cell(inputs, state)
        return self.head(hidden), (hidden, memory)

    def _scale(self, annealing: Any, progress: Progress, scale: Any) -> Any:
        """The weights' size times all that makes steps shorter with time."""
        if self.told and progress.total is not None:
            scale = scale * run_length(progress.total, progress.left, annealing)
        return scale / math.sqrt(1 + self.cooling * progress.time) if self.cooling else scale

    def _lacks(self, point: Point, gauges: Sequence[Gauge]) -> tuple[tuple[bool, ...], ...]:
        """Of each tensor which of the directions it does not have."""
        gauged = {name for gauge in gauges for name in gauge.names}
        return tuple((False, not has_polar(value), name not in gauged) for name, value in point.gradients.items())

    def _add_polar(self, moved: Tensors, momentum: Tensors, lengths: Tensor, spend: bool) -> None:
        """Adds the polar factors' share of the step to the matrices among the tensors."""
        places = {name: place for place, (name, value) in enumerate(momentum.items()) if has_polar(value)}
        matrices = {name: momentum[name].detach() if self.detach else momentum[name] for name in places}
        for names in alike(matrices):
            own = torch.stack([lengths[places[name]] for name in names])
            # In a call of its own, so that the factors of some are gone before those of the next are made.
            self._add_polar_of({name: matrices[name] for name in names}, moved, own, spend)

    def _add_polar_of(self, matrices: Tensors, moved: Tensors, lengths: Tensor, spend: bool) -> None:
        polar = self.polar(list(matrices.values()))
        sizes = _root(Blocks.of(polar, free=False).mean_squares(polar))
        for name, direction, factor in zip(matrices, polar, lengths / sizes, strict=True):
            moved[name] = _added(moved[name], direction, factor, spend)

    def _outputs(
        self,
        point: Point,
        progress: Progress,
        state: dict[str, Any],
        blocks: Blocks,
        seen: tuple[list[Tensor], ...],
        powers: Tensor,
        levels: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The network's outputs for every tensor, `(tensors, tasks, outputs)`, and what it remembers, as in the state.

        `seen` are the gradients, the velocities before them and the parameters, in blocks.
        """
        names, scale = list(point.gradients), state["scale"]
        if self.detach and torch.is_grad_enabled():
            assert point.loss is not None
            point = point.replace(loss=point.loss.detach())
            scale, powers, levels = scale.detach(), powers.detach(), levels.detach()
            seen = tuple([each.detach() for each in part] for part in seen)
        inputs = self.observe(point, blocks, seen, powers, levels, scale, progress)
        inputs = torch.nan_to_num(inputs, 0.0, 10.0, -10.0).clamp(-10, 10).to(self.head.weight.dtype)
        cells = state["cells"]
        if isinstance(cells, _Rows) and list(cells) == names:
            before = cells.rows
        else:
            parts = ([cells[name][part] for name in names] for part in (0, 1))
            before = tuple(torch.stack(each).flatten(0, 1).to(inputs) for each in parts)
        outputs, after = self.network(inputs.flatten(0, 1), before)
        outputs = finite_gradient(outputs).to(powers.dtype).reshape(*powers.shape, -1)
        hiddens, memories = (part.reshape(*powers.shape, -1).unbind(0) for part in after)
        found = dict(zip(names, zip(hiddens, memories, strict=True), strict=True))
        # Where there is no graph the state may be saved, and a plain dict loads anywhere.
        return outputs, {"cells": _Rows(found, after) if torch.is_grad_enabled() else found}


class _Rows(dict[str, tuple[Tensor, Tensor]]):
    """The states of the cells by tensor, and as the rows that they are parts of: the next step reads them as they are.

    Args:
        cells: by the tensor's name.
        rows: hidden states and memories, `(tensors * tasks, hidden)`.
    """

    def __init__(self, cells: dict[str, tuple[Tensor, Tensor]], rows: tuple[Tensor, ...]) -> None:
        super().__init__(cells)
        self.rows = rows


def _add_gauged(
    moved: Tensors, momentum: Tensors, lengths: Tensor, where: tuple[Sequence[Gauge], Point], spend: bool
) -> None:
    """Adds the gauges' share of the step to the tensors that have one."""
    gauges, point = where
    gauged = {name for gauge in gauges for name in gauge.names}
    raised = precondition(gauges, momentum, point) if gauged else {}
    for name, length in zip(momentum, lengths, strict=True):
        if name in gauged:
            moved[name] = _added(moved[name], raised[name], length / _rms(raised[name]), spend)


def _share(memory: float | Tensor, taken: Tensor | None) -> float | Tensor:
    """What a running mean takes of the new value; nothing in tasks that are back at a point that it has seen."""
    return 1 - memory if taken is None else (1 - memory) * taken


def _mean(before: Tensor, now: Tensor, share: float | Tensor, spend: bool) -> Tensor:
    share = fit(share, before) if isinstance(share, Tensor) else share
    return before.lerp_(now, share) if spend else torch.lerp(before, now, share)


def _mean_of_squares(before: Tensor, gradient: Tensor, share: float | Tensor, spend: bool) -> Tensor:
    if isinstance(share, Tensor):
        return _mean(before, gradient.square(), share, spend)
    if spend:
        return before.mul_(1 - share).addcmul_(gradient, gradient, value=share)
    return torch.addcmul(before * (1 - share), gradient, gradient, value=share)


def _over_root(tensor: Tensor, squares: Tensor, floor: Tensor) -> Tensor:
    r"""$v / \sqrt{q + f}$, $f$ of each task: units that were never on have no second moment, and no velocity either."""
    root = squares + fit(floor, squares)
    free = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return torch.div(tensor, root.sqrt_(), out=root) if free else tensor / root.sqrt()


def _sum(start: Tensor, direction: Tensor, factor: Tensor, spend: bool) -> Tensor:
    factor = fit(factor, direction)
    # The direction's memory is free then: large models have none to lose.
    return direction.mul_(factor).add_(start) if spend else torch.addcmul(start, direction, factor)


def _added(total: Tensor, direction: Tensor, factor: Tensor, spend: bool) -> Tensor:
    factor = fit(factor, direction)
    return total.addcmul_(direction, factor) if spend else torch.addcmul(total, direction, factor)


def _root(powers: Tensor) -> Tensor:
    """Root mean squares; their derivative is finite at zero."""
    return (powers + torch.finfo(powers.dtype).tiny).sqrt()


def _rms(tensor: Tensor) -> Tensor:
    """Root mean square of each task's tensor; its derivative is finite at zero."""
    return (tensor.flatten(1).square().mean(1) + torch.finfo(tensor.dtype).tiny).sqrt()


def _loudness(levels: Tensor, names: tuple[str, ...]) -> Tensor:
    """`loudness`, from mean squares of the gradients, `(tensors, tasks)`."""
    levels, numbers = levels.detach().sqrt(), torch.finfo(levels.dtype)
    places = (_weights_of.__wrapped__ if torch.compiler.is_compiling() else _weights_of)(names, levels.device)
    return loudness(levels, levels.index_select(0, places), numbers.eps, numbers.tiny, torch)


@functools.lru_cache(maxsize=64)
def _weights_of(names: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor(owners(names), device=device)


def _usual_scale(point: Point) -> Tensor:
    """Geometric mean of the layers' sizes over their number, `(tasks,)`; tables of embeddings do not count in the mean.

    Their entries are of order one whatever the model is like, and with them in the mean steps would be longer than the
    other layers' weights.
    """
    layers = layer_scales(point)
    counted = dict.fromkeys(layers, torch.ones_like(next(iter(layers.values())), dtype=torch.bool))
    for name in point.gradients:
        value = point.parameters[name].detach()
        if value.ndim > 2:
            counted[layer_of(name)] = counted[layer_of(name)] & (_rms(value) <= _TABLE)
    mask = torch.stack(list(counted.values()))
    mask = torch.where(mask.any(0), mask, True)
    logs = torch.stack(list(layers.values())).log()
    return (torch.where(mask, logs, 0.0).sum(0) / mask.sum(0)).exp() / len(layers)


def layer_scales(point: Point) -> Tensors:
    """Root mean square of all parameters of each layer together, `(tasks,)`, by its name."""
    layers: dict[str, list[Tensor]] = {}
    for name in point.gradients:
        layers.setdefault(layer_of(name), []).append(point.parameters[name].flatten(1))
    return {layer: _rms(torch.cat(parts, 1)).clamp_min(_SMALLEST_SCALE) for layer, parts in layers.items()}


def _observe(
    point: Point,
    blocks: Blocks,
    seen: tuple[list[Tensor], ...],
    powers: Tensor,
    levels: Tensor,
    scale: Tensor,
    progress: Progress,
    told: bool = False,
) -> Tensor:
    """The network's features of every tensor, `(tensors, tasks, features)`; some more where the length is told."""
    assert point.loss is not None
    loss, names = point.loss, list(point.gradients)
    gradients, momentum, parameters = seen
    tiny = torch.finfo(loss.dtype).tiny
    level = levels.clamp_min(tiny).sqrt()
    steepness, velocity = (each.clamp_min(tiny).sqrt() for each in (powers, blocks.mean_squares(momentum)))
    layout = _layout.__wrapped__ if torch.compiler.is_compiling() else _layout
    counts, together, biases = layout(tuple(names), blocks.counts, loss.device, loss.dtype)
    # How much of the loss one step of the first length would take, were the loss linear.
    steep = (level * scale * counts / loss.abs().clamp_min(tiny)).clamp_min(tiny).log()
    # Of each tensor the root mean square of all parameters of its layer.
    sizes = together @ (counts * blocks.mean_squares(parameters)) / (together @ counts)
    heavy = (_root(sizes).clamp_min(_SMALLEST_SCALE) / scale).log()
    own = (
        (velocity / level).clamp_min(1e-4).log() / 3,
        blocks.mean_products(gradients, momentum) / (steepness * velocity),
        (steepness / level).clamp_min(1e-4).log(),
        steep / 5 if progress.known else torch.zeros_like(steep),
        biases.expand_as(level),
        torch.full_like(level, math.log(progress.time + 1) / 5),
        heavy / 3,
    )
    parts = [torch.stack(own, -1), progress.features().expand(len(names), *loss.shape, -1)]
    return torch.cat([*parts, _told_features(point, progress, powers)] if told else parts, -1)


@functools.lru_cache(maxsize=64)
def _layout(
    names: tuple[str, ...], counts: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors' numbers of entries, which are of one layer, and which are biases: columns, but for the second."""
    layers = [layer_of(name) for name in names]
    together = _constant([[float(each == own) for each in layers] for own in layers], device, dtype)
    biases = _constant([float(name.rpartition(".")[2] == "bias") for name in names], device, dtype)
    return _constant(counts, device, dtype).unsqueeze(-1), together, biases.unsqueeze(-1)


def _told_features(point: Point, progress: Progress, powers: Tensor) -> Tensor:
    """The share of the run that is left and the shape of every tensor, `(tensors, tasks, 2)`."""
    shapes = [value.shape[1:] for value in point.gradients.values()]
    # Of a matrix with as many rows as columns it is zero, and of a vector, whose columns are one, the number of rows.
    tall = [math.log(shape[0] / math.prod(shape[1:])) / 5 if shape else 0.0 for shape in shapes]
    heights = _constant(tall, powers.device, powers.dtype)[:, None].expand_as(powers)
    return torch.stack((torch.full_like(powers, progress.left), heights), -1)


def _constant(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
