"""Meta-learners that teleport their fast weights inside the inner loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metateleport.capture import modules_of, record
from metateleport.detection.chain import symmetries_of
from metateleport.families import TaskStack, stacked_name
from metateleport.fewshot.learn2learn import learn2learn
from metateleport.fewshot.plain import maml, meta_sgd
from metateleport.point import Point, Tensors, pullback_through
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move, Teleporter, travel
from metateleport.teleporters.base import Chosen

__all__ = ["TeleportingLearner", "TeleportingMAML", "TeleportingMetaSGD"]

Rates = Literal["keep", "transport"]


class TeleportingLearner(nn.Module):
    r"""A learn2learn meta-learner that teleports its fast weights $w$ in the inner loop.

    Every `every`-th step, the first included, goes from $w$ to $g \cdot w$ before the gradient step is taken there,

    $$w \leftarrow g \cdot w - \eta\, \nabla L(g \cdot w), \qquad g = \exp(T),$$

    where the gradient at $g \cdot w$ is carried along from $w$, so that an exact teleport costs no evaluation. The
    meta-gradient passes through the action and the exponential, and with `through_choice` through the choice $T(w)$
    too. In first order the gradient is a constant, but the action is still differentiated: the meta-gradient is pulled
    back by
    $g$.

    Made by `TeleportingMAML` and `TeleportingMetaSGD`. Used as learn2learn's learners are, one clone a task:

        learner = meta.clone()
        for _ in range(steps):
            learner.adapt(loss(learner(support), targets))
        loss(learner(query), query_targets).backward()

    Args:
        learner: a `learn2learn.algorithms.MAML` or `MetaSGD`.
        teleporter: chooses the group elements.
        symmetries: those to move along, in the order of the data flow; found if not given, in an `nn.Sequential`.
        every: teleport before every `every`-th step.
        through_choice: differentiate the choice of the generator too, where the teleporter leaves it in the graph
            (`UnrolledAscentTeleporter`, `LearnedTeleporter(detach=...)`). A learned teleporter's own networks then are
            among the parameters, and are meta-learned with the start.

    Raises:
        ValueError: if `every` is below one, a symmetry moves buffers, or the learner is of another kind.
    """

    def __init__(
        self,
        learner: Any,
        teleporter: Teleporter,
        symmetries: Sequence[Symmetry] | None = None,
        every: int = 1,
        through_choice: bool = False,
    ) -> None:
        super().__init__()
        algorithms = learn2learn().algorithms
        if not isinstance(learner, (algorithms.MAML, algorithms.MetaSGD)):
            raise ValueError(f"a teleporting learner wraps a MAML or a MetaSGD, not a {type(learner).__name__}")
        if every < 1:
            raise ValueError(f"every counts steps between teleports: at least 1, not {every!r}")
        if symmetries is None:
            symmetries = symmetries_of(learner.module)
        with_buffers = [each for each in symmetries if each.buffers]
        if with_buffers:
            raise ValueError(
                f"{with_buffers[0]!r} moves buffers, which learn2learn's clones share: put the model into evaluation "
                "mode and leave that symmetry out"
            )
        self.learner = learner
        self.symmetries = tuple(symmetries)
        self.every, self.through_choice = every, through_choice
        # In a tuple a learned teleporter's networks are not this module's own.
        self._teleporter = (teleporter,)
        if through_choice and isinstance(teleporter, nn.Module):
            self.networks = teleporter
        self._seen: _Seen | None = None
        self._state: Any = None
        self.steps = 0
        """Steps adapted since the clone was made."""
        self.moves: list[Move] = []
        """What the last teleport did, by symmetry."""
        self.evaluations: float | Tensor = 0.0
        """Gradient evaluations that adapting has spent; `(tasks,)` on a stack."""

    @property
    def teleporter(self) -> Teleporter:
        """What chooses the group elements."""
        return self._teleporter[0]

    @property
    def module(self) -> nn.Module:
        """The model, at the fast weights in a clone."""
        return self.learner.module

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's outputs; on a stack, its losses. The last pass with gradients is the one that adapts."""
        if not torch.is_grad_enabled():
            return self.learner(*inputs, **keywords)
        module = self.module
        if isinstance(module, TaskStack):
            found = module(*inputs, **keywords, probe=True)
            self._seen = _Seen(found.parameters, found.activations, found.probes, found.layout, found.losses)
            return found.losses
        # The model goes on with a copy: an activation in place would turn the recorded output into its own.
        with record(module, modules_of(self.symmetries), lambda _, output: output.clone()) as recording:
            outputs = self.learner(*inputs, **keywords)
        parameters: Tensors = dict(module.named_parameters())
        self._seen = _Seen(parameters, recording.activations(), recording.outputs, recording.layout, None)
        return outputs

    def clone(self) -> TeleportingLearner:
        """A learner of one task, in the graph of this one's parameters; it has not adapted yet."""
        cloned = type(self).__new__(type(self))
        TeleportingLearner.__init__(
            cloned, self.learner.clone(), self.teleporter, self.symmetries, self.every, self.through_choice
        )
        return cloned

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """Takes one step of the inner loop, with a teleport before every `every`-th one.

        Args:
            loss: of the last forward pass; on a stack, the sum of the losses.
            first_order: as the learner was made if not given.

        Raises:
            RuntimeError: if there was no forward pass, or the loss does not come from the last one.
        """
        first_order = self.learner.first_order if first_order is None else first_order
        start = self._point(loss, second_order=not first_order)
        arrived, self.moves = start, []
        if self.steps % self.every == 0:
            arrived, self.moves, self._state = travel(
                self._choosing(), start, self.symmetries, self._state_at(start), allowed=None
            )
            self._install(start, arrived)
        self._step(arrived)
        spent = sum((move.evaluations for move in self.moves), start=torch.ones(()))
        self.evaluations = self.evaluations + spent.detach()
        self.steps += 1
        self._seen = None

    def _update(self, gradients: list[Tensor | None]) -> None:
        """Takes learn2learn's own step with gradients in the order of the module's parameters."""
        algorithms = learn2learn().algorithms
        if isinstance(self.learner, algorithms.MetaSGD):
            self.learner.module = algorithms.meta_sgd_update(self.module, self.learner.lrs, gradients)
        elif isinstance(self.learner, algorithms.MAML):
            self.learner.module = algorithms.maml_update(self.module, self.learner.lr, gradients)
        else:
            raise ValueError(f"a teleporting learner wraps a MAML or a MetaSGD, not a {type(self.learner).__name__}")

    def _step(self, arrived: Point) -> None:
        self._update([arrived.gradients.get(name) for name in self._names()])

    def _names(self) -> tuple[str, ...]:
        """Names of the parameters, in the module's order, as symmetries call them."""
        module = self.module
        return module.names if isinstance(module, TaskStack) else tuple(n for n, _ in module.named_parameters())

    def _point(self, loss: Tensor, second_order: bool) -> Point:
        seen = self._seen
        if seen is None:
            raise RuntimeError("call the learner on the inputs, with gradients on, before adapt(loss)")
        if seen.losses is not None and not torch.allclose(seen.losses.detach().sum(), loss.detach()):
            raise RuntimeError(
                "on a stack adapt() needs the sum of the losses, so that the tasks' steps are independent"
            )
        wanted = {name: value for name, value in seen.parameters.items() if value.requires_grad}
        watched = {name: value for name, value in seen.outputs.items() if value.requires_grad}
        targets = [*wanted.values(), *watched.values()]
        # Batch pairs rebuild part of this backward pass, so its graph has to stay.
        found = torch.autograd.grad(loss, targets, retain_graph=True, create_graph=second_order, allow_unused=True)
        on_outputs = dict(zip(watched, found[len(wanted) :], strict=True))
        unseen = [name for name, gradient in on_outputs.items() if gradient is None]
        if unseen:
            raise RuntimeError(
                f"the loss does not depend on the outputs of {unseen[0]!r} in the learner's last forward pass: give "
                "adapt() the loss of that pass"
            )
        return Point(
            parameters=dict(seen.parameters),
            gradients={n: grad for n, grad in zip(wanted, found, strict=False) if grad is not None},
            activations=seen.activations,
            cotangents=seen.layout({name: grad for name, grad in on_outputs.items() if grad is not None}),
            loss=loss if seen.losses is None else seen.losses,
            pullback=pullback_through(seen.activations, wanted, watched, seen.layout),
        )

    def _choosing(self) -> Teleporter:
        return self.teleporter if self.through_choice else _Detached(self.teleporter)

    def _state_at(self, point: Point) -> Any:
        """The teleporter's state, updated with the task's loss."""
        state = self._state
        if point.loss is not None and state is not None:
            state = self.teleporter.told(state, point.loss.detach(), deterministic=True)
        return state

    def _install(self, start: Point, arrived: Point) -> None:
        """Replaces the fast weights that have moved, as learn2learn's updates do: tensors, not values."""
        module = self.module
        for name, value in arrived.parameters.items():
            if value is start.parameters[name]:
                continue
            if isinstance(module, TaskStack):
                module._parameters[stacked_name(name)] = value  # type: ignore[assignment]
            else:
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._parameters[leaf] = value  # type: ignore[assignment]


class TeleportingMAML(TeleportingLearner):
    r"""learn2learn's MAML with teleports in its inner loop; see `TeleportingLearner`.

    A teleport changes the step whenever $g$ is not a rotation: moved back to its start, one step with a linear action
    $w \mapsto A w$ is $w - \eta\,(A^\top A)^{-1} G$.

    Args:
        model: the model at the start.
        lr: $\eta$.
        teleporter: chooses the group elements.
        symmetries: those to move along; found by themselves in `nn.Sequential`.
        first_order: take the gradients of the inner loop as constants.
        every: teleport before every so many steps.
        through_choice: differentiate the choice of the generator too.

    Raises:
        MissingLearn2Learn: if learn2learn is not installed.
        Unsuitable: if no symmetry is given and none is found.

    Example:
        >>> from metateleport import RandomTeleporter
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> meta = TeleportingMAML(model, 0.1, RandomTeleporter(size=0.5, seed=0))
        >>> learner = meta.clone()
        >>> learner.adapt(learner(torch.ones(5, 3)).square().mean())
        >>> learner(torch.ones(5, 3)).square().mean().backward()
        >>> model[0].weight.grad.shape
        torch.Size([4, 3])

    Source: Finn, Abbeel and Levine, ICML 2017 (arXiv 1703.03400), for MAML; Zhao et al., ICLR 2024 (arXiv
    2305.13404), section 5, for teleporting inside a learned optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        teleporter: Teleporter,
        symmetries: Sequence[Symmetry] | None = None,
        first_order: bool = False,
        every: int = 1,
        through_choice: bool = False,
    ) -> None:
        super().__init__(maml(model, lr, first_order), teleporter, symmetries, every, through_choice)


class TeleportingMetaSGD(TeleportingLearner):
    r"""learn2learn's Meta-SGD with teleports in its inner loop; see `TeleportingLearner`.

    Learning rates $\alpha$, one for each parameter, are a diagonal metric. With `rates="transport"` a diagonal action
    $w \mapsto A w$ moves them too, $\alpha \mapsto A^2 \alpha$. The step is then the same as without the teleport,
    carried along, so that teleports have no effect; the option exists to show that. With `rates="keep"` a teleport
    acts as a factor
    $A^{-2}$ on the rates, chosen for every task. Under GL(k) a diagonal metric would become a full one, which rates by
    parameter cannot represent: there rates can only be kept.

    Args:
        model: the model at the start.
        lr: the initial value of every learning rate.
        teleporter: chooses the group elements.
        symmetries: those to move along; found by themselves in `nn.Sequential`.
        first_order: take the gradients of the inner loop as constants.
        every: teleport before every so many steps.
        through_choice: differentiate the choice of the generator too.
        rates: whether a teleport moves the learning rates, `keep` or `transport`.

    Raises:
        MissingLearn2Learn: if learn2learn is not installed.
        Unsuitable: if no symmetry is given and none is found.
        ValueError: if rates are to be transported and a symmetry's group is not diagonal.

    Example:
        >>> from metateleport import RandomTeleporter
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> meta = TeleportingMetaSGD(model, 0.1, RandomTeleporter(size=0.5, seed=0))
        >>> learner = meta.clone()
        >>> learner.adapt(learner(torch.ones(5, 3)).square().mean())
        >>> float(learner.evaluations)
        1.0

    Source: Li, Zhou, Chen and Li, 2017 (arXiv 1707.09835), for Meta-SGD.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        teleporter: Teleporter,
        symmetries: Sequence[Symmetry] | None = None,
        first_order: bool = False,
        every: int = 1,
        through_choice: bool = False,
        rates: Rates = "keep",
    ) -> None:
        super().__init__(meta_sgd(model, lr, first_order), teleporter, symmetries, every, through_choice)
        if rates not in ("keep", "transport"):
            raise ValueError(f"rates are kept or transported: 'keep' or 'transport', not {rates!r}")
        other = [each for each in self.symmetries if len(each.group.shape) != 1]
        if rates == "transport" and other:
            raise ValueError(
                f"{other[0]!r} has no diagonal group: learning rates by parameter cannot be carried along it, keep them"
            )
        self.rates = rates

    def clone(self) -> TeleportingLearner:
        cloned = super().clone()
        assert isinstance(cloned, TeleportingMetaSGD)
        cloned.rates = self.rates
        return cloned

    def _step(self, arrived: Point) -> None:
        if self.rates == "transport":
            rates = dict(zip(self._names(), self.learner.lrs, strict=True))
            for move in self.moves:
                # Second moments move with the inverse square: what the inverse element does to them.
                inverse = move.symmetry.group.inverse(move.element)
                rates.update(move.symmetry.carry_squares(inverse, rates, arrived).tensors)
            self.learner.lrs = list(rates.values())
        super()._step(arrived)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The last forward pass, in its graph; `losses` are a stack's."""

    parameters: Tensors
    activations: Tensors
    outputs: Tensors
    layout: Callable[[Mapping[str, Tensor]], Tensors]
    losses: Tensor | None


class _Detached(Teleporter):
    """A teleporter whose choice is a constant."""

    def __init__(self, teleporter: Teleporter) -> None:
        super().__init__(teleporter.trust_region)
        self.name, self.needs_gradient = teleporter.name, teleporter.needs_gradient
        self.teleporter = teleporter

    def initial_state(self, point: Point, symmetries: Sequence[Symmetry]) -> Any:
        return self.teleporter.initial_state(point.detach(), symmetries)

    def evaluations(self, symmetry: Symmetry, point: Point) -> float:
        return self.teleporter.evaluations(symmetry, point)

    def choose(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Tensor | Chosen, Any]:
        with torch.no_grad():
            chosen, state = self.teleporter.choose(symmetry, point, state)
        if isinstance(chosen, Tensor):
            return chosen.detach(), state
        return chosen._replace(element=chosen.element.detach(), size=chosen.size.detach()), state
