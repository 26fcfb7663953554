"""The learned optimizer in the style of `torch.optim`, for one model and for a stack of tasks."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.capture import PassRecorder, RecordedPass, modules_of
from metateleport.detect import symmetries_of
from metateleport.detection import exact_symmetries
from metateleport.learned.meta_optimizer import MetaOptimizer, MetaState, Step
from metateleport.optim.saved import plain, restored
from metateleport.optim.start import start_of
from metateleport.point import Point, Tensors
from metateleport.stack import StackedModel
from metateleport.symmetries import Symmetry
from metateleport.teleporters import NoTeleport, Teleporter

__all__ = ["LearnedOptimizer", "StackOptimizer"]

_OWN = "learned"
_KEPT = ("parameters", "gradients", "activations", "cotangents", "loss")


def _parts(state: MetaState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("progress", "teleporter", "rule", "gauge")}


class _MetaSteps(torch.optim.Optimizer, abc.ABC):
    """A `torch.optim.Optimizer` whose step is the meta-optimizer's."""

    def __init__(
        self,
        parameters: Iterator[nn.Parameter],
        meta: MetaOptimizer,
        symmetries: Sequence[Symmetry],
        deterministic: bool,
        teleporter: Teleporter | None,
    ) -> None:
        super().__init__(list(parameters), {})
        self.meta = meta
        self.symmetries = tuple(symmetries)
        self.deterministic = deterministic
        self.teleporter = teleporter
        self.first_order = False
        self.meta_state: MetaState | None = None
        self.last_step: Step | None = None
        self._loaded: Any = None

    def state_dict(self) -> dict[str, Any]:
        """The state dict; its entry `learned` has what the meta-optimizer remembers, the last accepted point included,
        so that a run that goes on from it takes the same steps. The networks are in the checkpoint, not here."""
        return {**super().state_dict(), _OWN: self._saved()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave; without its entry `learned` the next step is a first one.

        A state that does not fit the model and its symmetries raises a `ValueError` at the next step, which is the
        first to see them.

        Raises:
            ValueError: if the parameters are not as many.
        """
        super().load_state_dict(state_dict)
        self.meta_state, self._loaded = None, state_dict.get(_OWN)

    def _saved(self) -> Any:
        # What was loaded takes its form at the next step; until then it is passed on as it is.
        state = self.meta_state
        if state is None:
            return self._loaded
        accepted = None if state.accepted is None else {name: plain(getattr(state.accepted, name)) for name in _KEPT}
        return {"accepted": accepted, **plain(_parts(state))}

    def _restored(self, fresh: MetaState, saved: Any) -> MetaState:
        parts = _parts(fresh)
        # A state saved before gauges were part of it has none: its gauges begin anew.
        saved = {"gauge": plain(fresh.gauge), **saved}
        found = restored(parts, {name: saved[name] for name in parts}, _OWN)
        accepted = None
        if saved["accepted"] is not None:
            where = fresh.progress.start.device
            accepted = Point(**saved["accepted"]).map(lambda value: value.to(where))
        return dataclasses.replace(fresh, accepted=accepted, **found)

    def _take(self, point: Point, instead: Teleporter | None = None) -> Tensors:
        """The parameters to go to from a stacked point; `instead` takes the teleporter's place in this step."""
        if self.meta_state is None:
            fresh = self.meta.initial_state(point, self.symmetries, self.deterministic, self.teleporter)
            self.meta_state = fresh if self._loaded is None else self._restored(fresh, self._loaded)
            self._loaded = None
        self.last_step = self.meta.step(point, self.symmetries, self.meta_state, instead or self.teleporter)
        self.meta_state = self.last_step.state
        return self.last_step.parameters


class StackOptimizer(_MetaSteps):
    """A meta-optimizer over a `StackedModel`: the optimizer whose differentiable twin is registered with `higher`.

    Args:
        model: the stack.
        meta: the meta-optimizer.
        deterministic: whether every evaluation sees the same data.
        teleporter: takes the place of the learned one (attribution).

    Example:
        >>> stack = StackedModel([nn.Linear(2, 1)], nn.functional.mse_loss)
        >>> from metateleport.learned import MetaOptimizerConfig
        >>> optimizer = StackOptimizer(stack, MetaOptimizer(MetaOptimizerConfig(mode="lr", hidden=4)))
        >>> batch = (torch.ones(1, 4, 2),), (torch.zeros(1, 4, 1),)
        >>> optimizer.step(lambda: stack(batch, probe=True)).shape
        torch.Size([1])
    """

    def __init__(
        self, model: StackedModel, meta: MetaOptimizer, deterministic: bool = True, teleporter: Teleporter | None = None
    ) -> None:
        super().__init__(model.parameters(), meta, model.symmetries, deterministic, teleporter)
        self.model = model

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One step on every task.

        Args:
            closure: runs the stack with `probe=True` and returns its losses; no backward pass is needed.

        Returns:
            The losses before the step, `(tasks,)`.

        Raises:
            RuntimeError: without a closure, or if it does not probe the stack.
        """
        if closure is None:
            raise RuntimeError("a stack's step needs a closure that runs it with probe=True and returns the losses")
        with torch.enable_grad():
            losses = closure()
        if self.model.evaluation is None:
            raise RuntimeError("the closure has to run the stack with probe=True")
        with torch.no_grad():
            point = self.model.evaluation.point(in_graph=False)
            # Copies, as the point is remembered and the parameters are overwritten.
            point = point.update({name: value.clone() for name, value in point.parameters.items()})
            self.model.load(self._take(point))
        return losses.detach()


class LearnedOptimizer(_MetaSteps):
    """Trains a model with a learned meta-optimizer: the learned step, and the learned teleport where it has one.

    Like L-BFGS it takes back a step that made the loss worse, so it needs a closure. The loss of a fixed data set is
    compared exactly, that of minibatches (`deterministic=False`) with its running mean and spread.

    A teleport along a batch-exact symmetry rebuilds part of the backward pass, from the last forward pass. Where the
    gradients are not that pass's alone (summed over several batches, clipped entry by entry) the step goes without
    the teleport.

    Args:
        model: the model to train.
        checkpoint: a checkpoint's name or path, a loaded checkpoint or a `MetaOptimizer`.
        symmetries: of the model, in the order of the data flow; found in it if not given.
        deterministic: whether every call of the closure evaluates the same data.
        example_input: a tensor, a tuple or a dict of keyword inputs: finds the symmetries of any model, not only of
            an `nn.Sequential`.

    Raises:
        ValueError: if a symmetry names parameters that the model does not have.
        metateleport.checkpoint.CheckpointError: if the checkpoint cannot be loaded or has no learned step.

    Example:
        >>> from metateleport.learned import MetaOptimizerConfig
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 1))
        >>> optimizer = LearnedOptimizer(model, MetaOptimizer(MetaOptimizerConfig(hidden=4)))
        >>> x = torch.ones(5, 3)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(x).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> first = optimizer.step(closure)
        >>> for _ in range(5):
        ...     last = optimizer.step(closure)
        >>> bool(last < first)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Any,
        symmetries: Sequence[Symmetry] | None = None,
        deterministic: bool = True,
        example_input: Any = None,
    ) -> None:
        meta = checkpoint if isinstance(checkpoint, MetaOptimizer) else _loaded(checkpoint)
        if symmetries is None and example_input is None:
            symmetries = symmetries_of(model)
        elif symmetries is None:
            symmetries = exact_symmetries(model, example_input, buffers=False)
        symmetries = tuple(symmetries)
        named = dict(model.named_parameters())
        for symmetry in symmetries:
            if symmetry.buffers:
                raise ValueError(f"{symmetry!r} moves a buffer, and an optimizer moves parameters: leave it out")
            unknown = [name for name in symmetry.parameters if name not in named]
            if unknown:
                raise ValueError(f"{symmetry!r} moves {unknown[0]!r}, which the model does not have")
        trained = [value for value in named.values() if value.requires_grad]
        super().__init__(iter(trained), meta, symmetries, deterministic, None)
        self.model = model
        device = next(iter(named.values())).device
        self.meta = meta.to(device)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: clears the gradients, evaluates the model, calls `backward()` on the loss and returns it.

        Returns:
            The loss before the step.

        Raises:
            RuntimeError: without a closure, or if it did not run the model or left no gradients.
            ValueError: if the closure returns something other than a scalar.
        """
        if closure is None:
            raise RuntimeError(
                "a learned optimizer judges its last step by the loss: call step(closure), where closure() clears "
                "the gradients, evaluates the model, calls backward() and returns the loss"
            )
        watch = PassRecorder(self.model, modules_of(self.symmetries))
        try:
            with torch.enable_grad():
                loss = torch.as_tensor(closure()).detach()
            if loss.numel() != 1:
                raise ValueError(f"the closure has to return a scalar loss; it returned shape {tuple(loss.shape)}")
            if watch.last is None:
                raise RuntimeError("the closure did not run the model that this optimizer was made for")
            with torch.no_grad():
                self._step(watch, watch.last, loss.reshape(()))
        finally:
            watch.close()
        return loss

    def _step(self, watch: PassRecorder, caught: RecordedPass, loss: Tensor) -> None:
        named = dict(self.model.named_parameters())
        begun = start_of(watch, caught, named, self.symmetries, loss)
        point, reason = begun.point, begun.reason or "; ".join(begun.left_out)
        if not point.gradients:
            raise RuntimeError("the closure left no gradients: it has to call backward() on the loss that it returns")
        if not point.cotangents:
            point = point.replace(cotangents=watch.cotangents(caught))
        replays = caught.replays
        moved = self._take(_stack_of_one(point), NoTeleport() if reason else None)
        if self.last_step is not None and caught.replays > replays:
            evaluations = self.last_step.evaluations + (caught.replays - replays) / 3
            self.last_step = dataclasses.replace(self.last_step, evaluations=evaluations)
        for name, value in named.items():
            if value.requires_grad:
                value.copy_(moved[name][0])


def _stack_of_one(point: Point) -> Point:
    """Copies of a point's tensors with a task dimension in front; its backward pass is rebuilt through the same."""
    stacked = point.map(lambda value: value.detach().clone().unsqueeze(0))
    single = point.pullback
    if single is None:
        return stacked

    def pullback(module: str, cotangent: Tensor) -> tuple[Tensors, Tensors]:
        gradients, cotangents = single(module, cotangent.squeeze(0))
        return _unsqueezed(gradients), _unsqueezed(cotangents)

    return stacked.replace(pullback=pullback)


def _unsqueezed(tensors: Tensors) -> Tensors:
    return {name: value.unsqueeze(0) for name, value in tensors.items()}


def _loaded(checkpoint: Any) -> MetaOptimizer:
    from metateleport.checkpoint import meta_optimizer_of

    return meta_optimizer_of(checkpoint)
