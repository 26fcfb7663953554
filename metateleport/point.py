"""A point on the loss surface: parameters, and what the last evaluation said there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Point", "Tensors", "lasting", "made_of", "pullback_through"]

Tensors = dict[str, Tensor]
Made = TypeVar("Made")

_MADE = "_made_of_it"
"""Attribute of a lasting tensor: what was made of it, by name. It goes when the tensor goes."""


def lasting(tensor: Tensor) -> Tensor:
    """Marks data that come back unchanged at every evaluation, so that what is made of them is made once (`made_of`).

    Example:
        >>> calls = []
        >>> rows = lasting(torch.ones(2, 3))
        >>> for _ in range(3):
        ...     total = made_of(rows, "total", lambda: calls.append(1) or rows.sum())
        >>> len(calls), total
        (1, tensor(6.))
    """
    if not hasattr(tensor, _MADE):
        setattr(tensor, _MADE, {})
    return tensor


def made_of(tensor: Tensor, what: str, make: Callable[[], Made]) -> Made:
    """What `make` makes of a tensor; of a lasting one, what it made the first time.

    Args:
        tensor: what it is made of, alone.
        what: its name among all that is made of tensors.
        make: makes it.
    """
    known: dict[str, Made] | None = getattr(tensor, _MADE, None)
    # What is made inside of a function transform (`torch.func`) may be of its level, and void once that is left.
    if known is None or torch._C._functorch.peek_interpreter_stack() is not None:
        return make()
    if what not in known:
        known[what] = make()
    return known[what]


@dataclasses.dataclass(frozen=True)
class Point:
    """Parameters together with the loss, gradients and layer quantities that an evaluation gave at them.

    A symmetry moves the whole point, not only its parameters: what is known at one place of the orbit is carried to
    the other, so that after an exact teleport no second gradient is needed. Every tensor may have batch dimensions
    in front (stacked tasks), the same for all.

    Args:
        parameters: by name, as in `named_parameters()`, and the buffers that a symmetry moves.
        gradients: of the loss, by parameter name.
        activations: the input of a module by the module's name, its samples in rows: `(*batch, samples, features)`.
        cotangents: the gradient of the loss with respect to a module's output, by module name, in the same layout.
        loss: the loss, `(*batch,)`; None where it was not seen.
        pullback: maps a module's name and a cotangent on that module's input to the gradients of all parameters
            below it and the cotangents of all modules below it; None where the graph is gone.
        stale: names of the parameters whose gradient a teleport has made wrong and nothing has rebuilt.
        loss_at: maps parameters by name to the loss there, `(*batch,)`, on the data of this evaluation and in the
            graph; None where the loss is not known as a function.

    Example:
        >>> point = Point(parameters={"weight": torch.zeros(2, 3)})
        >>> point.replace(loss=torch.tensor(1.0)).loss
        tensor(1.)
    """

    parameters: Tensors
    gradients: Tensors = dataclasses.field(default_factory=dict)
    activations: Tensors = dataclasses.field(default_factory=dict)
    cotangents: Tensors = dataclasses.field(default_factory=dict)
    loss: Tensor | None = None
    pullback: Callable[[str, Tensor], tuple[Tensors, Tensors]] | None = None
    stale: frozenset[str] = frozenset()
    loss_at: Callable[[Mapping[str, Tensor]], Tensor] | None = None

    def replace(self, **changes: object) -> Point:
        """A copy with the given fields exchanged."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def update(
        self,
        parameters: Mapping[str, Tensor] | None = None,
        gradients: Mapping[str, Tensor] | None = None,
        activations: Mapping[str, Tensor] | None = None,
        cotangents: Mapping[str, Tensor] | None = None,
        stale: frozenset[str] | None = None,
    ) -> Point:
        """A copy with some entries of its dictionaries exchanged."""
        return dataclasses.replace(
            self,
            parameters={**self.parameters, **(parameters or {})},
            gradients={**self.gradients, **(gradients or {})},
            activations={**self.activations, **(activations or {})},
            cotangents={**self.cotangents, **(cotangents or {})},
            stale=self.stale if stale is None else stale,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Point:
        """Applies `function` to every tensor; the graph behind the point is let go."""
        return dataclasses.replace(
            self,
            parameters={name: function(value) for name, value in self.parameters.items()},
            gradients={name: function(value) for name, value in self.gradients.items()},
            activations={name: function(value) for name, value in self.activations.items()},
            cotangents={name: function(value) for name, value in self.cotangents.items()},
            loss=None if self.loss is None else function(self.loss),
            pullback=None,
        )

    def detach(self) -> Point:
        """The same point without its graph."""
        return self.map(lambda value: value if hasattr(value, _MADE) else value.detach())

    def choose(self, mask: Tensor, other: Point) -> Point:
        """This point where `mask` is true, `other` elsewhere; `mask` has the batch dimensions.

        The graph behind the result is this point's: what `pullback` gives is right only for the tasks chosen here.
        """

        def pick(mine: Tensors, theirs: Tensors) -> Tensors:
            return {name: _where(mask, value, theirs[name]) for name, value in mine.items() if name in theirs}

        loss = None
        if self.loss is not None and other.loss is not None:
            loss = torch.where(mask, self.loss, other.loss)
        return Point(
            parameters=pick(self.parameters, other.parameters),
            gradients=pick(self.gradients, other.gradients),
            activations=pick(self.activations, other.activations),
            cotangents=pick(self.cotangents, other.cotangents),
            loss=loss,
            pullback=self.pullback,
            stale=self.stale | other.stale,
            loss_at=self.loss_at,
        )

    def squared_gradient_norm(self, names: frozenset[str] | None = None) -> Tensor:
        """Sum of the squared gradients, over all parameters or those named, `(*batch,)`."""
        batch = 0 if self.loss is None else self.loss.ndim
        total: Tensor | float = 0.0
        for name, gradient in self.gradients.items():
            if names is None or name in names:
                squares = torch.view_as_real(gradient).square().sum(-1) if gradient.is_complex() else gradient.square()
                total = total + squares.reshape(*gradient.shape[:batch], -1).sum(-1)
        return torch.as_tensor(total)


def pullback_through(
    activations: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    layout: Callable[[Mapping[str, Tensor]], Tensors],
) -> Callable[[str, Tensor], tuple[Tensors, Tensors]]:
    """Makes a point's `pullback` from the graph of a forward pass.

    Args:
        activations: inputs of modules, in the graph.
        parameters: what the gradients are taken of.
        outputs: outputs of modules (or what was added to them), for the cotangents.
        layout: lays gradients on outputs out as cotangents.
    """
    targets = [*parameters.values(), *outputs.values()]

    def pullback(module: str, cotangent: Tensor) -> tuple[Tensors, Tensors]:
        if not activations[module].requires_grad:
            return {}, {}
        found = torch.autograd.grad(
            activations[module],
            targets,
            cotangent,
            create_graph=torch.is_grad_enabled(),
            retain_graph=True,
            allow_unused=True,
        )
        lower = {name: grad for name, grad in zip(parameters, found, strict=False) if grad is not None}
        on_outputs = zip(outputs, found[len(parameters) :], strict=True)
        return lower, layout({name: grad for name, grad in on_outputs if grad is not None})

    return pullback


def _where(mask: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
    if mine is theirs:
        return mine
    return torch.where(mask.reshape(*mask.shape, *(1,) * (mine.ndim - mask.ndim)), mine, theirs)
