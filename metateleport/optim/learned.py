"""The learned optimizer as a `torch.optim.Optimizer`, for any training loop."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.capture import PassRecorder, unwrapped
from metateleport.capture.evidence import Evidence, evidence_of
from metateleport.gauges import factor_pairs
from metateleport.learned.meta_optimizer import InnerLoop, MetaOptimizer, MetaState, Step
from metateleport.learned.refresh import Refresh
from metateleport.learned.stand_in import StandIn
from metateleport.learned.teleporter import LearnedTeleporter
from metateleport.linalg import squarable, surely_finite, without_autocast
from metateleport.optim.checks import is_averaged
from metateleport.optim.choice import choose
from metateleport.optim.closure import evaluated
from metateleport.optim.factors import Factors
from metateleport.optim.fitting import (
    as_number,
    check_parameters,
    check_total_steps,
    fitting_symmetries,
    say_what_fits,
    say_what_has_no_gauge,
)
from metateleport.optim.memory import (
    fingerprint,
    flattened,
    renamed,
    restored_parts,
    saved_parts,
    unflattened,
)
from metateleport.optim.parameters import (
    dense_gradient,
    known_state,
    master,
    raised,
    replicated,
    rule_state,
    stacked_pullback,
    trainable,
    update_entries,
    within,
    working_dtype,
    write,
    write_all,
)
from metateleport.optim.saved import merged
from metateleport.point import Point, Tensors
from metateleport.symmetries import Symmetry

__all__ = ["LearnedOptimizer"]

_BLAMED = 2
"""After so many evaluations in a row that are not finite, the step before them is taken back."""

_TAKEN_BACK = 10
"""After so many steps taken back in a row a warning doubts that every step sees the same data."""

_SMALL_FACTOR = 0.02
"""A factor on the steps below this is taken for a learning rate of another optimizer."""

_MAX_STRETCH = 10.0
"""Bound on the stretch of all teleports together if the checkpoint has none of its own."""

_SMALL = 0.05
"""A teleport is small if its generator's root mean square over the group's dimensions is below this."""

_LONGEST_REST = 16
"""Largest number of steps that a symmetry with small teleports rests for."""

_OWN = "learned/"
"""Prefix of the entries of a state dict that belong to all parameters together."""


class LearnedOptimizer(torch.optim.Optimizer):
    r"""Trains a model with a learned meta-optimizer, in any training loop.

    It behaves as `torch.optim`'s own do: `loss.backward(); optimizer.step()`, with schedulers, clipping, accumulation,
    `GradScaler`, parameter groups, state dicts and `torch.distributed.checkpoint`. With $\Delta$ the learned step of a
    tensor,

    $$W \mapsto (1 - \mathrm{lr}\, w)\, g \cdot W + \mathrm{lr}\, \Delta,$$

    $g$ the learned teleport where the checkpoint has one, $w$ the `weight_decay`.

    **Loss.** With `step(closure)` or `step(loss=value)` the loss is known: a step that made it much worse is taken back
    and tried shorter. With `step()` no step is taken back, and no network reads a loss.

    **Passes.** Teleports, gauges and some rules read inputs of layers and gradients on their outputs, which hooks on
    the model record. The recorded pass is compared with `p.grad`; a factor between the two (clipping, a scaled loss) is
    found and divided out. If they do not agree, as after several passes, the step is taken without the pass.

    **Rests.** If the last teleport along a symmetry was small, the symmetry rests for one step, then for two, up to 16.
    While all symmetries rest, no pass is recorded. A teleport that is not small ends the rests. There are no rests with
    `deterministic=True`, nor with rules and gauges that read a pass at every step.

    **Replicas.** In a process group of several ranks only weights and gradients are read, so the replicas of
    `DistributedDataParallel` stay equal.

    **Half precision.** Moments and steps are in float32; the rounding error of the weights is kept beside them.

    Args:
        model_or_params: the model; or parameters, groups of them or pairs of name and parameter, as `torch.optim`'s
            own take them. Without a model there are no symmetries to move along.
        checkpoint: a checkpoint's name, path or address in MLflow (`models:/lora@champion`), a loaded checkpoint, a
            `MetaOptimizer`, or what `metateleport.connect` gave. If not given, `lora` where the model has low-rank
            adapters to train, else `default` (`metateleport.optim.choice.choose`).
        symmetries: of the model, in the order of the data flow; found in it if not given, none if empty.
        example_input: a tensor, a tuple or a dict of keyword inputs: finds the symmetries of any model, not only of an
            `nn.Sequential`.
        lr: a factor on the learned step, of each group; the learned length is at one.
        weight_decay: share of the weights that each step takes off, times `lr`. AdamW at `lr=1e-3, weight_decay=1e-2`
            takes off 1e-5.
        total_steps: length of the run, where it is known: steps get shorter along half a cosine, down to zero there, or
            as the checkpoint has learned it.
        deterministic: a promise that every closure evaluates the same data without noise. Losses are then compared
            exactly, and rules that can build on that do.

    Attributes:
        skipped: number of steps that were not taken, as the loss, a gradient or its square was not finite.
        last_step: what the last step did, without the weights that it led to; None before the first.

    Raises:
        ValueError: if a symmetry names what the model does not have, or parameters cannot be served.
        metateleport.checkpoint.CheckpointError: if the checkpoint cannot be loaded, has no learned step or serves one
            shape of network only.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 1))
        >>> optimizer = LearnedOptimizer(model)
        >>> x = torch.ones(5, 3)
        >>> losses = []
        >>> for _ in range(5):
        ...     loss = (model(x) - 1).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     losses.append(float(loss.detach()))
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        checkpoint: Any = None,
        symmetries: Sequence[Symmetry] | None = None,
        example_input: Any = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        total_steps: int | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        _check_numbers(lr, weight_decay)
        check_total_steps(total_steps)
        if 0 < as_number(lr) < _SMALL_FACTOR:
            warnings.warn(
                f"LearnedOptimizer: lr={lr} is a factor on the learned step and not a step size as AdamW's: steps of "
                "their own length have lr=1",
                stacklevel=2,
            )
        if checkpoint is None:
            checkpoint = choose(model_or_params if isinstance(model_or_params, nn.Module) else None).checkpoint
        meta, called, made_for = _meta_optimizer(checkpoint)
        self.model: nn.Module | None = None
        given: Any = model_or_params
        if isinstance(model_or_params, nn.Module):
            self.model = unwrapped(model_or_params)[0]
            given = list(self.model.parameters())
        elif symmetries or example_input is not None:
            raise ValueError("symmetries are those of a model: give the model itself in the place of its parameters")
        super().__init__(given, {"lr": lr, "weight_decay": weight_decay})
        device = self.param_groups[0]["params"][0].device
        if next(meta.parameters()).device != device:
            # A loaded checkpoint may serve several models, on several devices.
            meta = copy.deepcopy(meta).to(device)
        if isinstance(meta.teleporter, LearnedTeleporter) and meta.teleporter.max_stretch is None and not deterministic:
            # Where nothing is taken back for certain, a bound on each teleport does not bound where they lead.
            meta = copy.deepcopy(meta)
            meta.teleporter.max_stretch = _MAX_STRETCH  # type: ignore[union-attr]
        if meta.gauge is not None:
            meta = copy.deepcopy(meta)
            meta.gauge.refresh = Refresh()  # type: ignore[union-attr]
        self.meta = meta
        self.total_steps = total_steps
        self.deterministic = deterministic
        self.symmetries: tuple[Symmetry, ...] = ()
        if self.model is not None:
            self.symmetries = fitting_symmetries(self.model, meta, symmetries, example_input)
        say_what_fits(meta, called, made_for, self.symmetries, self._named(), deterministic)
        if self.model is not None and meta.rule.reads_factors:
            say_what_has_no_gauge(self.model, self.symmetries)
        self.steps = 0
        self.skipped = 0
        self._in_a_row = 0
        self.last_step: Step | None = None
        # Rules that cool down by the length of the run do so in place of the cosine.
        self._told = total_steps is not None and meta.config.rule.reads_total
        self.loop = InnerLoop(
            meta, self.symmetries, deterministic, spends=True, total=total_steps if self._told else None
        )
        self._loaded: Tensors = {}
        self._stepped: frozenset[str] | None = None
        # What is taken back at once where it was too long may be as long as it likes.
        self._bounds_steps = meta.rule.divides_by_loss and not deterministic
        self._said: set[str] = set()
        # Of each symmetry how many steps it rests for yet, and how long its rest is.
        self._rests = [(0, 0)] * len(self.symmetries)
        # Other rules make use of what a pass tells at every step, and so do gauges.
        self._may_rest = not (deterministic or meta.rule.divides_by_loss) and meta.gauge is None
        self._recorder: PassRecorder | None = None
        self._record()

    def _record(self) -> None:
        modules = tuple(dict.fromkeys(name for each in self.symmetries for name in each.modules))
        if self.model is not None and modules and not self.meta.rule.reads_factors:
            # Part of a backward pass has to be made anew where a teleport is no linear action.
            rebuilds = any(each.exactness == "batch-exact" for each in self.symmetries)
            self._recorder = PassRecorder(self.model, modules, replays=rebuilds)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters to train, with `lr` and `weight_decay` of its own or the defaults.

        Raises:
            ValueError: if one of its numbers cannot be, or its parameters are of a kind that no step is taken on.
        """
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            _check_numbers(options["lr"], options["weight_decay"])
        super().add_param_group(param_group)
        check_parameters(self.param_groups)
        meta: MetaOptimizer | None = self.__dict__.get("meta")
        if meta is not None and meta.rule.reads_factors:
            known = Factors(self.model, factor_pairs(self.symmetries))
            if known.new_pairs({id(value) for value in self.param_groups[-1]["params"]}):
                self._say(
                    "adapters that are added later step like other tensors: for steps in gauges make a new optimizer"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """One step.

        Args:
            closure: clears the gradients, evaluates the model, calls `backward()` on the loss and returns it.
            loss: the loss whose gradients are in `p.grad`, if there is no closure.

        Returns:
            What the closure returned, or `loss`.

        Raises:
            ValueError: if the loss is not a scalar.
        """
        # While no pass is wanted there is none to read or to forget.
        recorder = self._recorder if self._recorder is not None and self._recorder.wanted else None
        if closure is not None and recorder is not None:
            recorder.renew()
        loss, told = (loss, None) if closure is None and loss is None else evaluated(closure, loss)
        try:
            with without_autocast(value for group in self.param_groups for value in group["params"]):
                self._step(told, recorder)
        finally:
            if recorder is not None:
                recorder.clear()
        return loss

    def _step(self, told: Tensor | None, recorder: PassRecorder | None) -> None:
        named, whole = self._parameters()
        held = {name: value for name, value in named.items() if trainable(value)}
        if not held:
            return
        alone = not replicated()
        if not alone:
            # Each rank has its own data: decisions by its loss or its pass would make the replicas differ.
            if told is not None:
                self._say("several processes train together: the loss that is given to steps is not read")
            told = None
        dtype = working_dtype(held)
        gradients = {name: raised(dense_gradient(value), dtype) for name, value in held.items()}
        if not _finite(told, gradients):
            self._skip(named)
            return
        self._in_a_row = 0
        evidence = Evidence()
        if alone and recorder is not None and recorder.last is not None:
            evidence = evidence_of(recorder, gradients)
        point = self._point(whole, gradients, evidence, told)
        rates = self._rates(named)
        self._recall(point, named)
        if not any(rates[name] for name in held) and not any(bool(each.any()) for each in gradients.values()):
            # So `torch.distributed.checkpoint` asks for a state before the first step: nothing is to be stepped. It
            # loads what has an entry then.
            self._keep(named)
            if not self.steps:
                self._fill(named, point)
            return
        due = [each for each, (left, _) in zip(self.symmetries, self._rests, strict=True) if not left]
        along = [each for each in due if self._may_move(each, named, point, rates)]
        # Without a pass only the weights tell the order of the layers.
        self.loop.symmetries = tuple(
            each
            for each in self.symmetries
            if (evidence.activations or not each.modules or self.meta.rule.reads_factors)
            and all(name in point.parameters for name in each.parameters)
        )
        recorded = None if recorder is None else recorder.last
        replays = 0 if recorded is None else recorded.replays
        fits = evidence.loss_fits or (self.deterministic and not evidence.checked)
        taken = self.loop.advance(point, told is not None, fits, along, finite=True)
        if recorded is not None and recorded.replays > replays:
            taken = dataclasses.replace(taken, evaluations=taken.evaluations + (recorded.replays - replays) / 3)
        if bool(taken.stayed):
            self.skipped += 1
            self._say("a learned step was not finite: it was left out, and is counted in `skipped`")
            taken = dataclasses.replace(taken, teleported=taken.parameters, moves=())
            if self.meta.teleporter is not None and self.loop.state is not None:
                places = self.meta.teleporter.refused(self.loop.state.teleporter)
                self.loop.state = dataclasses.replace(self.loop.state, teleporter=places)
        if self.deterministic and self.loop.state is not None and bool(self.loop.state.progress.row >= _TAKEN_BACK):
            self._say(
                f"{_TAKEN_BACK} steps in a row were taken back, as the loss rose each time: where steps see other "
                "data, or dropout, leave deterministic=True out"
            )
        self._go(taken, gradients, named, rates)
        self._keep(named)
        self._rest(taken)
        # The weights are in the model: keeping them here too would be a second copy.
        self.last_step = self.loop.last_step = dataclasses.replace(taken, parameters={}, teleported={})
        if self.model is not None and self.steps in (0, 10, 100) and bool(taken.size > 0) and is_averaged(self.model):
            self._say(
                "an AveragedModel averages the weights of this model: a mean of weights before and after a teleport is "
                "no mean of equal networks; average without teleports, symmetries=[]"
            )
        self.steps += 1

    def _rest(self, taken: Step) -> None:
        """Lets symmetries rest along which teleports are small, for one step, then two, and so on."""
        if not self._may_rest:
            return
        moves = {id(move.symmetry): move for move in taken.moves}
        sizes = [move.size.sum() / move.symmetry.dimension**0.5 for move in moves.values()]
        small = dict(zip(moves, (torch.stack(sizes) < _SMALL).tolist(), strict=True)) if sizes else {}
        rests = []
        for symmetry, (left, length) in zip(self.symmetries, self._rests, strict=True):
            if id(symmetry) not in small:
                rests.append((max(0, left - 1), length))
            else:
                next_rest = min(_LONGEST_REST, max(1, 2 * length)) if small[id(symmetry)] else 0
                rests.append((next_rest, next_rest))
        self._rests = rests
        if self._recorder is not None:
            self._recorder.wanted = not all(left for left, _ in rests)

    def _fill(self, named: Mapping[str, Tensor], point: Point) -> None:
        """Makes the entries of the state before the first step."""
        for name in point.gradients if self._bounds_steps else ():
            within(point.parameters[name], point.parameters[name], self.state[named[name]])
        packed = self.state_dict()["state"]
        for index, value in self._order():
            self.state[value] = dict(packed.get(index, {}))

    def _order(self) -> list[tuple[int, Tensor]]:
        """The parameters, by their numbers in a state dict."""
        return list(enumerate(value for group in self.param_groups for value in group["params"]))

    def _named(self, own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All parameters that it holds, by the model's names; the others by their place.

        Args:
            own: the model's parameters by their names, where they are at hand.
        """
        if own is None:
            own = {} if self.model is None else dict(self.model.named_parameters())
        known = {id(value): name for name, value in own.items()}
        named: dict[str, Tensor] = {}
        for number, group in enumerate(self.param_groups):
            own_names: list[Any] = [known.get(id(value)) for value in group["params"]]
            if None in own_names:
                others = group.get("param_names") or places(group["params"], number)
                own_names = [name or other for name, other in zip(own_names, others, strict=True)]
            named.update(zip(own_names, group["params"], strict=True))
        return named

    def _parameters(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All parameters that it holds, and those with all of the model's; a warning tells which are not trained."""
        own = {} if self.model is None else dict(self.model.named_parameters())
        named = self._named(own)
        whole = {**named, **own}
        self._say_what_is_new(whole, named)
        return named, whole

    def _point(self, whole: Mapping[str, Tensor], gradients: Tensors, evidence: Evidence, told: Tensor | None) -> Point:
        """Where the model stands, as a stack of one task; `whole` are all parameters, its own and the model's."""
        like = next(iter(gradients.values()))
        needed = dict.fromkeys(gradients)
        needed.update(dict.fromkeys(name for each in self.symmetries for name in each.parameters if name in whole))
        parameters = {name: master(whole[name], like.dtype, self.state.get(whole[name], {})) for name in needed}
        loss = like.new_ones(1)
        if told is not None or self.deterministic:
            # Copied: a later step may go back to this point, after the weights and gradients were overwritten.
            parameters = {name: value.clone() for name, value in parameters.items()}
            gradients = {name: value.clone() for name, value in gradients.items()}
        if told is not None:
            loss = told.to(loss).reshape(1)
        point = Point(parameters, gradients, evidence.activations, evidence.cotangents, loss=loss)
        recorder = self._recorder
        if evidence.activations and recorder is not None and recorder.replays and recorder.last is not None:
            fixed = {name: value.detach() for name, value in whole.items()}
            point = point.replace(pullback=stacked_pullback(recorder.pullback(recorder.last, fixed, gradients)))
        return point

    def _rates(self, named: Mapping[str, Tensor]) -> dict[str, float]:
        """The factor on the step of each parameter."""
        left = 1.0
        if self.total_steps is not None:
            left = 0.5 * (1 + math.cos(math.pi * min(1.0, self.steps / self.total_steps)))
            left = float(self.steps < self.total_steps) if self._told else left
            if self.steps >= self.total_steps:
                self._say(f"all of total_steps={self.total_steps} are taken: from now on no step moves anything")
        names = {id(value): name for name, value in named.items()}
        return {names[id(value)]: float(group["lr"]) * left for group in self.param_groups for value in group["params"]}

    def _say_what_is_new(self, whole: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
        """Warns of parameters that the model got after the optimizer was made: they are not trained."""
        if len(whole) == len(named):
            return
        held = {id(value) for value in named.values()}
        new = [name for name, value in whole.items() if id(value) not in held and value.grad is not None]
        if new:
            self._say(
                f"{new[0]!r} was added to the model after this optimizer was made and is not trained: give it to "
                "add_param_group"
            )

    def _may_move(
        self, symmetry: Symmetry, named: Mapping[str, Tensor], point: Point, rates: Mapping[str, float]
    ) -> bool:
        """Whether a teleport, or a gauge, may be taken along a symmetry in this step."""
        for name in symmetry.parameters:
            if name not in named or not named[name].requires_grad:
                what = "is frozen" if name in named else "is not held by this optimizer"
                self._say(f"{name!r} {what}: no teleport along {symmetry!r}, the others go on")
                return False
            if not rates[name] or name not in point.gradients:
                return False
        if any(name not in point.activations for name in symmetry.modules):
            self._say(
                "this step is taken without teleports, gauges and bounds on the curvature, as no recorded pass agrees "
                "with the gradients: that happens after several passes, with gradients clipped entry by entry, in "
                "compiled models and where several processes train together"
            )
            return False
        return symmetry.exactness == "exact" or point.pullback is not None

    def _go(self, taken: Step, gradients: Tensors, named: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Writes the step's weights into the model."""
        decay = {id(value): group["weight_decay"] for group in self.param_groups for value in group["params"]}
        moved = {name for move in taken.moves for name in move.symmetry.parameters}
        state = self.loop.state
        # Parameters without a gradient are not stepped: neither weight decay nor lr applies to them.
        stepped = set(gradients if state is None or state.accepted is None else state.accepted.gradients) | moved
        proposed, taken_squares = torch.zeros(()), torch.zeros(())
        as_they_are = []
        for name, value in taken.parameters.items():
            rate = rates.get(name, 0.0)
            if name not in named or name not in stepped or not (rate or name in moved):
                continue
            parameter, start = named[name], taken.teleported[name]
            goal = within(start, value, self.state[parameter]) if self._bounds_steps else value
            if self._bounds_steps:
                proposed = proposed + (value - start).square().sum()
                taken_squares = taken_squares + (rate * (goal - start)).square().sum()
            shrunk = rate * decay[id(parameter)]
            if rate != 1 or shrunk:
                write(parameter, (1 - shrunk) * start + rate * (goal - start), self.state[parameter])
            else:
                as_they_are.append((parameter, goal))
        write_all(as_they_are, self.state)
        if state is not None and state.stand_in is not None:
            # The stand-in must not make up for a step that lr has shortened on purpose.
            share = math.sqrt(float(taken_squares / proposed)) if float(proposed) else 0.0
            self.loop.state = dataclasses.replace(state, stand_in=dataclasses.replace(state.stand_in, factor=share))

    def _skip(self, named: Mapping[str, Tensor]) -> None:
        """Leaves out a step whose loss or gradient is not finite; a step that led there is taken back."""
        self.skipped += 1
        self._in_a_row += 1
        self._say(
            "a loss or a gradient was not finite, or its square was not: that step was left out, and is counted in "
            "`skipped`"
        )
        state = self.loop.state
        # One batch may be to blame; where the next one is no better, it is the step that led here.
        if state is None or state.accepted is None or self._in_a_row != _BLAMED:
            return
        progress, accepted = state.progress.judge(
            torch.full_like(state.progress.last, math.nan), state.deterministic, self.meta.rule.tolerance
        )
        teleporter = self.meta.teleporter
        places = state.teleporter if teleporter is None else teleporter.judged(state.teleporter, progress, accepted)
        self.loop.state = dataclasses.replace(state, progress=progress, teleporter=places)
        for name, value in state.accepted.parameters.items():
            if name in named and named[name].requires_grad:
                write(named[name], value, self.state[named[name]])

    def _recall(self, point: Point, named: Mapping[str, Tensor]) -> None:
        """Restricts the inner loop's state to the tensors of this step."""
        state = self.loop.state
        entries = {name: self.state[named[name]] for name in point.gradients}
        # A person may have cleared what is remembered of some tensors: they begin anew.
        if state is not None and self._same_as_before(state, point) and all(entries.values()):
            self.loop.state = dataclasses.replace(state, rule=known_state(self.meta.rule, state.rule, entries))
            return
        fresh = self.meta.initial_state(point, self.symmetries, self.deterministic)
        before, rest = self.loop.state, None
        working = fresh.progress.start.dtype
        if before is not None and before.progress.start.dtype != working:
            # The model has been moved to another precision.
            before = before.map(partial(_in_dtype, dtype=working))
            for kept in self.state.values():
                kept.update({key: _in_dtype(value, working) for key, value in kept.items()})
        if before is not None:
            rest = before.rule
        elif self._loaded:
            before = restored_parts(fresh, self._loaded)
            rest = unflattened(
                {key: value for key, value in fresh.rule.items() if key not in self.meta.rule.per_tensor},
                self._loaded,
                "rule",
            )
            self._loaded = {}
        if before is not None and before.accepted is not None and not before.accepted.gradients.keys() <= named.keys():
            # Of a model that has lost a parameter, or is called otherwise.
            before = dataclasses.replace(before, accepted=None)
        names = set(point.gradients)
        if before is not None and before.accepted is not None:
            names |= before.accepted.gradients.keys()
            if names != set(point.gradients):
                joined = {**before.accepted.gradients, **point.gradients}
                parameters = {**before.accepted.parameters, **point.parameters}
                fresh = dataclasses.replace(
                    fresh, rule=self.meta.rule.initial_state(point.replace(parameters=parameters, gradients=joined))
                )
        if rest is not None and self._stepped != frozenset(point.gradients):
            rest = {key: value for key, value in rest.items() if key not in self.meta.rule.void_on_change}
        rule = self.meta.rule
        if rest is not None and self._stepped is not None and any(not self.state[named[name]] for name in names):
            rest = {key: value for key, value in rest.items() if key not in rule.void_on_growth}
        self._stepped = frozenset(point.gradients)
        entries = {name: self.state[named[name]] for name in names}
        remembered = rule_state(rule, rest, entries, fresh.rule)
        if before is None:
            self.loop.state = dataclasses.replace(fresh, rule=remembered)
        else:
            teleporter = merged(fresh.teleporter, before.teleporter)
            gauge = merged(fresh.gauge, before.gauge)
            self.loop.state = dataclasses.replace(before, rule=remembered, teleporter=teleporter, gauge=gauge)

    def _same_as_before(self, state: MetaState, point: Point) -> bool:
        """Whether the tensors of this step are those of the last one, in the same precision."""
        names = point.gradients.keys()
        accepted = names if state.accepted is None else state.accepted.gradients.keys()
        same = self._stepped == names and accepted == names
        return same and point.loss is not None and state.progress.start.dtype == point.loss.dtype

    def _keep(self, named: Mapping[str, Tensor]) -> None:
        """Writes the state of each tensor to where `torch.optim` keeps it."""
        state = self.loop.state
        assert state is not None
        entries = {name: self.state[value] for name, value in named.items()}
        rest = update_entries(self.meta.rule, state.rule, entries)
        self.loop.state = dataclasses.replace(state, rule=rest)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(f"LearnedOptimizer: {text}", stacklevel=5)

    def state_dict(self) -> dict[str, Any]:
        """The state dict, of tensors only: the state of each parameter and, in the first one's entry, that of all of
        them together. The networks are in the checkpoint, not here.

        As in `torch.optim`, its tensors are those in use: `copy.deepcopy` it to keep it while training goes on.
        """
        packed = super().state_dict()
        if self.loop.state is None and not self._loaded and not self.skipped:
            return packed
        rest = dict(self._loaded) if self.loop.state is None else self._all_else()
        rest |= flattened({"steps": self.steps, "skipped": self.skipped, "rests": torch.tensor(self._rests)}, "count")
        rest["checkpoint"] = fingerprint(self.meta)
        parameters = [value for group in self.param_groups for value in group["params"]]
        entries = {index: dict(packed["state"].get(index, {})) for index in range(len(parameters))}
        first = next((index for index, value in enumerate(parameters) if value.requires_grad), 0)
        entries[first] |= {_OWN + path: value for path, value in rest.items()}
        for index, value in enumerate(parameters):
            if value.requires_grad:
                # What reads state dicts by parameter expects an entry for each.
                entries[index].setdefault("step", torch.tensor(float(self.steps)))
        packed["state"] = {index: each for index, each in entries.items() if each}
        return packed

    def _all_else(self) -> Tensors:
        """The state of all parameters together, which names parameters by their index."""
        state = self.loop.state
        assert state is not None
        if self.meta.rule.divides_by_loss and state.stand_in is None:
            # So that the entries are the same from the first step on, which `torch.distributed.checkpoint` goes by.
            like = state.progress.start
            change = {
                name: torch.zeros_like(raised(value.detach(), like.dtype)) for name, value in self._named().items()
            }
            state = dataclasses.replace(state, stand_in=dataclasses.replace(StandIn.none(like), change=change))
        rest = {**saved_parts(state), **flattened(state.rule, "rule")}
        numbers = {name: str(number) for number, name in enumerate(self._named())}
        return {renamed(path, numbers): value for path, value in rest.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict. The state of symmetries is converted at the next step.

        Raises:
            ValueError: if the parameters are not as many, or it is of another optimizer or checkpoint; at the next
                step, if it does not fit the model and its symmetries.
        """
        self._check_loaded(state_dict)
        super().load_state_dict(state_dict)
        given = state_dict["state"]
        loaded: dict[str, Tensor] = {}
        parameters = [value for group in self.param_groups for value in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(parameters, indices, strict=True):
            # The base class has cast moments to the parameter's dtype; those of half precision are wider.
            own = {key: value for key, value in given.get(index, {}).items() if key != "step"}
            loaded |= {key.removeprefix(_OWN): value.clone() for key, value in own.items() if key.startswith(_OWN)}
            kept = {
                key: value.detach().clone().to(parameter.device)
                for key, value in own.items()
                if not key.startswith(_OWN)
            }
            self.state.pop(parameter, None)
            if kept:
                self.state[parameter] = kept
        names = {str(number): name for number, name in enumerate(self._named())}
        loaded = {renamed(path, names): value for path, value in loaded.items() if path != "checkpoint"}
        self.steps = int(loaded.pop("count/steps", torch.tensor(0)))
        self.skipped = int(loaded.pop("count/skipped", torch.tensor(0)))
        rests = loaded.pop("count/rests", torch.zeros(0, 2)).tolist()
        # Of another model's symmetries they say nothing.
        same = len(rests) == len(self.symmetries)
        self._rests = [(int(left), int(length)) for left, length in rests] if same else [(0, 0)] * len(self.symmetries)
        self.loop.state, self.last_step, self._loaded = None, None, loaded
        self._stepped = None

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        """Raises a `ValueError` for the state dict of another optimizer, or of another checkpoint."""
        own = [each[_OWN + "checkpoint"] for each in state_dict["state"].values() if _OWN + "checkpoint" in each]
        foreign = any({"betas", "momentum"} & set(group) or "lr" not in group for group in state_dict["param_groups"])
        if foreign or (state_dict["state"] and not own):
            raise ValueError(
                "this state dict is not a LearnedOptimizer's, or is of a version whose state dicts no longer load: "
                "start a new optimizer from the saved weights"
            )
        if own and int(own[0]) != int(fingerprint(self.meta)):
            raise ValueError(
                "this state dict was saved with another checkpoint, whose networks have another state: make the "
                "optimizer with the checkpoint that it was saved with"
            )

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but the hooks, which a copy sets on its own model."""
        return {**self.__dict__, "_recorder": None, "_zero_grad_profile_name": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._record()

    def __repr__(self) -> str:
        groups = "".join(
            f"\n    group {number}: {len(group['params'])} parameters, lr={group['lr']}, "
            f"weight_decay={group['weight_decay']}"
            for number, group in enumerate(self.param_groups)
        )
        return f"LearnedOptimizer({self.meta.config.mode}, {len(self.symmetries)} symmetries{groups}\n)"


def places(parameters: Sequence[Tensor], number: int) -> list[str]:
    """Names for the parameters of a group that has none: a vector behind a matrix of as many rows is its bias.

    Example:
        >>> places([torch.ones(3, 2), torch.ones(3), torch.ones(2, 3)], 0)
        ['0.0.weight', '0.0.bias', '0.2.weight']
    """
    names: list[str] = []
    for index, value in enumerate(parameters):
        before = parameters[index - 1] if index else None
        if before is not None and value.ndim == 1 and before.ndim > 1 and before.shape[0] == value.shape[0]:
            names.append(f"{number}.{index - 1}.bias")
        else:
            names.append(f"{number}.{index}.weight")
    return names


def _check_numbers(lr: Any, weight_decay: Any) -> None:
    for name, value, what in (("lr", lr, "a factor on the learned step"), ("weight_decay", weight_decay, "a share")):
        if not 0 <= as_number(value) < math.inf:
            raise ValueError(f"{name} is {what}, a number of at least zero; not {value!r}")


def _meta_optimizer(checkpoint: Any) -> tuple[MetaOptimizer, str, Mapping[str, Any]]:
    """The meta-optimizer, what it is called, and what its card says that it is made for."""
    if isinstance(checkpoint, MetaOptimizer):
        return checkpoint, "this meta-optimizer", {}
    service = getattr(checkpoint, "service", None)
    if service is not None:
        # What `metateleport.connect` gave: its networks run elsewhere.
        return service.meta_optimizer(), repr(service.name), service.made_for
    from metateleport.checkpoint import Checkpoint, load_checkpoint, meta_optimizer_of

    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    return meta_optimizer_of(loaded), repr(loaded.name), loaded.card.get("made_for", {})


def _in_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """In the working precision what was in another one."""
    return value.to(dtype) if value.dtype in (torch.float32, torch.float64) else value


def _finite(told: Tensor | None, gradients: Tensors) -> bool:
    values = list(gradients.values())
    finite = surely_finite(values, squares=True) or bool(squarable(values).all())
    return finite and (told is None or bool(told.to(values[0]).isfinite()))
